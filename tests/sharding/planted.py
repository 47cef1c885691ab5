"""Small operators with rules, right and wrong, for the tests of the proof."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard

import moesaic
from moesaic.sharding.decide import RULES, overload_of
from moesaic.sharding.rule import AxisRule, PlacementTable, Rule

R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)
P, AVG, MAX, MIN = Partial(), Partial("avg"), Partial("max"), Partial("min")
_numbers = itertools.count()


def define(schema: str, function: Callable[..., Any]) -> torch.library.CustomOpDef:
    """A new operator; its function does for real and for meta tensors."""
    op = torch.library.custom_op(f"moesaic_planted::op{next(_numbers)}", function, mutates_args=(), schema=schema)
    op.register_fake(function)
    return op


def define_with_keywords(schema: str, function: Callable[..., Any]) -> torch._ops.OpOverload:
    """The same, of tensors that are keyword-only, which ``custom_op`` does not take."""
    name = f"op{next(_numbers)}"
    torch.library.define(f"moesaic_planted::{name}", schema)
    torch.library.impl(f"moesaic_planted::{name}", ["CPU", "Meta"])(function)
    return getattr(torch.ops.moesaic_planted, name).default


def ruled(schema: str, function: Callable[..., Any], *lines: str, **options: Any) -> torch.library.CustomOpDef:
    """A new operator with a rule."""
    return moesaic.sharding_rule(*lines, **options)(define(schema, function))


def without_partial(op: torch.library.CustomOpDef) -> torch.library.CustomOpDef:
    """Its rule says that a sum over ranks is whole on each of them."""

    class Broken(Rule):
        def placements(self, line=None):
            table = super().placements(line)
            whole = [AxisRule(r.name, r.inputs, tuple(R if p == P else p for p in r.outputs), r.factor) for r in table]
            return PlacementTable(whole, table.line, table.tensors, table.results)

    rule = RULES[overload_of(op)]
    RULES[overload_of(op)] = Broken(**vars(rule))
    return op


def no_false_alarm(op: Any, *args: Any, **options: Any) -> None:
    """Prove an operator whose rule is right."""
    report = moesaic.prove(op, *args, **options)
    assert report.ok, f"{report}"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


ONE = "(Tensor x) -> Tensor"
TWO = "(Tensor x, Tensor w) -> Tensor"
BIASED = "(Tensor x, Tensor w, Tensor bias) -> Tensor"
PAIR = "(Tensor x) -> (Tensor, Tensor)"


def matmul(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


def affine(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return x @ w + bias


def total(x: Tensor) -> Tensor:
    return x.sum(1)


def total_with_term(x: Tensor, term: Tensor) -> Tensor:
    return (x + term.unsqueeze(1)).sum(1)


def mean(x: Tensor) -> Tensor:
    return x.mean(1)


def largest(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_full((x.shape[0], 1), -float("inf"))], 1).amax(1)


def relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def softmax(x: Tensor) -> Tensor:
    return x.softmax(1)


def softmax_along(x: Tensor, dim: int) -> Tensor:
    return x.softmax(dim)


def totals_of_both(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sum(1), x.sum(0)


def totals_of_blocks(x: Tensor, like: Tensor) -> Tensor:
    return x.unflatten(0, (like.shape[0], -1)).sum(1)


def differentiable(op: torch.library.CustomOpDef, backward: Callable[..., Any]) -> torch.library.CustomOpDef:
    """The operator with a gradient for each of its inputs: ``backward(grad, *inputs)``."""

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    op.register_autograd(lambda ctx, grad: backward(grad, *ctx.saved_tensors), setup_context=save)
    return op


def cross_entropy(x: Tensor, ids: Tensor) -> Tensor:
    """The mean over tokens."""
    if x.device.type == "meta":
        return x.new_empty(())
    return torch.nn.functional.cross_entropy(x, ids)


def largest_of_chosen(x: Tensor, ids: Tensor) -> Tensor:
    """It has no value where there are no tokens."""
    return x.new_empty(()) if x.device.type == "meta" else x.gather(1, ids[:, None]).amax()


def twice_but_not_of_nothing(grad: Tensor, x: Tensor) -> Tensor:
    """A kernel that is launched with an empty grid."""
    torch._check(x.device.type == "meta" or x.shape[0] > 0, lambda: "kernel launched with an empty grid")
    return grad * 2


def masked_scores(fill: float) -> Callable[..., Tensor]:
    """Scores that depend on the place of a row, and what a mask hides filled in."""

    def scores(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(q.shape[0], dtype=q.dtype, device=q.device)
        return (q @ k.mT + places[:, None] * 0.1).masked_fill(~mask, fill)

    return scores


def within_capacity(x: Tensor, ids: Tensor, capacity: int) -> Tensor:
    """An expert takes so many tokens; what comes after them is dropped."""
    if x.device.type == "meta":
        return torch.empty_like(x)
    chosen = torch.nn.functional.one_hot(ids, 8)
    return x * ((chosen.cumsum(0) * chosen).sum(1) <= capacity)[:, None]


def in_window(x: Tensor, window: int) -> Tensor:
    """Sums over the rows before, where there are more than fit into the window."""
    if x.shape[0] <= window:
        return x * 1
    return x + torch.cat([torch.zeros_like(x[:window]), x[:-window]])


def inside(dtype: torch.dtype) -> Callable[..., Tensor]:
    """A product computed in this dtype, whatever it is given."""
    return lambda x, w: (x.to(dtype) @ w.to(dtype)).to(x.dtype)
