"""What two runs have to agree in, and how far they differ."""

from typing import NamedTuple

from torch import Tensor

from tests.distributed.parity import assert_close
from tests.torchtitan.case import Case, Record

GRADIENTS = LOSSES = 1e-5
# With tp, torchtitan's own gradient of this is wrong: 1 / tp of what it is on one process.
WRONG_IN_STOCK = {"gpt_oss": "attention.wo.bias"}


class Difference(NamedTuple):
    """The largest ones, relative: of a loss, and of a gradient in norm."""

    loss: float
    gradient: float
    name: str


def assert_equal(got: Record, want: Record, case: Case, losses: float = LOSSES) -> Difference:
    """Every gradient of the first step within 1e-5, and all losses; what the model counts of itself is the same."""
    gradients = compared(want.grads, case)
    assert got.grads.keys() == want.grads.keys()
    for name, gradient in gradients.items():
        assert_close(f"gradient of {name}", got.grads[name], gradient, GRADIENTS)
    assert len(got.losses) == case.steps
    loss = max(abs(a - b) / abs(b) for a, b in zip(got.losses, want.losses, strict=True))
    assert loss <= losses, (got.losses, want.losses)
    assert got.buffers.keys() == want.buffers.keys()
    for name, buffer in want.buffers.items():
        assert_close(name, got.buffers[name], buffer)
    assert (got.flops, got.size) == (want.flops, want.size)
    error, name = max((error, name) for name, error in errors(got.grads, gradients).items())
    return Difference(loss, error, name)


def compared(gradients: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    wrong = WRONG_IN_STOCK.get(case.model) if case.tp > 1 else None
    return {name: gradient for name, gradient in gradients.items() if not (wrong and name.endswith(wrong))}


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """How far each tensor is off, relative in norm."""
    return {name: float((got[name].double() - t.double()).norm() / t.double().norm()) for name, t in want.items()}
