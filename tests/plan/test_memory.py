"""Memory of a rank as it is planned, against torch's own accounting of a step on fake tensors."""

import pytest
from benchmarks.plan_memory import QUICK, both


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:For backward hooks to be called")  # torch's accounting hooks every module
@pytest.mark.usefixtures("unchecked")  # of fake tensors
@pytest.mark.parametrize("case", [pytest.param(QUICK[0], marks=pytest.mark.long), *QUICK[1:]], ids=str)
def test_memory_is_that_which_torch_counts(case):
    # With FSDP and without, recomputed and not, experts cut and not.
    of_plan, of_torch = both(case)
    assert of_plan == pytest.approx(of_torch, rel=0.05)
