"""Adapters on the experts and the router of a parallelized MoE: gradients and weights are those of one process."""

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moesaic
from moesaic.layers import quantize_
from moesaic.layers.lora import ExpertsAdapter, Rank, RouterAdapter, add_adapter
from moesaic.ops.quantized import Format
from moesaic.parallel import experts as of_experts
from moesaic.testing import Layout
from tests.distributed.parity import LocalAdamW, clip, legal_layouts, meshes_of

DIM, BATCH, LENGTH, STEPS = 32, 8, 5, 3


def make_moe(
    experts: int = 8, gated: bool = True, share: bool = False, format: Format | None = None, dropout: float = 0.0
) -> moesaic.MoE:
    """A layer whose weights are frozen, with adapters that are not zero. One expert gets no token."""
    torch.manual_seed(0)
    form = {"gated": gated, "activation": "silu" if gated else "relu2", "expert_biases": gated, "logit_bias": True}
    moe = moesaic.MoE(
        moesaic.MoEConfig(
            dim=DIM, hidden_dim=64 if format else 12, num_experts=experts, top_k=3, shared_hidden_dim=10, **form
        )
    )
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.3).requires_grad_(False)
    nn.init.constant_(moe.router.logit_bias[-1:], -20.0)
    if format is not None:
        quantize_(moe, format)
    ranks = {"w1": Rank(4, 0.5), "w3": Rank(4 if share else 2, 2.0), "w2": Rank(6, 1.0)}
    ranks = ranks if gated else {"w2": ranks["w2"]}
    add_adapter(moe.experts, "default", ExpertsAdapter(moe.experts, ranks, share=share, dropout=dropout))
    add_adapter(moe.router, "default", RouterAdapter(moe.router, Rank(2, 0.7), dropout=dropout))
    for name, parameter in moe.named_parameters():
        if "adapters" in name:
            nn.init.normal_(parameter, std=0.3)
    return moe


def inputs(rank: int, layout: Layout) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    meshes = meshes_of(layout)
    rows = slice(meshes.dp_rank * BATCH // meshes.dp_size, (meshes.dp_rank + 1) * BATCH // meshes.dp_size)
    mine = (rows, meshes.sequence_slice(LENGTH))
    steps = [torch.randn(2, BATCH, LENGTH, DIM, generator=generator) for _ in range(STEPS)]
    return [{"x": x[mine], "target": target[mine]} for x, target in steps]


def loss(moe: moesaic.MoE, batch: dict[str, Tensor]) -> Tensor:
    # The masks of dropout depend on what the first rank draws.
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    return (moe(batch["x"]) - batch["target"]).square().sum() / (BATCH * LENGTH)


def parallelize(way: Any, moe: moesaic.MoE, layout: Layout) -> nn.Module:
    return moesaic.parallelize(moe, meshes_of(layout), compute=way)


def trained_adamw(parameters: Sequence[nn.Parameter]) -> LocalAdamW:
    return LocalAdamW([p for p in parameters if p.requires_grad], lr=1e-2)


def check(equal_gradients: Any, world: int, layout: dict[str, int], way: str, **form: Any) -> Any:
    return equal_gradients(
        functools.partial(make_moe, **form),
        inputs,
        functools.partial(parallelize, way),
        [layout],
        world=world,
        loss=loss,
        clip=clip,
        optimizer=trained_adamw,
        steps=STEPS,
    )


def name_of(value: Any) -> str:
    return " ".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


LAYOUTS = [(n, layout) for n in (1, 2, 4, 8) for layout in legal_layouts(n)]
# Those that differ in kind: an axis alone, ep and etp together, FSDP of experts around each of them.
SOME = [
    (2, {"tp": 2, "etp": 2}, "dtensor", {"share": True}),
    (4, {"tp": 2, "ep": 2, "etp": 2}, "local", {}),
    (4, {"ep": 2}, "dtensor", {"experts": 7, "gated": False}),
    (4, {"tp": 2, "ep": 2, "etp": 2}, "local", {"format": "mxfp4", "dropout": 0.3}),
    (4, {"tp": 2, "ep": 2, "etp": 2}, "dtensor", {"dropout": 0.3, "share": True}),
]


@pytest.mark.parametrize(("world", "layout", "way", "form"), SOME, ids=name_of)
def test_some_layouts(equal_gradients, world, layout, way, form):
    check(equal_gradients, world, layout, way, **form)


# Each layout has two of them, one each way.
FORMS: list[dict[str, Any]] = [{}, {"share": True, "dropout": 0.3}, {"gated": False}]


@pytest.mark.long
@pytest.mark.parametrize("way", ["dtensor", "local"])
@pytest.mark.parametrize(("number", "world", "layout"), [(i, *case) for i, case in enumerate(LAYOUTS)], ids=name_of)
def test_every_layout(equal_gradients, number, world, layout, way):
    check(equal_gradients, world, layout, way, **FORMS[(number + (way == "local")) % len(FORMS)])


@pytest.mark.long
@pytest.mark.parametrize("format", ["int8", "mxfp4"])
@pytest.mark.parametrize(("world", "layout"), [case for case in LAYOUTS if case[1]["etp"] <= 2], ids=name_of)
def test_quantised_experts_in_every_layout(equal_gradients, world, layout, format):
    # A hidden dim of 64 has two blocks.
    check(equal_gradients, world, layout, "local", format=format)


def without_sums(moe: moesaic.MoE, layout: Layout) -> nn.Module:
    """As if a factor that etp does not cut had its whole gradient on every rank."""
    before = of_experts.GRADIENTS
    of_experts.GRADIENTS = before | of_experts.FACTORS
    try:
        return parallelize("local", moe, layout)
    finally:
        of_experts.GRADIENTS = before


def test_a_missing_sum_over_etp_is_seen(equal_gradients):
    options = {"loss": loss, "clip": clip, "optimizer": trained_adamw, "steps": STEPS}
    with pytest.raises(
        AssertionError, match=r"gradient of experts.adapters.default.w\d_\w and 2 more: .* not summed over tp or etp"
    ):
        equal_gradients(make_moe, inputs, without_sums, [{"etp": 2, "tp": 2}], world=2, **options)


def check_what_is_refused() -> None:
    odd = make_moe(experts=3, gated=False)
    add_adapter(odd.experts, "odd", ExpertsAdapter(odd.experts, {"w2": Rank(3, 1.0)}))
    with pytest.raises(ValueError, match=r"cuts the ranks of its adapters, which it cannot for \[3\]"):
        moesaic.parallelize(odd, meshes_of({"ep": 2}))


def test_what_cannot_be_laid_out_is_refused(same_ranks):
    same_ranks(check_what_is_refused, 4)


def check_what_is_frozen() -> None:
    for layout in ({"ep": 2}, {"etp": 2, "tp": 2}, {}):
        moe = moesaic.parallelize(make_moe(), meshes_of(layout))
        optimizer = torch.optim.AdamW([p for p in moe.parameters() if p.requires_grad], lr=0.1, foreach=False)
        moe(torch.randn(6, DIM)).square().sum().backward()
        trained = {name for name, p in moe.named_parameters() if p.grad is not None}
        assert trained == {name for name, _ in moe.named_parameters() if "adapters" in name}
        optimizer.step()
        assert len(optimizer.state) == len(trained)


class Reduced(TorchDispatchMode):
    """Counts the numbers that are summed over ranks and scattered."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "reduce_scatter" in str(func):
            self.numbers += max(t.numel() for t in tree_leaves(args) if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


def check_buffers() -> None:
    """On two ranks that share all weights: FSDP has gradients of adapters to reduce, and of nothing else."""
    for frozen in (True, False):
        moe = make_moe()
        for name, parameter in moe.named_parameters():
            parameter.requires_grad_("adapters" in name or not (frozen or "experts" in name))
        moe = moesaic.parallelize(moe, meshes_of({}))
        with Reduced() as reduced:
            moe(torch.randn(6, DIM)).square().sum().backward()
        trained = sum(p.numel() for p in moe.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in moe.parameters())
        assert trained <= reduced.numbers < 1.05 * trained < 0.5 * whole
        for module in moe.modules():
            if isinstance(module, FSDPModule):
                group = module._get_fsdp_state()._fsdp_param_group
                for p in [] if group is None else group.fsdp_params:
                    assert p.sharded_param.requires_grad == (p.sharded_param.grad is not None)
                    assert p.unsharded_accumulated_grad is None


def test_fsdp_has_no_gradient_buffer_for_frozen_weights(same_ranks):
    same_ranks(check_buffers, 2)


def test_frozen_weights_have_neither_gradient_nor_optimizer_state(same_ranks):
    same_ranks(check_what_is_frozen, 2)
