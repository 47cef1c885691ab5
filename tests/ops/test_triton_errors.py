"""Asking for ``impl="triton"`` where it cannot run."""

import pytest
import torch

from moesaic.ops import experts_mlp, grouped_mm
from tests.ops.experts_oracle import experts
from tests.ops.strategies import layout, problem

_CALL = """
import sys
import torch, moesaic
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "triton":
            raise ModuleNotFoundError(name, name=name)
{block}
try:
    moesaic.grouped_mm(torch.ones(2, 3), torch.ones(1, 3, 4), torch.tensor([2]), impl="triton")
except RuntimeError as error:
    print(error)
"""


def test_without_triton_says_how_to_get_it(fresh_python):
    block = "sys.meta_path.insert(0, Blocker()); sys.modules.pop('triton', None)"
    said = fresh_python(_CALL.format(block=block)).stdout
    assert 'impl: "triton" needs triton, which is not installed; pip install ".[triton]"' in said


def test_on_the_cpu_says_so(forked_python):
    pytest.importorskip("triton")
    said = forked_python(_CALL.format(block="")).stdout
    assert 'impl: "triton" computes on CUDA, x is on cpu; move it there, or use "torch" or None' in said


def test_the_fused_experts_say_so_too():
    p = experts(5, 2, 3, 8, 12, torch.float64)
    with pytest.raises(TypeError, match='impl: "triton" has no kernels for torch.float64; use "torch" or None'):
        experts_mlp(p.x, p.ids, p.weights, p.w1, p.w3, p.w2, impl="triton")


def test_dtype_without_kernels():
    p = problem(layout("flat", [[2, 3]]), 4, 3, torch.float64)
    with pytest.raises(TypeError, match='impl: "triton" has no kernels for torch.float64; use "torch" or None'):
        grouped_mm(p.x, p.w, p.group_sizes, impl="triton")
