"""Stock torchtitan against each override in torchtitan's Trainer: gradients of the first step, losses of three.

Stock runs on one process with its products in fp32, and the override on 1 to 8 ranks, with every kind of parallelism.
"""

import pytest

from tests.torchtitan.case import MODELS, Case, merged, run
from tests.torchtitan.compare import assert_equal
from tests.torchtitan.layouts import cases

# All layouts with one model, and each other one with the others. `moe` differs before the exchange only.
EVERY = {"experts": (1, 2, 2), "routed_experts": (1, 2, 2), "moe": (3, 3, 3)}
TRIED = [
    tried
    for override, every in EVERY.items()
    for n, model in enumerate(MODELS)
    for tried in cases(model, override, every=every[n], first=n % every[n])
]


@pytest.mark.parametrize(("world_size", "case"), sorted(TRIED, key=lambda t: t[0]), ids=str)
def test_override_equals_stock(same_ranks, alone, differences, world_size, case):
    differ = assert_equal(merged(same_ranks(run, world_size, case)), alone(case), case)
    differences.append(f"{world_size} {case}: loss {differ.loss:.1e}, gradient {differ.gradient:.1e} ({differ.name})")


@pytest.mark.parametrize("override", ["experts", "routed_experts", "moe"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("forced", "losses"), [(True, 1e-4), (False, 1e-2)], ids=["forced", "free"])
def test_twenty_steps(same_ranks, alone, model, override, forced, losses):
    etp = 1 if override == "experts" else 2
    case = Case(model, override, ep=4, etp=etp, steps=20, forced=forced)
    assert_equal(merged(same_ranks(run, 4, case)), alone(case), case, losses)
