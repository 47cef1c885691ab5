"""A bare mixture-of-experts model in plain torch, laid over ranks by hand, with faults that can be planted."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.testing import Check

TOKENS, DIM, HIDDEN, EXPERTS = 16, 8, 6, 4


class Shared(nn.Module):
    """A dense MLP whose hidden dim is cut over tp."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(HIDDEN, DIM) / 3)
        self.down = nn.Parameter(torch.randn(DIM, HIDDEN) / 3)
        self.bias = nn.Parameter(torch.randn(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x @ self.up.T) @ self.down.T + self.bias


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, DIM))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probabilities = (x @ self.weight.T).softmax(-1)
        values, ids = torch.topk(probabilities, 2)
        return probabilities, values, ids


class Experts(nn.Module):
    """Each expert's matrices; a rank may have some of the experts, from ``first`` on."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(EXPERTS, DIM, HIDDEN) / 3)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, DIM) / 3)
        self.first = 0

    def forward(self, x: Tensor, values: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(len(self.w1)):
            weight = (values * (ids == self.first + e)).sum(-1, keepdim=True)
            out = out + weight * (F.silu(x @ self.w1[e]) @ self.w2[e])
        return out


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts, self.shared = Router(), Experts(), Shared()
        self.probabilities: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.probabilities, values, ids = self.router(x)
        return x + self.experts(x, values, ids) + self.shared(x)


class Model(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(DIM, DIM)
        self.drop = nn.Dropout(dropout)
        self.moe = Moe()
        self.head = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.moe(self.drop(self.embed(x).tanh())))


def build(dropout: float = 0.0) -> nn.Module:
    return Model(dropout)


def inputs(rank, layout):
    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(TOKENS, n, generator=generator) for n in (DIM, 3))
    rows = layout.rows(rank, TOKENS)
    return {"x": x[rows], "target": target[rows]}


def loss(model: nn.Module, batch) -> dict[str, Tensor]:
    out = model(batch["x"])
    main = (out - batch["target"]).square().sum() / TOKENS
    inner = getattr(model, "module", model)
    share = inner.moe.probabilities.square().sum() / TOKENS
    return {"main": main, "balance": 0.3 * share}


@dataclass(frozen=True)
class Hand:
    """Parallelize by hand: dp copies, tp cuts the shared expert, ep the experts. ``fault`` names what is wrong."""

    fault: str = ""

    def __call__(self, model, layout):
        return _lay_out(model, layout, self.fault)


class CopyOver(torch.autograd.Function):
    """The identity, whose gradient is summed over a group."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class SumOver(torch.autograd.Function):
    """The sum over a group; each rank's gradient is that of the sum."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def groups_of(layout) -> dict[str, dist.ProcessGroup]:
    """This rank's group along each axis."""
    mine = {}
    for name, partition in layout.groups().items():
        for ranks in partition:
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                for one in name.split(" or "):
                    mine[one] = group
    return mine


def _lay_out(model, layout, fault):
    groups, place = groups_of(layout), layout.place(dist.get_rank())
    model.sizes = {name: p.numel() for name, p in model.named_parameters()}
    moe, tp, ep, dp = model.moe, layout.get("tp", 1), layout.get("ep", 1), layout.views[0].get("dp", 1)
    if fault == "initialisation" and place.get("dp"):
        torch.manual_seed(7)
        nn.init.normal_(model.head.weight)
    if tp > 1:
        _cut_shared(moe, tp, place["tp"], groups["tp"], fault)
    if ep > 1:
        _cut_experts(moe, ep, place["ep"], groups["ep"], fault)
    if fault == "dropout" and "tp" in place:
        torch.manual_seed(place["tp"])
    model.sync = lambda: _sync(model, layout, groups, place, fault, dp, ep)
    model.fault = fault
    return model


def _cut_shared(moe, tp, at, group, fault):
    shared, rows = moe.shared, slice(at * HIDDEN // tp, (at + 1) * HIDDEN // tp)
    shared.up = nn.Parameter(shared.up[rows].detach().clone())
    shared.down = nn.Parameter(shared.down[:, rows].detach().clone())

    def forward(x):
        x = x if fault == "partial in backward" else CopyOver.apply(x, group)
        y = F.silu(x @ shared.up.T) @ shared.down.T
        if fault == "bias on every rank":
            y = y + shared.bias
        y = y if fault == "partial" else SumOver.apply(y, group)
        return y if fault == "bias on every rank" else y + shared.bias

    shared.forward = forward


def _cut_experts(moe, ep, at, group, fault):
    """Every ep rank has the same tokens and some experts, as where ep lies inside tp."""
    experts, mine = moe.experts, slice(at * EXPERTS // ep, (at + 1) * EXPERTS // ep)
    experts.first = mine.start
    experts.w1 = nn.Parameter(experts.w1[mine].detach().clone())
    experts.w2 = nn.Parameter(experts.w2[mine].detach().clone())

    def forward(x):
        moe.probabilities, values, ids = moe.router(x)
        if fault != "router":
            values = CopyOver.apply(values, group)
        y = experts(CopyOver.apply(x, group), values, ids)
        if fault == "shared counted":
            return x + SumOver.apply(y + moe.shared(x), group)
        return x + SumOver.apply(y, group) + moe.shared(x)

    moe.forward = forward


def _sync(model, layout, groups, place, fault, dp, ep):
    if dp == 1:
        return
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        group = groups["dp"]
        if fault == "wrong group" and "experts" in name:
            group = groups["ep"]
        dist.all_reduce(p.grad, group=group)
        if fault == "experts averaged" and "experts" in name:
            p.grad /= dp


def backward(model, batch, layout):
    terms = loss(model, batch)
    total = sum(terms.values())
    if model.fault == "loss times dp":
        total = total * layout.views[0].get("dp", 1)
    if model.fault == "balance":
        total = terms["main"] + terms["balance"] * layout.get("tp", 1)
    total.backward()
    model.sync()
    return total.detach()


@dataclass(frozen=True)
class Clip:
    """Clip by the norm over all ranks; or, as a fault, by that of this rank."""

    per_rank: bool = False

    def __call__(self, model, max_norm):
        world, square = dist.get_world_size(), torch.zeros(())
        for name, p in model.named_parameters():
            mine = p.grad.square().sum()
            if not self.per_rank:
                # Every part of a parameter lies on as many ranks as there are more ranks than parts.
                dist.all_reduce(mine := mine.clone())
                mine = mine / (world * p.numel() / model.sizes[name])
            square = square + mine
        norm = square.sqrt()
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        return norm


def check(fault: str = "", **changes) -> Check:
    """A check of this model, laid out by hand."""
    given = {
        "build": build,
        "inputs": inputs,
        "parallelize": Hand(fault),
        "layouts": [{"tp": 2, "ep": 2}],
        "loss": loss,
        "backward": backward,
        "clip": Clip(per_rank=fault == "clip"),
    }
    return Check(**{**given, **changes})


def wrong_check() -> Check:
    return check("experts averaged", layouts=[{"dp": 2, "tp": 2, "ep": 2}])
