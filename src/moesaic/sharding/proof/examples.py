"""Calls to be proved: examples of the user, checked to be telling, and smaller ones made of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moesaic.sharding.decide import is_tensor
from moesaic.sharding.notation import Dim, Notation, Pattern
from moesaic.sharding.rule import Rule
from moesaic.sharding.sizes import factor_sizes

Op = torch._ops.OpOverload


@dataclass(frozen=True)
class Example:
    """A call ``op(*args)`` on plain tensors.

    Attributes:
        line: of the rule, which speaks for it; without a rule, a line in which every size is a factor.
        narrowed: whether it was made of another one.
        whole: whether its floating values are small whole numbers.
    """

    op: Op
    args: tuple[Any, ...]
    line: Notation | None = None
    narrowed: bool = False
    whole: bool = False

    @property
    def positions(self) -> list[int]:
        return [i for i, a in enumerate(self.args) if isinstance(a, Tensor)]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.args[i] for i in self.positions]

    @property
    def names(self) -> list[str]:
        return [self.op._schema.arguments[i].name for i in self.positions]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(t.shape) for t in self.tensors)

    def arguments(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments with other tensors."""
        args = list(self.args)
        for position, t in zip(self.positions, tensors, strict=True):
            args[position] = t
        return tuple(args)

    def run(self, tensors: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """The results, as a tuple also where there is one."""
        results = self.op(*(self.args if tensors is None else self.arguments(tensors)))
        return (results,) if isinstance(results, Tensor) else tuple(results)


def check_op(op: Op) -> None:
    """Refuse an operator that no DTensor rule can be about."""
    if op._schema.is_mutable:
        raise ValueError(f"{op._name} mutates an argument. On ranks it would change copies, so prove() refuses it")
    for result in op._schema.returns:
        if not isinstance(result.type, torch.TensorType):
            raise ValueError(f"{op._name} returns {result.type}; only tensors have placements")
    for argument in op._schema.arguments:
        if argument.kwarg_only and isinstance(argument.type, torch.TensorType):
            raise ValueError(
                f"{op._name}: the tensor {argument.name} is keyword-only, and prove() takes positional arguments only: "
                "make it positional in the schema"
            )


def check_inputs(op: Op, args: Sequence[Any]) -> None:
    """Refuse inputs with which a wrong rule could pass by accident.

    Raises:
        ValueError: naming the argument.
    """
    arguments = op._schema.arguments
    if len(args) > len(arguments):
        raise ValueError(f"{op._name} takes {len(arguments)} arguments, but {len(args)} were given")
    for argument, value in zip(arguments, args, strict=False):
        name = f"{op._name}: {argument.name}"
        if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            raise ValueError(f"{name} is a list of tensors; DTensor has no placements for the tensors of a list")
        if is_tensor(argument.type) and not isinstance(value, Tensor | None):
            raise ValueError(f"{name} is a tensor argument, but {type(value).__name__} was given")
        if isinstance(value, DTensor):
            raise ValueError(f"{name} is a DTensor; give plain tensors: prove() shards them itself")
        if isinstance(value, Tensor) and value.is_floating_point() and (problem := _degenerate(value)):
            raise ValueError(
                f"{name} {problem}: a wrong rule might pass. Give random values, such as torch.randn makes"
            )


def check_numbers(example: Example) -> None:
    """Refuse integers that are all the same, such as equal sizes of groups: each rank's part is like any other.

    Raises:
        ValueError: naming the argument.
    """
    assert example.line is not None
    for name, t, pattern in zip(example.names, example.tensors, example.line.inputs, strict=True):
        read = not (t.is_floating_point() or t.is_complex() or pattern.shape_only)
        if read and t.numel() > 1 and bool((t == t.flatten()[0]).all()):
            raise ValueError(
                f"{example.op._name}: {name} is constant: a wrong rule might pass. Give distinct values first, and "
                "constant ones, such as groups that are all empty, in also="
            )


def _degenerate(t: Tensor) -> str | None:
    if t.numel() < 2:
        return None
    if bool((t == t.flatten()[0]).all()):
        return "is constant"
    for dim, size in enumerate(t.shape):
        slices = t.movedim(dim, 0).flatten(1) if t.ndim > 1 else t.unsqueeze(1)
        # Of the half types' few values even random ones coincide.
        if slices.shape[1] * t.dtype.itemsize >= 4 and slices.unique(dim=0).shape[0] < size:
            return f"has equal slices along dim {dim}"
    for i, j in combinations(range(t.ndim), 2):
        if t.shape[i] == t.shape[j] > 1 and torch.equal(t, t.transpose(i, j)):
            return f"is symmetric in dims {i} and {j}"
    return None


def check_fake(example: Example) -> None:
    """Refuse an operator whose results DTensor cannot know the shapes of.

    Raises:
        ValueError: with what the operator says.
    """
    try:
        example.run([t.to("meta") for t in example.tensors])
    except Exception as error:
        raise ValueError(
            f"{example.op._name} does not work on meta tensors, from which DTensor learns the shapes of results. "
            f"Give it a fake kernel with register_fake ({first_line(error)})"
        ) from error


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def with_line(example: Example, rule: Rule | None) -> Example:
    """The example with the line of the rule that speaks for it.

    Raises:
        ValueError: there is a rule, and none of its lines fits.
    """
    tensors = [a for i, a in enumerate(example.args) if is_tensor(example.op._schema.arguments[i].type)]
    if rule is not None:
        results = [r.shape for r in example.run()]
        tensors += [None] * (len(rule.tensors) - len(tensors))
        present = [t is not None for t in tensors]
        for line in rule.lines:
            if factor_sizes(line.given(present), example.shapes, results) is not None:
                return replace(example, line=line.given(present))
        given = ", ".join(f"{n} {list(s)}" for n, s in zip(example.names, example.shapes, strict=True))
        lines = "\n".join(f"  {line}" for line in rule.lines)
        shapes = ", ".join(str(list(r)) for r in results)
        raise ValueError(f"{example.op._name}: no line of its rule fits the shapes {given} -> {shapes}:\n{lines}")
    by_size = tuple(Pattern(tuple(Dim((f"size{n}",) if n != 1 else ()) for n in shape)) for shape in example.shapes)
    return replace(example, line=Notation("", by_size, (), frozenset()))


def variants(example: Example, meshes: Sequence[Sequence[int]]) -> Iterator[Example]:
    """The example, and narrower ones: sizes that divide by the axes, that do not, and that are too small for them.

    Factors of integer tensors keep their sizes, for the values may count along them. So do, where there are integer
    tensors at all, factors that stay whole: sizes of groups, say, add up to a number of rows.
    """
    yield example
    line, counts = example.line, sorted({n for mesh in meshes for n in mesh})
    assert line is not None
    sizes = _sizes(line, example)
    tensors = list(zip(line.inputs, example.tensors, strict=True))
    fixed = {f for p, t in tensors if not t.is_floating_point() for f in p.factors}
    fixed |= {f for p, _ in tensors for dim in p.dims if dim.short for f in dim.factors}
    if fixed:
        fixed |= line.whole
    free = [f for f in sizes if f not in fixed]
    seen = [sizes]
    for target in _targets({f: sizes[f] for f in free}, counts):
        narrow = sizes | target
        if narrow not in seen:
            seen.append(narrow)
            args = example.arguments([_narrow(t, p, sizes, narrow) for p, t in tensors])
            yield replace(example, args=args, narrowed=True)


def _sizes(line: Notation, example: Example) -> dict[str, int]:
    if not line.text:
        return {f"size{n}": n for shape in example.shapes for n in shape if n != 1}
    sizes = factor_sizes(line, example.shapes, [r.shape for r in example.run()])
    assert sizes is not None
    return {f: n for f, n in sizes.items() if f in line.factors}


def _targets(sizes: Mapping[str, int], counts: Sequence[int]) -> Iterator[dict[str, int]]:
    """Sizes up to the given ones."""

    def divisors(size: int) -> int:
        return sum(size % n == 0 for n in counts)

    yield {f: max(range(1, s + 1), key=lambda t: (divisors(t), t)) for f, s in sizes.items() if s}
    for n in counts:
        yield {f: s - s % n for f, s in sizes.items() if s >= n}
    yield {f: max(range(1, s + 1), key=lambda t: (-divisors(t), t)) for f, s in sizes.items() if s}
    # Each factor is once of one, once of two, once of three, and at each time of another than its neighbour.
    for shift in range(3):
        yield {f: min(s, (i + shift) % 3 + 1) for i, (f, s) in enumerate(sizes.items())}


def _narrow(t: Tensor, pattern: Pattern, old: Mapping[str, int], new: Mapping[str, int]) -> Tensor:
    for dim, (names, size) in enumerate(zip((d.factors for d in pattern.dims), t.shape, strict=True)):
        if any(old[f] != new[f] for f in names if f in old):
            t = t.unflatten(dim, [old[f] for f in names]) if len(names) > 1 else t
            for i, f in enumerate(names):
                t = t.narrow(dim + i, 0, new[f])
            t = t.flatten(dim, dim + len(names) - 1)
        else:
            assert t.shape[dim] == size
    return t.contiguous()
