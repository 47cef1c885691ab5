"""Low-rank adapters (LoRA) on the experts and on the router of a layer.

A weight ``w`` with an adapter acts as ``w + scale * a b``. The weights of a layer that has adapters are frozen. There
may be several adapters, each with a name, of which one is active at a time, or none.

Legend: E experts, D model dim, F hidden dim, r rank.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moesaic.layers.gate import gate_logits
from moesaic.layers.initial import check_generators
from moesaic.ops.arguments import check_int
from moesaic.ops.experts_lora.dropout import ROUTER, check_dropout, dropped, kept

WEIGHTS = ("w1", "w3", "w2")


class Rank(NamedTuple):
    """The size of an adapter.

    Attributes:
        r: the rank.
        scale: what the product is multiplied by: ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA.
    """

    r: int
    scale: float


class ExpertsAdapter(nn.Module):
    """Factors for the weights ``w1``, ``w3`` and ``w2`` of :class:`moesaic.GroupedExperts`, for some or all of them.

    Args:
        experts: whose weights these are. Sizes, device and, where it is not given, dtype are theirs.
        ranks: the rank and the scale for each weight that has an adapter.
        share: whether ``w3`` has the ``a`` of ``w1``, as in checkpoints with both in one tensor.
        dropout: in training mode, the share of numbers that are zero in what the factors are applied to.

    Attributes:
        w1_a, w3_a: ``[E, D, r]``; ``w3_a`` is None where it is that of ``w1``.
        w1_b, w3_b: ``[E, r, F]``.
        w2_a, w2_b: ``[E, F, r]`` and ``[E, r, D]``.
        ranks, dropout: as given.

    Raises:
        ValueError: an unknown weight, or none; a rank below 1; ``share`` with two ranks; a dropout that is no
            probability below 1.
    """

    w1_a: nn.Parameter | None
    w1_b: nn.Parameter | None
    w3_a: nn.Parameter | None
    w3_b: nn.Parameter | None
    w2_a: nn.Parameter | None
    w2_b: nn.Parameter | None

    def __init__(
        self,
        experts: Any,
        ranks: Mapping[str, Rank],
        *,
        share: bool = False,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_ranks(experts, ranks, share)
        check_dropout(dropout)
        self.ranks, self.share, self.dropout = dict(ranks), share, dropout
        for weight in WEIGHTS:
            a = b = None
            if weight in ranks:
                (E, rows, columns), r = getattr(experts, weight).shape, ranks[weight].r
                options = {"device": experts.w1.device, "dtype": dtype or experts.w1.dtype}
                a = None if weight == "w3" and share else nn.Parameter(torch.empty(E, rows, r, **options))
                b = nn.Parameter(torch.empty(E, r, columns, **options))
            self.register_parameter(f"{weight}_a", a)
            self.register_parameter(f"{weight}_b", b)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``a`` as the weights of a linear layer, ``b`` zero: the experts then compute what they did without."""
        check_generators(self)
        for name, factor in self.named_parameters(recurse=False):
            if name.endswith("_a"):
                nn.init.uniform_(factor, -(bound := 1 / math.sqrt(factor.shape[1])), bound)
            else:
                nn.init.zeros_(factor)

    def factors(self, weight: str) -> tuple[Tensor, Tensor] | None:
        """``a`` and ``b`` of a weight, or None."""
        b = getattr(self, f"{weight}_b")
        a = getattr(self, "w1_a" if weight == "w3" and self.share else f"{weight}_a")
        if a is None or b is None:
            return None
        return a, b

    def scaled(self, weight: str, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """``a`` and ``scale * b`` of a weight in ``dtype``, or None."""
        if (factors := self.factors(weight)) is None:
            return None
        a, b = factors
        return a.to(dtype), (b * self.ranks[weight].scale).to(dtype)

    def extra_repr(self) -> str:
        ranks = (f"{weight}: r={rank.r}, scale={rank.scale:g}" for weight, rank in self.ranks.items())
        dropout = [f"dropout={self.dropout:g}"] if self.dropout else []
        return "; ".join([*ranks, *["w3 shares a with w1"] * self.share, *dropout])


class RouterAdapter(nn.Module):
    """Factors for the weight of a :class:`moesaic.TopKRouter`: it adds ``scale * (x a^T) b^T`` to the logits.

    Args:
        router: whose weight this is.
        rank: the rank and the scale.
        dropout: as that of :class:`ExpertsAdapter`.

    Attributes:
        a: ``[r, D]``.
        b: ``[E, r]``.
    """

    def __init__(self, router: Any, rank: Rank, *, dropout: float = 0.0, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_dropout(dropout)
        self.dropout = dropout
        check_int("r", rank.r)
        if rank.r < 1:
            raise ValueError(f"r: must be at least 1, got {rank.r}")
        self.rank = rank
        (E, D), options = router.weight.shape, {"device": router.weight.device, "dtype": dtype or router.weight.dtype}
        self.a = nn.Parameter(torch.empty(rank.r, D, **options))
        self.b = nn.Parameter(torch.empty(E, rank.r, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As :meth:`ExpertsAdapter.reset_parameters`."""
        check_generators(self)
        nn.init.uniform_(self.a, -(bound := 1 / math.sqrt(self.a.shape[1])), bound)
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> Tensor:
        """What is added to the logits ``[T, E]``, computed in ``dtype``.

        ``keys [T]`` decide what is dropped; None drops nothing.
        """
        if keys is not None:
            columns = torch.arange(x.shape[1], device=x.device)
            x = dropped(x, kept(keys, columns, ROUTER, self.dropout), self.dropout)
        return self.rank.scale * nn.functional.linear(gate_logits(x, self.a, dtype), self.b.to(dtype))

    def extra_repr(self) -> str:
        dropout = f", dropout={self.dropout:g}" if self.dropout else ""
        return f"r={self.rank.r}, scale={self.rank.scale:g}{dropout}"


def add_adapter(owner: Any, name: str, adapter: ExpertsAdapter | RouterAdapter) -> None:
    """Give :class:`moesaic.GroupedExperts` or a :class:`moesaic.TopKRouter` an adapter. It is the active one then.

    Raises:
        ValueError: there is one of this name, or the name is not that of a module.
    """
    if not name or "." in name:
        raise ValueError(f"name: got {name!r}; give a name without dots")
    if owner.adapters is None:
        owner.adapters = nn.ModuleDict()
    if name in owner.adapters:
        raise ValueError(f"name: there is an adapter {name!r} already; choose another name")
    owner.adapters[name] = adapter
    owner.active_adapter = name


def active_adapter(owner: Any) -> Any:
    """The adapter that is active, or None. What peft has put around a layer has none of ours."""
    adapters = getattr(owner, "adapters", None)
    return None if adapters is None or owner.active_adapter is None else adapters[owner.active_adapter]


def dropout_of(owner: Any) -> float:
    """The dropout of the adapter that is active; 0 without one, and in evaluation mode."""
    adapter = active_adapter(owner)
    return 0.0 if adapter is None or not owner.training else adapter.dropout


def _check_ranks(experts: Any, ranks: Mapping[str, Rank], share: bool) -> None:
    have = [weight for weight in WEIGHTS if getattr(experts, weight) is not None]
    if not ranks or not set(ranks) <= set(have):
        raise ValueError(f"ranks: got {sorted(ranks)}; give ranks for some of the weights {have}")
    for weight, rank in ranks.items():
        check_int(f"ranks[{weight!r}].r", rank.r)
        if rank.r < 1:
            raise ValueError(f"ranks: the rank of {weight!r} must be at least 1, got {rank.r}")
    if share and not (ranks.keys() >= {"w1", "w3"} and ranks["w1"].r == ranks["w3"].r):
        raise ValueError(f"share: w1 and w3 can share a factor if both have one rank, got {dict(ranks)}")
