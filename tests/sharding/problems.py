"""Calls of our operators to be sharded: small integers in fp64, so that every right result has the same bits.

No size divides by an axis but the number of blocks; one block is empty, another full, one group has all its rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from moesaic.ops import combine, grouped_mm, permute, sort_by_expert
from moesaic.ops.permute import Permutation
from moesaic.sharding import AxisRule, rule_of
from moesaic.sharding.admission import choices_for
from moesaic.sharding.sizes import divides, factor_sizes

ops = torch.ops.moesaic
K, N = 5, 7
BLOCKS = [[2, 0, 3], [0, 0, 0], [1, 1, 1], [0, 6, 0]]

# The forms of grouped_mm, each with the line of the rules that speaks for it and, in blocks, how many matrices there
# are: in "fewer" the last group has no expert, in "none" the last block.
LINES = {"flat": 0, "own": 1, "fewer": 1, "none": 1, "shared": 2}
NUM_WEIGHTS = {"own": 12, "fewer": 11, "none": 9, "shared": 3}


@dataclass(frozen=True)
class Problem:
    """A call ``function(*inputs)``, the operator it comes to, and the line of its rule that speaks for it."""

    function: Callable[..., Tensor]
    inputs: list[Tensor]
    op: torch._ops.OpOverloadPacket
    line: int = 0
    optional: int = 0

    def choices(self) -> list[AxisRule]:
        """What is admitted on one axis, but for the means: torch sums few of them without a collective."""
        rule = rule_of(self.op)
        present = (True,) * len(self.inputs) + (False,) * self.optional
        choices = choices_for(rule, rule.lines[self.line], present)
        return [choice for choice in choices if not choice.name.startswith("mean")]

    def combinations(self, axis_sizes: Sequence[int]) -> Iterator[tuple[AxisRule, ...]]:
        """What is admitted on a mesh."""
        line = rule_of(self.op).lines[self.line]
        present = (True,) * len(self.inputs) + (False,) * self.optional
        inputs, output = [t.shape for t in self.inputs], self.function(*self.inputs).shape
        sizes = factor_sizes(line.given(present), inputs, [output])
        assert sizes is not None
        for choices in product(self.choices(), repeat=len(axis_sizes)):
            if divides(line, sizes, choices, axis_sizes):
                yield choices

    def expected(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The result, a gradient of it, and the gradients of the inputs that have one."""
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in self.inputs]
        result = self.function(*leaves)
        grad = integers(*result.shape, seed=9)
        return result.detach(), grad, gradients(result, with_grad(leaves), grad)


def gradients(result: Tensor, leaves: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Of each leaf; zero of one whose shape alone is read."""
    return list(torch.autograd.grad(result, leaves, grad, materialize_grads=True))


def lies_as(gradient: DTensor, leaf: DTensor) -> bool:
    """As its leaf does, or is Partial where the leaf is replicated, and the other way round."""
    pairs = zip(gradient.placements, leaf.placements, strict=True)
    return all(a == b or {a, b} == {Replicate(), Partial()} for a, b in pairs)


def with_grad(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t for t in tensors if t.requires_grad]


def integers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).double()


def _grouped(op: str, form: str, *, rows: int, num_weights: int, sizes: Tensor) -> Problem:
    x, w, grad = integers(rows, K, seed=1), integers(num_weights, K, N, seed=2), integers(rows, N, seed=3)
    packet, line = getattr(ops, op), LINES[form]
    if op == "grouped_mm":
        return Problem(grouped_mm, [x, w, sizes], packet, line)
    if op == "grouped_mm_input_grad":
        return Problem(lambda *args: packet(*args, None), [grad, w, sizes], packet, line)
    only_its_shape = torch.full_like(w, torch.nan)
    return Problem(lambda *args: packet(*args, None), [x, grad, sizes, only_its_shape], packet, line)


def grouped(op: str, form: str) -> Problem:
    """``grouped_mm`` or one of its backward operators; ``form`` is one of ``LINES``."""
    if form == "flat":
        return _grouped(op, form, rows=9, num_weights=3, sizes=torch.tensor([3, 0, 4]))
    sizes = torch.tensor(BLOCKS)
    if form != "shared":
        sizes.view(-1)[NUM_WEIGHTS[form] :] = 0
    return _grouped(op, form, rows=4 * 6, num_weights=NUM_WEIGHTS[form], sizes=sizes)


def empty(op: str, form: str) -> Problem:
    """The same without a row."""
    if form == "flat":
        return _grouped(op, form, rows=0, num_weights=3, sizes=torch.tensor([0, 0, 0]))
    sizes = torch.zeros_like(torch.tensor(BLOCKS))
    return _grouped(op, form, rows=0, num_weights=NUM_WEIGHTS[form], sizes=sizes)


def permuting(op: str, *, weighted: bool = True) -> Problem:
    """``permute``, ``combine`` or ``combine_weight_grad`` of 4 tokens to 3 experts, one copy being elsewhere."""
    ids = torch.tensor([[0, 2], [2, 1], [1, -1], [2, 0]])
    permutation = sort_by_expert(ids, 3, num_rows=9)
    slots, positions, group_sizes = permutation
    tokens, rows = integers(4, K, seed=1), integers(9, K, seed=2)
    weights = [integers(4, 2, seed=3)] if weighted else []

    def call(t: Tensor, slots: Tensor, positions: Tensor, *weights: Tensor) -> Tensor:
        # The sizes have no part in it.
        return {"permute": permute, "combine": combine}[op](t, Permutation(slots, positions, group_sizes), *weights)

    packet = getattr(ops, op)
    if op == "combine_weight_grad":
        return Problem(packet, [rows, tokens, slots, positions], packet)
    first = tokens if op == "permute" else rows
    return Problem(call, [first, slots, positions, *weights], packet, optional=1 - len(weights))
