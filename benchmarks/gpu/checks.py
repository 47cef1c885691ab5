"""What has to hold and is not timed: replay with other routings, main gradients, the layer in one compiled graph."""

from typing import Any

import torch
from benchmarks.gpu import common
from benchmarks.gpu.common import DEVICE, DRY_RUN
from benchmarks.gpu.layer import OURS, Case, WrongError, contenders
from benchmarks.gpu.shapes import ROUTINGS, TOKENS, Shape, Weights, route

from moesaic import MoE, MoEConfig
from moesaic.ops import experts_mlp


def measure(row: dict[str, Any], shape: Shape, tokens: int, routing: str) -> None:
    """Fill the row with what was found right; raises ``WrongError`` at the first thing that is not."""
    row["checked"] = ""
    for name, check in (("replay", _replay), ("main gradients", _main_gradients), ("fullgraph", _compiled)):
        check(shape, tokens, routing)
        row["checked"] += f", {name}" if row["checked"] else name


def _replay(shape: Shape, tokens: int, routing: str) -> None:
    """Captured with one routing, replayed right with others."""
    contender = contenders(shape)[1][OURS]
    case = Case.of(shape, tokens, routing)
    replay = common.capture(lambda: case.forward(contender))
    for seed, other in enumerate((*ROUTINGS, *ROUTINGS)):
        ids, weights = route(shape, tokens, other, seed + 1)
        case.ids.copy_(ids)
        case.weights.copy_(weights)
        if not torch.equal(replay(), case.forward(contender)):
            raise WrongError(f"the graph replayed with routing {other} {seed} gives something else")


def _main_gradients(shape: Shape, tokens: int, routing: str) -> None:
    """As the gradients are, the same bits in a second run, and twice as much after a second pass."""
    w, found = contenders(shape)
    case = Case.of(shape, tokens, routing)
    expected = case.results(found[OURS])

    def add_to(buffers: Weights) -> Weights:
        x, weights = case.x.detach().requires_grad_(), case.weights.detach().requires_grad_()
        experts_mlp(x, case.ids, weights, *w, impl=OURS, main_grads=tuple(buffers)).backward(case.grad)
        return buffers

    first, second = (add_to(Weights(*(torch.zeros_like(p, dtype=torch.float32) for p in w))) for _ in range(2))
    for name, a, b in zip(Weights._fields, first, second, strict=True):
        if not torch.equal(a, b):
            raise WrongError(f"main gradient of {name}: two runs differ")
        if not common.error(a, expected[name]) < 1e-2:
            raise WrongError(f"main gradient of {name} is another than its gradient")
    for name, a, b in zip(Weights._fields, add_to(second), first, strict=True):
        if not common.error(a, 2 * b) < 1e-6:
            raise WrongError(f"main gradient of {name}: a second pass does not add as much again")


def _compiled(shape: Shape, tokens: int, routing: str) -> None:
    """The layer in one graph of torch.compile, forward and backward."""
    torch.manual_seed(0)
    config = MoEConfig(dim=shape.D, hidden_dim=shape.F, num_experts=shape.E, top_k=shape.K)
    # In training mode the router counts its load, and asks autograd whether it recomputes: not traceable.
    layer = MoE(config, impl=OURS, device=DEVICE, dtype=torch.bfloat16).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager" if DRY_RUN else "inductor")
    x = torch.randn(min(TOKENS[-1], 256), shape.D, device=DEVICE, dtype=torch.bfloat16)
    eager, ours = layer(x), compiled(x)
    if not common.error(ours.detach(), eager.detach()) < 2e-2:
        raise WrongError("the compiled layer gives another result")
    ours.sum().backward()
    if not all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters()):
        raise WrongError("the compiled layer gives gradients that are not finite")
