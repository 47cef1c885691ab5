"""The MoE layer on a GPU, from routing to combine: ``impl="triton"`` against torch's grouped product and its users.

Every contender is compared with an fp32 loop before it is timed, in memory filled with NaN. One process, one GPU; needs
transformers. Prints the table and what was aimed at, and writes ``benchmarks/results/experts_DEVICE.json``.

    python -m benchmarks.gpu.experts [--dry-run]
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from benchmarks.gpu import common
from benchmarks.gpu.common import DEVICE, DRY_RUN
from benchmarks.gpu.shapes import ROUTINGS, SHAPES, TOKENS, Options, Shape, route
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moesaic import MoE, MoEConfig
from moesaic.layers.experts import MainGrads
from moesaic.ops import experts_mlp

OURS, BASE = "triton", "torch"
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Contender:
    """A function of tokens, ids and routing weights, and its parameters."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    parameters: tuple[Tensor, ...]


def contenders(shape: Shape) -> dict[str, Contender]:
    """The same weights in each."""
    torch.manual_seed(0)
    E, D, H = shape.E, shape.D, shape.F
    w1, w3, w2 = (
        (torch.randn(E, n, m, device=DEVICE, dtype=DTYPE) * n**-0.5).requires_grad_()
        for n, m in ((D, H), (D, H), (H, D))
    )
    config = Qwen3MoeConfig(hidden_size=D, moe_intermediate_size=H, num_experts=E, num_experts_per_tok=shape.K)
    config._experts_implementation = "grouped_mm"
    theirs = Qwen3MoeExperts(config).to(DEVICE, DTYPE)
    with torch.no_grad():
        theirs.gate_up_proj.copy_(torch.cat([w1.mT, w3.mT], 1))
        theirs.down_proj.copy_(w2.mT)
    found = {
        impl: Contender(lambda x, i, w, impl=impl: experts_mlp(x, i, w, w1, w3, w2, impl=impl), (w1, w3, w2))
        for impl in (OURS, BASE)
    }
    found["transformers grouped_mm"] = Contender(
        lambda x, i, w: theirs(x, i, w.to(x.dtype)), (theirs.gate_up_proj, theirs.down_proj)
    )
    found["cuBLAS loop"] = Contender(lambda x, i, w: loop(x, i, w, w1, w3, w2), (w1, w3, w2))
    return found


def loop(x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """Expert by expert, with the sizes read to the host."""
    z = torch.zeros_like(x)
    order = ids.flatten().argsort(stable=True)
    tokens = order // ids.shape[1]
    rows = x[tokens]
    outputs, start = [], 0
    for e, size in enumerate(torch.bincount(ids.flatten(), minlength=w1.shape[0]).tolist()):
        if size:
            x_e = rows[start : start + size]
            outputs.append((F.silu(x_e @ w1[e]) * (x_e @ w3[e])) @ w2[e])
        start += size
    return z.index_add(0, tokens, torch.cat(outputs) * weights.flatten()[order].unsqueeze(1).to(x.dtype))


def truth(x: Tensor, ids: Tensor, weights: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
    """The loop in fp32, of as many tokens as its memory is for."""
    with torch.no_grad():
        return loop(x.float(), ids, weights, *(Fp32(p.detach()) for p in parameters))


class Fp32:
    """A weight of which one matrix at a time is in fp32."""

    def __init__(self, w: Tensor) -> None:
        self.w, self.shape = w, w.shape

    def __getitem__(self, e: int) -> Tensor:
        return self.w[e].float()


def forward(contender: Contender, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    with torch.no_grad():
        return contender.run(x, ids, weights)


def backward(contender: Contender, x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    z = contender.run(x, ids, weights)
    return [z.detach(), *torch.autograd.grad(z, (x, weights, *contender.parameters), torch.ones_like(z))]


def check(found: dict[str, Contender], x: Tensor, ids: Tensor, weights: Tensor) -> dict[str, float]:
    """Errors against fp32, with poisoned memory; ours has to be as near as torch's, and the same in a second run."""
    expected = truth(x, ids, weights, found[OURS].parameters)
    errors, gradients = {}, {}
    for name, contender in found.items():
        with common.poisoned():
            errors[name] = common.error(forward(contender, x, ids, weights), expected)
            if name in (OURS, BASE):
                gradients[name] = backward(contender, x, ids, weights)
        assert errors[name] < 2e-2, f"{name}: relative error {errors[name]:.2g}"
    assert errors[OURS] <= 1.5 * errors[BASE] + 1e-6, errors
    for ours, base in zip(gradients[OURS], gradients[BASE], strict=True):
        assert common.error(ours, base) < 2e-2, f"a gradient differs by {common.error(ours, base):.2g}"
    for first, second in zip(gradients[OURS], backward(found[OURS], x, ids, weights), strict=True):
        assert torch.equal(first, second), "two runs differ"
    return errors


def check_graph(shape: Shape, contender: Contender, tokens: int) -> None:
    """Captured with one routing, replayed right with others."""
    x = torch.randn(tokens, shape.D, device=DEVICE, dtype=DTYPE)
    ids, weights = route(shape, tokens, "balanced")
    replay = common.capture(lambda: forward(contender, x, ids, weights))
    for seed, routing in enumerate((*ROUTINGS, *ROUTINGS)):
        new_ids, new_weights = route(shape, tokens, routing, seed + 1)
        ids.copy_(new_ids)
        weights.copy_(new_weights)
        expected = forward(contender, x, ids, weights)
        assert torch.equal(replay(), expected), f"the graph replayed with routing {routing} {seed} gives something else"


def check_compiled(shape: Shape) -> None:
    """The layer in one graph of torch.compile, forward and backward."""
    torch.manual_seed(0)
    config = MoEConfig(dim=shape.D, hidden_dim=shape.F, num_experts=shape.E, top_k=shape.K)
    # In training mode the router counts its load, and asks autograd whether it recomputes: not traceable.
    layer = MoE(config, impl=OURS, device=DEVICE, dtype=DTYPE).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager" if DRY_RUN else "inductor")
    x = torch.randn(min(TOKENS[-1], 256), shape.D, device=DEVICE, dtype=DTYPE)
    eager, ours = layer(x), compiled(x)
    assert common.error(ours.detach(), eager.detach()) < 2e-2
    ours.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def accumulate(buffers: MainGrads, contender: Contender, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Both passes, the weights' gradients added to fp32 buffers."""
    x = x.detach().requires_grad_()
    z = experts_mlp(x, ids, weights.detach().requires_grad_(), *contender.parameters, impl=OURS, main_grads=buffers)
    z.backward(torch.ones_like(z))
    assert x.grad is not None
    return x.grad


def check_main_grads(found: dict[str, Contender], x: Tensor, ids: Tensor, weights: Tensor) -> MainGrads:
    """As torch's gradients, the same bits in a second run, and twice as much after a second pass."""
    expected = backward(found[BASE], x, ids, weights)[3:]
    parameters = found[OURS].parameters

    def run() -> MainGrads:
        w1, w3, w2 = (torch.zeros_like(p, dtype=torch.float32) for p in parameters)
        accumulate((w1, w3, w2), found[OURS], x, ids, weights)
        return w1, w3, w2

    with common.poisoned():
        buffers = run()
    for i, (ours, base, again) in enumerate(zip(buffers, expected, run(), strict=True)):
        assert torch.equal(ours, again), f"main gradient {i}: two runs differ"
        assert common.error(ours, base) < 2e-2, f"main gradient {i} differs by {common.error(ours, base):.2g}"
    once = [t.clone() for t in buffers]
    accumulate(buffers, found[OURS], x, ids, weights)
    assert all(common.error(t, 2 * before) < 1e-6 for t, before in zip(buffers, once, strict=True))
    assert all(p.grad is None for p in parameters)
    return buffers


def saved_bytes(contender: Contender, x: Tensor, ids: Tensor, weights: Tensor) -> int:
    """Of what autograd keeps, beside the arguments and the parameters."""
    given = {t.untyped_storage().data_ptr() for t in (x, ids, weights, *contender.parameters)}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in given:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        contender.run(x.detach().requires_grad_(), ids, weights)
    return sum(kept.values())


def save_everything(shape: Shape, tokens: int) -> int:
    """Bytes of x, its gathered rows, both pre-activations, their activation and product, and the experts' results."""
    rows = tokens * shape.K
    return 2 * (tokens * shape.D + 2 * rows * shape.D + 4 * rows * shape.F)


def measure(shape: Shape, tokens: int, routing: str, options: Options, found: dict[str, Contender]) -> dict[str, Any]:
    x = torch.randn(tokens, shape.D, device=DEVICE, dtype=DTYPE)
    ids, weights = route(shape, tokens, routing)
    errors = check(found, x, ids, weights)
    flops = 6 * tokens * shape.K * shape.D * shape.F
    touched = ids.unique().numel() * 3 * shape.D * shape.F * DTYPE.itemsize
    row: dict[str, Any] = {"shape": shape.name, "T": tokens, "routing": routing}
    for label, run, times in (("fwd", forward, 1), ("fwd+bwd", backward, 3)):
        ms = {
            name: common.milliseconds(lambda c=c, run=run: run(c, x, ids, weights), options.rounds)
            for name, c in found.items()
        }
        row |= {f"{label} {name} ms": t for name, t in ms.items()}
        row[f"{label} ratio"] = ms[BASE] / ms[OURS]
        row[f"{label} TFLOP/s"] = times * flops / ms[OURS] / 1e9
    buffers = check_main_grads(found, x, ids, weights)
    run_into = functools.partial(accumulate, buffers, found[OURS], x, ids, weights)
    row["fwd+bwd main gradients ms"] = common.milliseconds(run_into, options.rounds)
    row["weights GB/s"] = touched / row[f"fwd {OURS} ms"] / 1e6
    row["saved"] = saved_bytes(found[OURS], x, ids, weights) / save_everything(shape, tokens)
    row["error"] = errors[OURS]
    return row


def verdicts(rows: list[dict[str, Any]], ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """What was aimed at, and the worst that was measured."""
    most, least = max(TOKENS), min(TOKENS)
    fine = {s.name for s in SHAPES if s.is_fine}
    large = [r for r in rows if r["T"] == most]
    skewed = [
        z[f"fwd+bwd {OURS} ms"] / b[f"fwd+bwd {OURS} ms"]
        for z in large
        for b in large
        if (z["routing"], b["routing"], z["shape"]) == ("zipf", "balanced", b["shape"])
    ]
    aims: list[tuple[str, float, list[float], bool]] = [
        ("fine-grained forward, x torch", 1.4, [r["fwd ratio"] for r in large if r["shape"] in fine], True),
        ("fine-grained both passes, x torch", 1.4, [r["fwd+bwd ratio"] for r in large if r["shape"] in fine], True),
        ("wide both passes, x torch", 1.0, [r["fwd+bwd ratio"] for r in large if r["shape"] not in fine], True),
        ("decode, of the copy's bandwidth", 0.6, [
            r["weights GB/s"] / ceilings["copy_gb_per_s"] for r in rows if r["T"] == least
        ], True),
        ("saved bytes, of save-everything", 0.3, [r["saved"] for r in large], False),
        ("zipf against balanced time", 1.15, skewed, False),
    ]  # fmt: skip
    return [common.verdict(what, aim, measured, at_least) for what, aim, measured, at_least in aims if measured]


def main(options: Options) -> list[dict[str, Any]]:
    """Measure, print and save; gives back what was aimed at and what was reached."""
    common.require_gpu()
    ceilings, rows = common.ceilings(options.rounds), []
    for shape in (s for s in SHAPES if s.name in options.shapes):
        found = contenders(shape)
        check_graph(shape, found[OURS], min(TOKENS))
        check_compiled(shape)
        for tokens in options.tokens:
            for routing in ROUTINGS:
                rows.append(measure(shape, tokens, routing, options, found))
                print(rows[-1], flush=True)
        del found
    common.show("MoE layer, routing to combine, bf16", rows)
    results = verdicts(rows, ceilings)
    common.show("Aims", results)
    print(
        "right before it was timed: values, gradients, main gradients, the same bits twice, CUDA graph, "
        "torch.compile(fullgraph=True)"
    )
    record = {"what": "MoE layer on a GPU", "rounds": options.rounds, "ceilings": ceilings, "aims": results}
    common.save("experts", record | {"shapes": [asdict(s) for s in SHAPES], "rows": rows})
    return results


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
