"""Whether experts can be laid over a mesh: known from numbers alone, before there are models or ranks."""

from dataclasses import replace
from typing import NamedTuple

from moesaic.parallel.mesh import MeshLayout


class Misfit(NamedTuple):
    """Why experts do not fit.

    Attributes:
        axis: ``"ep"`` or ``"etp"``.
        problem: in words.
        legal: sizes of this axis that fit, edp giving or taking what it needs.
    """

    axis: str
    problem: str
    legal: list[int]


def expert_misfit(num_experts: int, hidden_dim: int, dim: int, layout: MeshLayout) -> Misfit | None:
    """Why ``num_experts`` experts of ``[dim, hidden_dim]`` cannot lie on ``edp`` x ``ep`` x ``etp`` ranks, if so."""
    for axis in ("ep", "etp"):
        if problem := _problem(num_experts, hidden_dim, dim, layout, axis):
            ranks = layout.edp * getattr(layout, axis)
            others = {n: replace(layout, **{axis: n, "edp": ranks // n}) for n in range(1, ranks + 1) if ranks % n == 0}
            legal = [n for n, other in others.items() if not _problem(num_experts, hidden_dim, dim, other, axis)]
            return Misfit(axis, problem, legal)
    return None


def _problem(num_experts: int, hidden_dim: int, dim: int, layout: MeshLayout, axis: str) -> str | None:
    ranks, size, what = (layout.ep, num_experts, "experts") if axis == "ep" else (layout.etp, hidden_dim, "hidden dims")
    if ranks > size:
        return f"{ranks} ranks cannot share {size} {what}"
    if layout.edp > 1 and size <= -(-size // ranks) * (ranks - 1):
        return f"the last of {ranks} ranks would have none of {size} {what}, which FSDP over edp {layout.edp} refuses"
    if axis == "ep" and size % ranks and dim % layout.edp:
        cut = f"FSDP cuts the dim {dim}, which edp {layout.edp} does not divide"
        return f"{ranks} does not divide {size} experts, so {cut}"
    return None
