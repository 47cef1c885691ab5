"""``impl="triton"`` of listed copies: values and all gradients, and nothing read that was not written."""

import pytest
import torch

from tests.ops.experts_oracle import check, experts
from tests.ops.oracle import uninitialised_memory_is_nan
from tests.ops.test_listed_copies import listed, run


@pytest.mark.parametrize(("biased", "gated"), [(True, True), (False, False)])
def test_values_and_gradients(biased, gated):
    p = experts(20, 3, 4, 24, 40, torch.float32, gated=gated, biased=biased)
    with uninitialised_memory_is_nan():
        check(p, run("triton", p, listed(p.ids, 4, shuffled=biased)))


@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_launches_of_gpus(on, capability):
    on(capability)
    p = experts(60, 2, 3, 72, 136, torch.bfloat16)
    with uninitialised_memory_is_nan():
        check(p, run("triton", p, listed(p.ids, 3)))


@pytest.mark.parametrize(("tokens", "lines"), [(0, 2), (3, 0), (3, 2)])
def test_nothing_listed(tokens, lines):
    p = experts(tokens, 2, 3, 8, 16, torch.float32, biased=True)
    with uninitialised_memory_is_nan():
        found = run("triton", p, torch.full((lines,), -1))
    assert all(not t.any() for t in found.values())
