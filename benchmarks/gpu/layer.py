"""A row of the MoE layer, routing to combine: ``impl="triton"`` against the fair path and ``impl="torch"``.

Before anything is timed: memory is poisoned; values and all gradients are compared with fp64, and have to be as near to
it as the fair path's; nothing may make the host wait; two runs have to give the same bits.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.gpu import common
from benchmarks.gpu.common import DEVICE
from benchmarks.gpu.fair import fair
from benchmarks.gpu.shapes import Shape, Weights, route, weights_of
from benchmarks.gpu.truth import NAMES, Results, errors
from torch import Tensor

from moesaic.ops import experts_mlp

OURS, FAIR, TORCH = "triton", "fair", "torch"
# Of the fair path's error.
_ALLOWED = 1.5
_ROUNDING = 1e-3


class WrongError(Exception):
    """A result is not what it should be."""


@dataclass(frozen=True)
class Contender:
    """A function of tokens, ids and routing weights, its parameters, and their gradients by our names."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    named: Callable[[tuple[Tensor, ...]], Results]


@functools.lru_cache(maxsize=1)
def contenders(shape: Shape) -> tuple[Weights, dict[str, Contender]]:
    """The same weights in each. Those of one shape are kept."""
    w = weights_of(shape)
    w13 = torch.cat([w.w1, w.w3], 2).detach().requires_grad_()

    def as_ours(gradients: tuple[Tensor, ...]) -> Results:
        return dict(zip(Weights._fields, gradients, strict=True))

    def as_fair(gradients: tuple[Tensor, ...]) -> Results:
        gate, up = gradients[0].chunk(2, 2)
        return {"w1": gate, "w3": up, "w2": gradients[1]}

    found = {
        impl: Contender(lambda x, i, p, impl=impl: experts_mlp(x, i, p, *w, impl=impl), w, as_ours)
        for impl in (OURS, TORCH)
    }
    found[FAIR] = Contender(lambda x, i, p: fair(x, i, p, w13, w.w2), (w13, w.w2), as_fair)
    return w, found


@dataclass(frozen=True)
class Case:
    """Tokens, their routing, and the gradient of the result."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    grad: Tensor

    @classmethod
    def of(cls, shape: Shape, tokens: int, routing: str) -> "Case":
        torch.manual_seed(1)
        x, grad = (torch.randn(tokens, shape.D, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        return cls(x, *route(shape, tokens, routing), grad)

    def forward(self, contender: Contender) -> Tensor:
        with torch.no_grad():
            return contender.run(self.x, self.ids, self.weights)

    def both(self, contender: Contender) -> tuple[Tensor, ...]:
        """The result, and the gradients of x, of the routing weights and of the parameters."""
        x, weights = self.x.detach().requires_grad_(), self.weights.detach().requires_grad_()
        z = contender.run(x, self.ids, weights)
        return z.detach(), *torch.autograd.grad(z, (x, weights, *contender.parameters), self.grad)

    def results(self, contender: Contender) -> Results:
        z, gx, gweights, *rest = self.both(contender)
        return {"z": z, "x": gx, "weights": gweights, **contender.named(tuple(rest))}


def check(row: dict[str, Any], case: Case, w: Weights, found: dict[str, Contender]) -> None:
    """Values against fp64, no wait of the host, the same bits twice. Raises ``WrongError`` for what is not so."""
    ours = found[OURS]
    with common.poisoned():
        results = {name: case.results(found[name]) for name in (OURS, FAIR)}
        inference = case.forward(ours)
    wrong = errors(case.x, case.ids, case.weights, w, case.grad, results)
    row |= {"error": max(wrong[OURS].values()), "error, fair": max(wrong[FAIR].values())}
    for name in NAMES:
        error, fair_error = wrong[OURS][name], wrong[FAIR][name]
        if not error <= _ALLOWED * fair_error + _ROUNDING:
            raise WrongError(f"{name}: error {error:.2g} against fp64, the fair path's {fair_error:.2g}")
    again = case.results(ours)
    for name in NAMES:
        if not torch.equal(results[OURS][name], again[name]):
            raise WrongError(f"{name}: two runs differ")
    if not torch.equal(inference, case.forward(ours)):
        raise WrongError("two runs without gradients differ")
    if not common.error(inference, results[OURS]["z"]) < 1e-2:
        raise WrongError("the result without gradients is another than with them")
    with common.without_sync():
        case.forward(ours)
        case.both(ours)
    row["checked"] = "fp64, bits, no sync"


def saved_bytes(case: Case, contender: Contender) -> int:
    """Of what autograd keeps, beside the arguments and the parameters."""
    given = {
        t.untyped_storage().data_ptr() for t in (case.x, case.ids, case.weights, *contender.parameters) if t.numel()
    }
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in given:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        contender.run(case.x.detach().requires_grad_(), case.ids, case.weights)
    return sum(kept.values())


def flops(shape: Shape, tokens: int) -> int:
    """Of a forward pass."""
    return 6 * tokens * shape.K * shape.D * shape.F


def measure(row: dict[str, Any], shape: Shape, tokens: int, routing: str) -> None:
    """Fill the row, as far as it gets."""
    w, found = contenders(shape)
    case = Case.of(shape, tokens, routing)
    check(row, case, w, found)
    row["saved bytes"] = saved_bytes(case, found[OURS])
    # Nobody can do without them: what the up projections gave.
    row["saved bytes, least"] = 2 * tokens * shape.K * shape.F * case.x.element_size()
    for name in (OURS, FAIR, TORCH):
        row[f"fwd {name} ms"] = common.milliseconds(functools.partial(case.forward, found[name]))
        if name != TORCH:
            replay = common.capture(functools.partial(case.forward, found[name]))
            row[f"fwd graph {name} ms"] = common.milliseconds(replay)
        row[f"fwd+bwd {name} ms"] = common.milliseconds(functools.partial(case.both, found[name]))
    # A graph's replay has no time of Python in it.
    row["fwd x fair"] = row[f"fwd graph {FAIR} ms"] / row[f"fwd graph {OURS} ms"]
    row["fwd+bwd x fair"] = row[f"fwd+bwd {FAIR} ms"] / row[f"fwd+bwd {OURS} ms"]
    row["fwd TFLOP/s"] = flops(shape, tokens) / row[f"fwd graph {OURS} ms"] / 1e9
    row["fwd+bwd TFLOP/s"] = 3 * flops(shape, tokens) / row[f"fwd+bwd {OURS} ms"] / 1e9
    touched = case.ids.unique().numel() * 3 * shape.D * shape.F * case.x.element_size()
    row["weights GB/s"] = touched / row[f"fwd graph {OURS} ms"] / 1e6
