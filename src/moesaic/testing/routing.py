"""See and steer what hides in a forward pass: the choices of ``topk``, and dropout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

# Rounding errors of two orders of summation are of one size, but not equal. What differs by more than this many times
# as much counts as different. Faults differ by thousands of times as much.
MARGIN = 10.0

_TOPK = {torch.topk, Tensor.topk}
_DROPOUT = {F.dropout, torch.dropout}
_WATCHED = {*_TOPK, *_DROPOUT, torch._grouped_mm, F.scaled_dot_product_attention}


@dataclass
class Choice:
    """One call of ``topk`` on rows of scores: ``scores [T, E]`` and the chosen ``ids [T, K]``."""

    scores: Tensor
    ids: Tensor


@dataclass
class Watch(TorchFunctionMode):
    """Records every choice of ``topk`` and every dropout mask, and turns dropout off.

    Args:
        forced: choices of another run. Where a token's choice differs from the choice of the token with the nearest
            scores, and the scores are as near as ``tie``, that other choice is taken.
        tie: how far apart two scores are that count as equal.
    """

    forced: Sequence[Choice] = ()
    tie: float = 0.0
    choices: list[Choice] = field(default_factory=list)
    dropouts: list[tuple[str, str]] = field(default_factory=list)
    flips: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _WATCHED:  # nearly all: every call of torch comes here
            return func(*args, **kwargs)
        if func in _TOPK:
            return self._topk(func, args, kwargs)
        if func in _DROPOUT:
            return self._dropout(func, args, kwargs)
        if func is torch._grouped_mm and args[0].dtype == torch.float64:
            return _grouped_mm(*args, **kwargs)
        if func is F.scaled_dot_product_attention and kwargs.get("dropout_p"):
            kwargs = kwargs | {"dropout_p": 0.0}
        return func(*args, **kwargs)

    def _topk(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        ids = result[1]
        scores = args[0] if args else kwargs["input"]
        dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
        if isinstance(scores, DTensor) or not scores.is_floating_point() or dim not in (-1, scores.ndim - 1):
            return result
        with _disable_current_modes():  # a policy of selective checkpointing counts operators
            chosen = ids.detach().flatten(0, -2)
            taken = self._taken(scores.detach().flatten(0, -2), chosen)
            same = torch.equal(taken, chosen)
        if same:
            return result
        ids = taken.view_as(ids)
        return type(result)((scores.gather(-1, ids), ids))

    def _taken(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """Record a choice, and say which ids are to be taken."""
        mine = Choice(rows.clone(), chosen.clone())
        number = len(self.choices)
        self.choices.append(mine)
        if not rows.numel() or not self.forced:
            return chosen
        if number >= len(self.forced):
            # A forward pass that is repeated for the backward pass chooses as it did before.
            return next((c.ids for c in self.choices[:-1] if torch.equal(c.scores, rows)), chosen)
        theirs, at, differs = compare(mine, self.forced[number])
        tied = differs & (margins(self.forced[number], chosen.shape[-1])[at] <= self.tie)
        self.flips += int(tied.sum())
        mine.ids = torch.where(tied[:, None], theirs, chosen)
        return mine.ids

    def _dropout(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        names = ("input", "p", "training" if func is F.dropout else "train")
        given: dict[str, Any] = {"p": 0.5, "training": True, **dict(zip(names, args, strict=False)), **kwargs}
        x, p, training = given["input"], given["p"], given[names[-1]]
        if not training or not p or x.numel() == 0:
            return func(*args, **kwargs)
        local = x.to_local().detach() if isinstance(x, DTensor) else x.detach()
        with _disable_current_modes():
            self.dropouts.append((_digest(local), _digest(F.dropout(torch.ones_like(local), p) != 0)))
        return x


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, **others: Any) -> Tensor:
    """What torch's operator refuses in fp64, for rows of groups times a matrix for each, or for batches."""
    if offs is None:
        return a @ b
    if a.ndim != 2 or b.ndim != 3 or any(value is not None for value in others.values()):
        raise NotImplementedError("fp64: this form of grouped_mm is not known to a check; give exact=torch.float32")
    ends = offs.tolist()
    parts = [a[start:end] @ w for start, end, w in zip([0, *ends], ends, b, strict=False)]
    return torch.cat([*parts, a.new_zeros(len(a) - ends[-1], b.shape[-1])])


def _digest(t: Tensor) -> str:
    return str((tuple(t.shape), hash(tuple(t.double().flatten().tolist()))))


def compare(mine: Choice, other: Choice) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the other's ids, the number of the other's row with the nearest scores, and whether ids differ."""
    mine_scores, other_scores = (torch.nan_to_num(c.scores.double(), neginf=-1e4, posinf=1e4) for c in (mine, other))
    at = torch.cdist(mine_scores, other_scores).argmin(-1)
    theirs = other.ids[at]
    return theirs, at, (mine.ids.sort(-1).values != theirs.sort(-1).values).any(-1)


def margins(choice: Choice, k: int) -> Tensor:
    """By how much the last chosen score of each row is above the first that was not."""
    ordered = choice.scores.sort(-1, descending=True).values
    return ordered[:, k - 1] - ordered[:, k] if k < ordered.shape[-1] else torch.full((len(ordered),), torch.inf)


def tie_of(exact: Sequence[Choice], plain: Sequence[Choice]) -> float:
    """How near two scores may be for rounding to choose between them, from two runs of one step."""
    largest = 0.0
    for a, b in zip(exact, plain, strict=False):
        if a.scores.shape != b.scores.shape or not a.scores.numel():
            continue
        apart = (a.scores.double() - b.scores.double()).nan_to_num(0, 0, 0).abs().max()
        largest = max(largest, float(apart))
        if not torch.equal(a.ids.sort(-1).values, b.ids.sort(-1).values):
            break  # what comes after another choice says nothing of rounding
    return MARGIN * largest
