"""One call on one mesh: run on the part of every rank, put together, and compared with the run on the whole."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor.placement_types import Partial, Shard

from moesaic.sharding.notation import REDUCTIONS
from moesaic.sharding.proof.examples import Example, first_line, has_fractions
from moesaic.sharding.proof.fakes import misfit
from moesaic.sharding.proof.noise import EXACT, Tolerance, ordinary, tolerance
from moesaic.sharding.proof.placing import is_even, join, mesh_placements, same, split
from moesaic.sharding.rule import Placements, short

Inputs = tuple[Placements, ...]
Parts = list[list[Tensor]]

# Kinds of narrowed trials, by what shards they make of a choice of placements.
EVEN, UNEVEN, EMPTY = "even", "uneven", "empty"


@dataclass(frozen=True)
class Case:
    """A mesh, and the tensors that were laid on it: names of the arguments and global shapes."""

    mesh: tuple[int, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        shapes = ", ".join(str(list(shape)) for shape in self.shapes)
        return f"{shapes} on {' x '.join(map(str, self.mesh))} ranks"


class Trial:
    """An example on a mesh."""

    def __init__(self, example: Example, expected: Sequence[Tensor], mesh: tuple[int, ...]) -> None:
        self.example, self.expected, self.mesh = example, tuple(expected), mesh
        self.case = Case(mesh, tuple(example.names), example.shapes)
        # Whether all that was compared had to be equal; None of what was never compared.
        self.is_exact: bool | None = None
        self._allowed: dict[int, Tolerance] = {}
        self._split: dict[tuple[int, Placements], list[Tensor]] = {}
        self._last: tuple[Inputs, Parts | Exception] | None = None

    @cached_property
    def eps(self) -> float:
        """Of the coarsest rounding: of a dtype, or inside of the operator."""
        tensors = [t for t in (*self.example.tensors, *self.expected) if has_fractions(t)]
        return max([self.example.eps, *(torch.finfo(t.dtype).eps for t in tensors)])

    def tolerance(self, expected: Tensor, parts: Sequence[Tensor]) -> Tolerance:
        """How far a result may be off that is put together from the parts."""
        if not self.example.whole and id(expected) in self._allowed:
            return self._allowed[id(expected)]
        found = tolerance(expected, parts, self.eps, whole=self.example.whole)
        if any(expected is t for t in self.expected):
            self._allowed[id(expected)] = found
        self.is_exact = self.is_exact is not False and found == EXACT
        return found

    @cached_property
    def is_telling(self) -> list[bool]:
        """Whether each result could be wrong at all."""
        return [bool(torch.nan_to_num(t, posinf=0, neginf=0).any()) for t in self.expected]

    def inputs_are_even(self, inputs: Sequence[Placements]) -> bool:
        return all(is_even(shape, p, self.mesh) for shape, p in zip(self.example.shapes, inputs, strict=True))

    def kind(self, inputs: Inputs) -> str:
        """Trials of a kind are alike: each example as it was given is one; narrowed ones go by their shards."""
        if not self.example.narrowed:
            return f"given {id(self.example)}"
        if self.inputs_are_even(inputs):
            return EVEN
        parts = [part for i, p in enumerate(inputs) if self.example.tensors[i].numel() for part in self.parts_of(i, p)]
        return UNEVEN if all(part.numel() for part in parts) else EMPTY

    def output_is_even(self, i: int, placements: Placements) -> bool:
        return is_even(self.expected[i].shape, placements, self.mesh)

    def all_inputs(self) -> Iterable[Inputs]:
        """Every placement of every tensor."""
        tensors = self.example.tensors
        return product(*(list(mesh_placements(t.ndim, t.dtype, len(self.mesh))) for t in tensors))

    def all_outputs(self) -> list[list[Placements]]:
        """For each result, every placement of it."""
        return [list(mesh_placements(t.ndim, t.dtype, len(self.mesh))) for t in self.expected]

    def right(self, inputs: Inputs, candidates: Sequence[Iterable[Placements]]) -> list[set[Placements]]:
        """Which of the candidates for each result are right."""
        parts = self._run(inputs)
        if isinstance(parts, Exception):
            return [set() for _ in self.expected]
        right = []
        for i, expected in enumerate(self.expected):
            allowed = self.tolerance(expected, parts[i])
            right.append({p for p in candidates[i] if self._is(i, parts[i], p, allowed)})
        return right

    def error(self, inputs: Inputs, outputs: Sequence[Placements]) -> str | None:
        """What is wrong with the results where they are said to be ``outputs``; None if they are right."""
        parts = self._run(inputs)
        if isinstance(parts, Exception):
            return f"the operator raised {type(parts).__name__}: {parts}"
        if len(outputs) != len(parts):
            return f"{len(parts)} results, {len(outputs)} placements"
        if problem := self._misfit_of_fake(inputs, parts):
            return problem
        for i, placements in enumerate(outputs):
            if not self._is(i, parts[i], placements, self.tolerance(self.expected[i], parts[i])):
                name = f"result {i}: " if len(parts) > 1 else ""
                return name + self._explain(i, parts[i], placements, inputs)
        return None

    def parts_of(self, i: int, placements: Placements) -> list[Tensor]:
        """The parts of tensor ``i``."""
        key = (i, placements)
        if key not in self._split:
            self._split[key] = split(self.example.tensors[i], placements, self.mesh, seed=i)
        return self._split[key]

    def forget(self) -> None:
        """Drop the parts, which are as large as the tensors, each time over."""
        self._split, self._last = {}, None

    def _run(self, inputs: Inputs) -> Parts | Exception:
        """For each result, its parts on all ranks."""
        if self._last is None or self._last[0] != inputs:
            self._last = (inputs, self._run_on_parts(inputs))
        return self._last[1]

    def _run_on_parts(self, inputs: Inputs) -> Parts | Exception:
        split_inputs = [self.parts_of(i, p) for i, p in enumerate(inputs)]
        for shards in zip(*split_inputs, strict=True):
            if error := self._misfit([t.shape for t in shards]):
                return error
        try:
            results = [self.example.run([parts[rank] for parts in split_inputs]) for rank in range(prod(self.mesh))]
        except Exception as error:
            return error
        return [list(parts) for parts in zip(*results, strict=True)]

    def _misfit(self, shapes: Sequence[Sequence[int]]) -> ValueError | None:
        """Why a rank's shards are no call: a factor or blocks have two sizes; a kernel might read past the end."""
        line = self.example.line
        sizes: dict[str, int] = {}
        for pattern, shape in zip(line.inputs, shapes, strict=True) if line and line.text else ():
            for dim, size in zip(pattern.dims, shape, strict=True):
                if dim.factors and sizes.setdefault(str(dim), size) != size:
                    return ValueError(f"shards do not fit together: {dim} is both {sizes[str(dim)]} and {size}")
        return None

    def _misfit_of_fake(self, inputs: Inputs, parts: Parts) -> str:
        """What the fake kernel says wrongly of a rank's call; torch.compile would ask it."""
        split_inputs = [self.parts_of(i, p) for i, p in enumerate(inputs)]
        for rank in range(prod(self.mesh)):
            shards = [of_tensor[rank] for of_tensor in split_inputs]
            try:
                problem = misfit(self.example, shards, [of_result[rank] for of_result in parts])
            except Exception as error:
                problem = f"it raises {type(error).__name__}: {first_line(error)}"
            if problem:
                return f"the fake kernel is wrong for shards {', '.join(str(list(t.shape)) for t in shards)}: {problem}"
        return ""

    def _is(self, i: int, parts: Sequence[Tensor], placements: Placements, allowed: Tolerance) -> bool:
        value = join(parts, placements, self.mesh, allowed)
        return value is not None and same(value, self.expected[i], allowed)

    def _explain(self, i: int, parts: Sequence[Tensor], placements: Placements, inputs: Inputs) -> str:
        said, expected = show(placements), self.expected[i]
        value = join(parts, placements, self.mesh, self.tolerance(expected, parts))
        if value is None:
            problem = f"ranks have {', '.join(str(list(p.shape)) for p in parts)}, which is not {said}"
            if all(p.shape == parts[0].shape for p in parts):
                problem = f"ranks differ, which is not {said}"
        elif value.shape != expected.shape:
            problem = f"{said} of shape {list(value.shape)}, expected {list(expected.shape)}"
        else:
            where = furthest(value, expected)
            got, wanted = value[where].item(), expected[where].item()
            problem = f"as {said}, got {got:.4g} at {list(where)}, expected {wanted:.4g}"
        right = self.right(inputs, self.all_outputs())[i]
        return problem + (f" (right is {show(plainest(right))})" if right else "")


def furthest(value: Tensor, expected: Tensor) -> tuple[int, ...]:
    """Where a value is off most, for its size: next to what a mask fills in, other values are small."""
    kind = torch.complex128 if value.is_complex() or expected.is_complex() else torch.float64
    value, expected = value.to(kind), expected.to(kind)
    off = (value - expected).abs() / (expected.abs() + ordinary(expected))
    off[(value == expected) | (value.isnan() & expected.isnan())] = 0
    return tuple(int(j) for j in torch.unravel_index(off.nan_to_num(float("inf")).argmax(), off.shape))


def plainest(placements: Iterable[Placements]) -> Placements:
    """Of several right placements the one that says most: replicated, then sharded, then reduced."""
    return min(placements, key=_plainness)


def _plainness(placements: Placements) -> list[tuple[int, int]]:
    ranks = []
    for p in placements:
        if isinstance(p, Partial):
            ranks.append((2, REDUCTIONS.index(p.reduce_op)))
        else:
            ranks.append((1, p.dim) if isinstance(p, Shard) else (0, 0))
    return ranks


def show(placements: Placements) -> str:
    """``S(0)`` on one axis, ``[S(0), R]`` on two."""
    names = ", ".join(map(short, placements))
    return names if len(placements) == 1 else f"[{names}]"
