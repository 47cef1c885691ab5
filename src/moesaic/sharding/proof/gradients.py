"""Gradients through real DTensors on simulated ranks, compared with those of one process."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial, Replicate

from moesaic.sharding.admission import ShardingError
from moesaic.sharding.internals import parts_of
from moesaic.sharding.proof.examples import first_line, has_fractions
from moesaic.sharding.proof.placing import join, same
from moesaic.sharding.proof.trial import Inputs, Trial, show
from moesaic.sharding.rule import Placements
from moesaic.sharding.simulated import Ranks, count_collectives


class _Wrong(Exception):
    """What is wrong."""


@dataclass(frozen=True)
class OneProcess:
    """The run that all are compared with.

    Attributes:
        results: which of the results have a gradient.
        grads_in: a gradient of each of these.
        grads: of the floating inputs; None for one that has none.
    """

    results: list[int]
    grads_in: list[Tensor]
    grads: list[Tensor | None]


def one_process(trial: Trial) -> OneProcess | str:
    """The gradients of a call, or why there are none."""
    leaves = [t.detach().clone().requires_grad_(has_fractions(t)) for t in trial.example.tensors]
    generator = torch.Generator().manual_seed(0)
    try:
        with warnings.catch_warnings():
            # That is how torch tells of an operator without a formula.
            warnings.simplefilter("error")
            results = trial.example.run(leaves)
            which = [i for i, r in enumerate(results) if r.requires_grad]
            if not which:
                return "its results do not require a gradient"
            grads_in = [_random(results[i], generator, whole=trial.example.whole) for i in which]
            grads = torch.autograd.grad([results[i] for i in which], _floating(leaves), grads_in, allow_unused=True)
    except (RuntimeError, NotImplementedError, UserWarning) as error:
        return first_line(error)
    return OneProcess(which, grads_in, list(grads))


def _random(like: Tensor, generator: torch.Generator, *, whole: bool) -> Tensor:
    if whole:
        return torch.randint(-3, 4, like.shape, generator=generator).to(like)
    kind = torch.complex128 if like.is_complex() else torch.float64
    return torch.randn(like.shape, generator=generator, dtype=kind).to(like)


@dataclass(frozen=True)
class Verdict:
    """What the gradients are like.

    Attributes:
        error: what is wrong.
        moved: the collectives that were called.
        refused: why there is none: the rule of an operator in the gradient does not admit where it arrives.
    """

    error: str = ""
    moved: str = ""
    refused: str = ""


def judge_gradients(ranks: Ranks, trial: Trial, inputs: Inputs, outputs: Inputs, alone: OneProcess) -> Verdict:
    """The gradients where the inputs lie as ``inputs`` and the results as ``outputs``.

    A gradient comes as its result lies, but replicated where that is ``Partial``; and from a sum it comes replicated.
    """
    as_results = [tuple(Replicate() if isinstance(p, Partial) else p for p in outputs[i]) for i in alone.results]
    replicated = [(Replicate(),) * len(trial.mesh)] * len(as_results)
    moved: dict[str, None] = {}
    refused = ""
    try:
        for placements in [as_results] if as_results == replicated else [as_results, replicated]:
            came_as = f" of a gradient that is {', '.join(map(show, placements))}"
            tensors = zip(trial.example.tensors, inputs, strict=True)
            leaves = [ranks.place(t, p, seed=i) for i, (t, p) in enumerate(tensors)]
            leaves = [t.requires_grad_(has_fractions(t)) for t in leaves]
            with _step("the call", moved):
                results = trial.example.run(leaves)
            for ours, expected, p in zip(results, trial.expected, outputs, strict=True):
                _compare("the result", trial, ours, expected, p)
            grads_in = [ranks.place(g, p) for g, p in zip(alone.grads_in, placements, strict=True)]
            try:
                with _step("the backward" + came_as, moved):
                    grads = torch.autograd.grad(
                        [results[i] for i in alone.results], _floating(leaves), grads_in, allow_unused=True
                    )
            except _Wrong as error:
                if not isinstance(error.__cause__, ShardingError):
                    raise
                # Nothing is computed wrongly.
                refused = refused or str(error)
                continue
            names = [n for n, t in zip(trial.example.names, leaves, strict=True) if t.requires_grad]
            for name, ours, expected in zip(names, grads, alone.grads, strict=True):
                if expected is not None:
                    whose = f"the gradient of {name}, from the backward{came_as},"
                    _compare(whose, trial, ours, expected)
    except _Wrong as error:
        return Verdict(error=str(error))
    return Verdict(moved="\n".join(moved), refused=refused)


def judge_through_dtensor(ranks: Ranks, trial: Trial, inputs: Inputs) -> Verdict:
    """The results of the call on DTensors, replicated: all that DTensor's own dispatch does is done."""
    tensors = zip(trial.example.tensors, inputs, strict=True)
    try:
        results = trial.example.run([ranks.place(t, p, seed=i) for i, (t, p) in enumerate(tensors)])
        results = [_replicated(r) for r in results]
    except Exception as error:
        return Verdict(refused=first_line(error))
    try:
        for i, (ours, expected) in enumerate(zip(results, trial.expected, strict=True)):
            _compare(f"result {i}", trial, ours, expected)
    except _Wrong as error:
        return Verdict(error=str(error))
    return Verdict()


def _replicated(t: Tensor) -> Tensor:
    assert isinstance(t, DTensor)
    # Sums first: torch's own kind of them does not know of shards that were gathered meanwhile.
    for axis in sorted(range(t.device_mesh.ndim), key=lambda axis: not t.placements[axis].is_partial()):
        t = t.redistribute(placements=[*t.placements[:axis], Replicate(), *t.placements[axis + 1 :]])
    return t


@contextlib.contextmanager
def _step(name: str, moved: dict[str, None]) -> Iterator[None]:
    try:
        with count_collectives() as counts:
            yield
    except Exception as error:
        raise _Wrong(f"{name} raised {type(error).__name__}: {error}") from error
    if counts:
        moved[f"{name} communicates: {', '.join(f'{n} {op}' for op, n in counts.items())}"] = None


def _compare(name: str, trial: Trial, ours: object, expected: Tensor, placements: Placements | None = None) -> None:
    if not isinstance(ours, DTensor):
        raise _Wrong(f"{name} is {type(ours).__name__}, not a DTensor")
    if placements is not None and ours.placements != placements:
        raise _Wrong(f"{name} is {show(ours.placements)}, the rule says {show(placements)}")
    parts = parts_of(ours)
    allowed = trial.tolerance(expected, parts)
    value = join(parts, ours.placements, tuple(ours.device_mesh.shape), allowed)
    if value is None:
        raise _Wrong(f"{name} says it is {show(ours.placements)}, but its parts are not")
    if not same(value, expected, allowed):
        off = f"off by {float((value - expected).abs().max()):.4g}" if value.shape == expected.shape else "misshapen"
        raise _Wrong(f"{name} is {off} as {show(ours.placements)}")


def _floating(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [t for t in leaves if t.requires_grad]
