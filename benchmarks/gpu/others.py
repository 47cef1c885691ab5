"""Other people's layers, where they are installed: transformers, Liger, products of quack-kernels.

Each is compared with ours before it is timed. One that is not installed, fails or is wrong says so in its row.
"""

import functools
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from benchmarks.gpu import common
from benchmarks.gpu.common import DEVICE, DRY_RUN
from benchmarks.gpu.layer import OURS, Case, Contender, WrongError, contenders
from benchmarks.gpu.shapes import Shape, Weights
from torch import Tensor

Layer = tuple[Callable[[Tensor, Tensor, Tensor], Tensor], tuple[Tensor, ...]]


def _leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().contiguous().requires_grad_() for t in tensors)


def _transformers(shape: Shape, w: Weights) -> Layer:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=shape.D, moe_intermediate_size=shape.F, num_experts=shape.E, num_experts_per_tok=shape.K
    )
    config._experts_implementation = "grouped_mm"
    theirs = Qwen3MoeExperts(config).to(DEVICE, torch.bfloat16)
    with torch.no_grad():
        theirs.gate_up_proj.copy_(torch.cat([w.w1.mT, w.w3.mT], 1))
        theirs.down_proj.copy_(w.w2.mT)
    return lambda x, i, p: theirs(x, i, p.to(x.dtype)), (theirs.gate_up_proj, theirs.down_proj)


def _liger(shape: Shape, w: Weights) -> Layer:
    layer = import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    parameters = _leaves(torch.cat([w.w1.mT, w.w3.mT], 1), w.w2.mT)
    return lambda x, i, p: layer.apply(x, *parameters, i.int(), p), parameters


def _quack(shape: Shape, w: Weights) -> Layer:
    """Its grouped products with a gather, forward only, and torch around them."""
    gemm = import_module("quack.gemm_interface").gemm
    w13 = torch.cat([w.w1, w.w3], 2).detach()

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        keys, order = torch.sort(ids.flatten(), stable=True)
        starts = torch.searchsorted(keys, torch.arange(shape.E + 1, device=ids.device), out_int32=True)
        tokens = (order // shape.K).int()
        gate, up = gemm(x, w13, cu_seqlens_m=starts, A_idx=tokens, tuned=False).chunk(2, 1)
        hidden = torch.nn.functional.silu(gate) * up
        y = gemm(hidden, w.w2.detach(), cu_seqlens_m=starts, tuned=False)
        positions = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=ids.device))
        return (y[positions].view(*ids.shape, -1).float() * weights.unsqueeze(2)).sum(1).to(x.dtype)

    return run, ()


# By the name of the package. transformers waits for the host, and quack's row has torch's gathers in it.
OTHERS = {"transformers": _transformers, "liger-kernel": _liger, "quack-kernels": _quack}


def rows(shape: Shape, tokens: int, routing: str) -> Iterator[dict[str, Any]]:
    """A row for each of them."""
    w, found = contenders(shape)
    case = Case.of(shape, tokens, routing)
    expected = case.forward(found[OURS])
    for name, make in OTHERS.items():
        row: dict[str, Any] = {"what": "others", "who": name, "shape": shape.name, "T": tokens, "routing": routing}
        try:
            row["version"] = version(name)
            theirs = Contender(*make(shape, w), named=lambda _: {})
            wrong = row["apart from ours"] = common.error(case.forward(theirs), expected)
            if not wrong < 2e-2:
                raise WrongError(f"{name} gives something else: relative difference {wrong:.2g}")
            row["fwd ms"] = common.milliseconds(functools.partial(case.forward, theirs))
            if theirs.parameters:
                row["fwd+bwd ms"] = common.milliseconds(functools.partial(case.both, theirs))
        except PackageNotFoundError:
            row["left out"] = "not installed"
        except Exception as failure:
            if not DRY_RUN:
                torch.cuda.synchronize()  # raises where the GPU itself has failed
            row["failed"] = f"{type(failure).__name__}: {failure}"[:300]
        yield row
