"""Calls to be proved: examples of the user, checked to be telling, and smaller ones made of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moesaic.sharding.decide import as_called, hint_of_spaces, is_tensor
from moesaic.sharding.notation import Dim, Notation, Pattern
from moesaic.sharding.rule import Rule
from moesaic.sharding.sizes import Shapes, factor_sizes, fit
from moesaic.sharding.when import flags_of, stands

Op = torch._ops.OpOverload


@dataclass(frozen=True)
class Example:
    """A call ``op(*args)`` on plain tensors.

    Attributes:
        line: of the rule, which speaks for it; without a rule, a line in which every size is a factor.
        narrowed: whether it was made of another one.
        whole: whether its floating values are small whole numbers.
        few_sizes: whether fewer sizes of it are tried, for another example is like it.
        once: whether narrower ones are held against the first mesh only: another example has them for all.
        brief: whether only what is admitted or may be right is looked at: another example has the same form.
        eps: of the rounding inside of the operator, where that is coarser than its dtypes.
        fakes: what the fake kernel said so far: shapes and dtypes of results, by those of the tensors; and the
            lines of the rule that fit.
    """

    op: Op
    args: tuple[Any, ...]
    line: Notation | None = None
    narrowed: bool = False
    whole: bool = False
    few_sizes: bool = False
    once: bool = False
    brief: bool = False
    eps: float = 0.0
    fakes: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional arguments, and those by keyword."""
        return as_called(self.op, self.args)

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

    def as_text(self) -> str:
        """Shapes, dtypes and flags."""
        dtypes = dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in self.tensors)
        flags = [a for i, a in enumerate(self.args) if i not in self.positions and a is not None]
        parts = [f"{', '.join(str(list(shape)) for shape in self.shapes)} {', '.join(dtypes)}", *map(repr, flags)]
        return ", ".join(parts)

    def arguments(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments with other tensors."""
        args = list(self.args)
        for position, t in zip(self.positions, tensors, strict=True):
            args[position] = t
        return tuple(args)

    def run(self, tensors: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """The results, as a tuple also where there is one."""
        args, keywords = self.call if tensors is None else as_called(self.op, self.arguments(tensors))
        results = self.op(*args, **keywords)
        return (results,) if isinstance(results, Tensor) else tuple(results)


def check_op(op: Op) -> None:
    """Refuse an operator that no DTensor rule can be about."""
    if op._schema.is_mutable:
        raise ValueError(f"{op._name} mutates an argument. On ranks it would change copies, so prove() refuses it")
    for result in op._schema.returns:
        if not isinstance(result.type, torch.TensorType):
            raise ValueError(f"{op._name} returns {result.type}; only tensors have placements")


def with_keywords(op: Op, args: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[Any, ...]:
    """Arguments in the order of the schema, where some are given by name; up to the last that is given.

    Raises:
        TypeError: a name is no argument's.
        ValueError: there are too many, or one has no value.
    """
    arguments, given = op._schema.arguments, dict(enumerate(args))
    if len(args) > len(arguments):
        raise ValueError(f"{op._name} takes {len(arguments)} arguments, but {len(args)} were given")
    places = {a.name: i for i, a in enumerate(arguments)}
    for name, value in keywords.items():
        if name not in places:
            raise TypeError(
                f"prove() has no option {name!r}, and {op._name} no argument of this name; it has {', '.join(places)}"
            )
        # What also= gives by position is another value than that of all examples.
        given.setdefault(places[name], value)
    for i in range(max(given, default=-1) + 1):
        if i not in given and not (arguments[i].has_default_value() or is_optional(arguments[i].type)):
            raise ValueError(f"{op._name}: no value for argument {arguments[i].name!r}")
    return tuple(given.get(i, arguments[i].default_value) for i in range(max(given, default=-1) + 1))


def is_optional(kind: Any) -> bool:
    """Whether an argument of this schema type may be None."""
    return isinstance(kind, torch.OptionalType)


def check_inputs(op: Op, args: Sequence[Any]) -> None:
    """Refuse inputs with which a wrong rule could pass by accident.

    Raises:
        ValueError: naming the argument.
    """
    for argument, value in zip(op._schema.arguments, args, strict=False):
        name = f"{op._name}: {argument.name}"
        if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            raise ValueError(f"{name} is a list of tensors; DTensor has no placements for the tensors of a list")
        if is_tensor(argument.type) and not isinstance(value, Tensor | None):
            raise ValueError(f"{name} is a tensor argument, but {type(value).__name__} was given")
        if isinstance(value, DTensor):
            raise ValueError(f"{name} is a DTensor; give plain tensors: prove() shards them itself")
        if isinstance(value, Tensor) and has_fractions(value) and (problem := _degenerate(value)):
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
        read = not (has_fractions(t) or pattern.shape_only)
        if read and t.numel() > 1 and bool((t == t.flatten()[0]).all()):
            raise ValueError(
                f"{example.op._name}: {name} is constant: a wrong rule might pass. Give distinct values first, and "
                "constant ones, such as groups that are all empty, in also="
            )


def silent_results(examples: Sequence[Example]) -> list[str]:
    """The results that could show no error, for they are zero or not a number everywhere, say, and how they are.

    Raises:
        ValueError: there is no other.
    """
    op, of_examples = examples[0].op, [example.run() for example in examples]
    silent = []
    for i, results in enumerate(zip(*of_examples, strict=True)):
        if not any(map(_tells, results)):
            name = op._schema.returns[i].name or (f"result {i}" if len(of_examples[0]) > 1 else "the result")
            silent.append(f"{name} is {results[0].flatten()[0].item()} everywhere")
    if len(silent) == len(of_examples[0]):
        raise ValueError(f"{op._name}: {', '.join(silent)}: a wrong rule might pass. Give inputs of which it is not")
    return silent


def _tells(t: Tensor) -> bool:
    """Whether it could be wrong: it has several values, or one that is not zero. What has no elements is no result."""
    t = t.flatten()
    if t.numel() == 0:
        return True
    return bool((t != t[0]).logical_and(~(t.isnan() & t[0].isnan())).any()) if t.numel() > 1 else _is_number(t)


def _is_number(t: Tensor) -> bool:
    return bool((t.isfinite() & (t != 0)).any())


def _degenerate(t: Tensor) -> str | None:
    if t.numel() < 2:
        return None
    if bool((t == t.flatten()[0]).all()):
        return "is constant"
    for dim, size in enumerate(t.shape):
        slices = t.movedim(dim, 0).flatten(1) if t.ndim > 1 else t.unsqueeze(1)
        # Of the half types' few values even random ones coincide.
        slices = torch.view_as_real(slices).flatten(1) if t.is_complex() else slices
        if slices.shape[1] * t.dtype.itemsize >= 4 and slices.unique(dim=0).shape[0] < size:
            return f"has equal slices along dim {dim}"
    for i, j in combinations(range(t.ndim), 2):
        if t.shape[i] == t.shape[j] > 1 and torch.equal(t, t.transpose(i, j)):
            return f"is symmetric in dims {i} and {j}"
    return None


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def with_line(example: Example, rule: Rule | None) -> Example:
    """The example with the line of the rule that speaks for it.

    Raises:
        ValueError: there is a rule, and none of its lines fits.
    """
    if rule is not None:
        results = [r.shape for r in example.run()]
        if (line := line_for(example, rule, results)) is not None:
            return replace(example, line=line)
        given = ", ".join(f"{n} {list(s)}" for n, s in zip(example.names, example.shapes, strict=True))
        lines = "\n".join(f"  {line}" for line in rule.lines)
        shapes = ", ".join(str(list(r)) for r in results)
        unsaid = replace(rule, lines=tuple(replace(line, when=()) for line in rule.lines))
        if line_for(example, unsaid, results) is not None:
            raise ValueError(f"{example.op._name}: its rule does not stand for the flags of the example:\n{rule}")
        hint = hint_of_spaces(rule, example.shapes)
        raise ValueError(f"{example.op._name}: no line of its rule fits the shapes {given} -> {shapes}:\n{lines}{hint}")
    by_size = tuple(Pattern(tuple(Dim((f"size{n}",) if n != 1 else ()) for n in shape)) for shape in example.shapes)
    return replace(example, line=Notation("", by_size, (), frozenset()))


def line_for(example: Example, rule: Rule, results: Shapes) -> Notation | None:
    """The line that speaks for a call, without the tensors that are not given; None if none does."""
    tensors = [a for i, a in enumerate(example.args) if is_tensor(example.op._schema.arguments[i].type)]
    present = [t is not None for t in tensors]
    present += [False] * (len(rule.tensors) - len(tensors))
    flags = flags_of(example.op, example.args, {})
    lines = (line.given(present) for line in rule.lines if stands(line, flags))
    fitting = (fit(line, example.shapes, results) for line in lines)
    return next((line for line, _ in filter(None, fitting)), None)


def variants(example: Example, meshes: Sequence[Sequence[int]], constants: Sequence[int] = ()) -> Iterator[Example]:
    """The example, and narrower ones: sizes that divide by the axes, that do not, and that are too small for them.

    Where the operator has constants, such as the size of a window, there are sizes around them as well.
    """
    yield example
    line, counts = example.line, sorted({n for mesh in meshes for n in mesh})
    assert line is not None
    sizes = sizes_of(line, example)
    tensors = list(zip(line.inputs, example.tensors, strict=True))
    fixed = fixed_factors(line, example)
    free = [f for f in sizes if f not in fixed]
    seen = [sizes]
    targets = list(_targets({f: sizes[f] for f in free}, counts, constants))
    # Of these and those above, one is the whole and a shard of two ranks is the next: a threshold lies between the two.
    thresholds = [{f: min(sizes[f], n) for f in free} for n in (8, 5)]
    targets[-4:-4] = thresholds
    # Of a call that is like another in all but a tensor, a flag or values: uneven sizes, and small ones.
    for target in targets[-4:-2] if example.few_sizes else targets:
        narrow = sizes | target
        once = example.once or target in thresholds
        if narrow not in seen:
            seen.append(narrow)
            args = example.arguments([_narrow(t, p, sizes, narrow) for p, t in tensors])
            yield replace(example, args=args, narrowed=True, once=once)


def fixed_factors(line: Notation, example: Example) -> set[str]:
    """Factors that keep their sizes.

    The values of an integer tensor may count along its dims or others: sizes of groups, say, add up to a number of
    rows. A rule that lets a factor be cut says that they do not count along this one: a rank has a part of it, and
    calls the operator all the same. So where there is an integer tensor, only what stays whole is fixed; and without a
    rule, all dims of that tensor. So are the factors of dims that end early, which would not be blocks any more.
    """
    tensors = list(zip(line.inputs, example.tensors, strict=True))
    counting = {f for p, t in tensors if not has_fractions(t) for f in p.factors}
    short = {
        f
        for p, t in tensors
        for dim, size in zip(p.dims, t.shape, strict=True)
        if dim.short and size != _full_size(dim, line, example)
        for f in dim.factors
    }
    if not line.text:
        return counting
    return short | (set(line.whole) if short or any(not has_fractions(t) for t in example.tensors) else set())


def _full_size(dim: Dim, line: Notation, example: Example) -> int:
    sizes = sizes_of(line, example)
    return prod(sizes[f] for f in dim.factors)


def has_fractions(t: Tensor) -> bool:
    """Whether its values are numbers with fractions, real or complex."""
    return t.is_floating_point() or t.is_complex()


def sizes_of(line: Notation, example: Example) -> dict[str, int]:
    """The size of each factor; without a rule, of each size."""
    if not line.text:
        return {f"size{n}": n for shape in example.shapes for n in shape if n != 1}
    sizes = factor_sizes(line, example.shapes, [r.shape for r in example.run()])
    assert sizes is not None
    return {f: n for f, n in sizes.items() if f in line.factors}


def _targets(sizes: Mapping[str, int], counts: Sequence[int], constants: Sequence[int]) -> Iterator[dict[str, int]]:
    """Sizes up to the given ones."""

    def divisors(size: int) -> int:
        return sum(size % n == 0 for n in counts)

    yield {f: max(range(1, s + 1), key=lambda t: (divisors(t), t)) for f, s in sizes.items() if s}
    for n in counts:
        yield {f: s - s % n for f, s in sizes.items() if s >= n}
    for n in sorted({n for constant in constants for n in (constant - 1, constant, constant + 1)}):
        yield {f: min(s, n) for f, s in sizes.items()}
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
