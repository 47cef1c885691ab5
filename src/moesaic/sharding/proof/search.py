"""Look through all placements of a call: which are right, which are admitted, and where the two disagree."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from torch.distributed.tensor.placement_types import Partial

from moesaic.sharding.proof.deciders import Decider, is_local, is_private
from moesaic.sharding.proof.gradients import judge_through_dtensor
from moesaic.sharding.proof.report import Record
from moesaic.sharding.proof.trial import EVEN, Case, Inputs, Trial, plainest, show
from moesaic.sharding.rule import Placements, has_one_reduction
from moesaic.sharding.simulated import Ranks

_KINDS = ("admitted", "wrong", "hidden", "stuck")


@dataclass
class Standing:
    """What is still thought of one choice of input placements, for each result.

    Attributes:
        everywhere: output placements that were right in all cases so far.
        where_even: those that were right in all cases in which every shard has the same size.
        seen, seen_even: those of them that had a case that could have shown them wrong.
        admitted: whether the inputs were admitted in some case.
        refused: cases in which they were not, with those outputs that all shards would have been even for.
    """

    everywhere: list[set[Placements]]
    where_even: list[set[Placements]]
    seen: list[bool]
    seen_even: list[set[Placements]]
    admitted: bool = False
    refused: list[tuple[Case, list[set[Placements]]]] = field(default_factory=list)

    def is_open(self, *, even: bool) -> bool:
        """Whether a case can still tell anything."""
        return all(self.everywhere) or (even and all(self.where_even))

    def update(self, trial: Trial, inputs: Inputs) -> None:
        even = trial.inputs_are_even(inputs)
        candidates = [a | b if even else a for a, b in zip(self.everywhere, self.where_even, strict=True)]
        right = trial.right(inputs, candidates)
        for i, telling in enumerate(trial.is_telling):
            if not telling:
                continue
            self.seen[i] = True
            self.everywhere[i] &= right[i]
            if even:
                looked_at = {p for p in self.where_even[i] if trial.output_is_even(i, p)}
                self.where_even[i] -= looked_at - right[i]
                self.seen_even[i] |= looked_at & right[i]

    def refuse(self, trial: Trial, inputs: Inputs) -> None:
        if all(trial.is_telling):
            even = trial.inputs_are_even(inputs)
            of_outputs = [
                {p for p in where_even if even and trial.output_is_even(i, p)}
                for i, where_even in enumerate(self.where_even)
            ]
            self.refused.append((trial.case, of_outputs))

    def verdict(self) -> tuple[Inputs, list[Case]] | None:
        """The right outputs, and the cases in which they could have been but were refused; None if nothing is right."""
        if all(self.seen) and all(self.everywhere):
            return tuple(map(plainest, self.everywhere)), [case for case, _ in self.refused]
        even = [a & b for a, b in zip(self.where_even, self.seen_even, strict=True)]
        if not all(even):
            return None
        outputs = tuple(map(plainest, even))
        cases = [case for case, sets in self.refused if all(p in s for p, s in zip(outputs, sets, strict=True))]
        return outputs, cases


class Search:
    """The choices of one line of a rule, over cases and meshes."""

    def __init__(self, decider: Decider, line: str) -> None:
        self.decider, self.line = decider, line
        self.standings: dict[Inputs, Standing] = {}
        self.found: dict[str, dict[tuple[Inputs, Inputs], Record]] = {k: {} for k in _KINDS}
        self.trials: list[Trial] = []
        # What only DTensor's own dispatch can run.
        self.private: list[tuple[Trial, Inputs, Inputs]] = []
        self._right: dict[tuple[tuple[int, ...], Inputs, Inputs], dict[str, Trial]] = {}

    def judge(self, trial: Trial, choices: Iterable[Inputs]) -> None:
        """Look at one case of each of the choices."""
        for inputs in choices:
            if inputs not in self.standings:
                outputs = trial.all_outputs()
                nothing = [False] * len(outputs), [set() for _ in outputs]
                self.standings[inputs] = Standing([set(o) for o in outputs], [set(o) for o in outputs], *nothing)
            standing = self.standings[inputs]
            tells = standing.is_open(even=trial.inputs_are_even(inputs))
            if (trial.example.narrowed or trial.example.brief) and not standing.admitted and not tells:
                # Wrong, and refused for the sizes that were given: other sizes would not be admitted either.
                continue
            decision = self.decider(trial.example, inputs, trial.mesh)
            if decision is not None and is_local(inputs, decision.inputs):
                standing.admitted = True
                if is_private((*decision.inputs, *decision.outputs)):
                    self.private.append((trial, inputs, decision.outputs))
                    continue
                error = trial.error(decision.inputs, decision.outputs)
                self.note("wrong" if error else "admitted", trial, inputs, decision.outputs, error or "")
                if not error:
                    of_kinds = self._right.setdefault((trial.mesh, inputs, decision.outputs), {})
                    of_kinds.setdefault(trial.kind(inputs), trial)
            else:
                if decision is not None:
                    pairs = zip(trial.example.names, inputs, decision.inputs, strict=True)
                    moved = "; ".join(f"{name}: {show(a)} to {show(b)}" for name, a, b in pairs if a != b)
                    self.note("hidden", trial, inputs, decision.outputs, moved)
                standing.refuse(trial, inputs)
            if tells:
                standing.update(trial, inputs)
        trial.forget()

    def judge_private(self, ranks: Ranks) -> Iterator[str]:
        """Run through DTensor what is admitted with placements of torch's own, since the last time; what it refuses."""
        while self.private:
            trial, inputs, outputs = self.private.pop()
            verdict = judge_through_dtensor(ranks, trial, inputs)
            # Each has its own sizes in it, and means the same.
            outputs = tuple(map(_plain, outputs))
            if verdict.refused:
                yield f"{', '.join(map(show, inputs))} on {trial.case}: torch raises {verdict.refused}"
            else:
                self.note("wrong" if verdict.error else "admitted", trial, inputs, outputs, verdict.error)

    def missing(self) -> list[Record]:
        """What is right and was refused. Of pairs, those that do not follow from what is missing on one axis."""
        records = {}
        for inputs, standing in self.standings.items():
            verdict = standing.verdict()
            if verdict is None or not verdict[1]:
                continue
            outputs, cases = verdict
            if not any(part in records for part in on_each_axis(inputs)):
                records[inputs] = Record(inputs, outputs, cases[0], line=self.line, num_cases=len(cases))
        return list(records.values())

    def combinations(self, num_axes: int, most: int) -> tuple[list[Inputs], int]:
        """Choices for a mesh, and of how many: combinations of what is admitted or right on one axis.

        Where there are more than ``most``, a sample of them; and a smaller one of all the others.
        """
        wrong = {inputs for inputs, _ in self.found["wrong"]}
        single = [inputs for inputs in self.standings if len(inputs[0]) == 1 and inputs not in wrong]
        admitted = {inputs for inputs, _ in self.found["admitted"]}
        good = [inputs for inputs in single if inputs in admitted or self.standings[inputs].verdict() is not None]
        generator = random.Random(0)
        of_good = [c for c in map(_together, product(good, repeat=num_axes)) if all(map(has_one_reduction, c))]
        chosen = generator.sample(of_good, most) if len(of_good) > most else of_good
        others = [_together(generator.choices(single, k=num_axes)) for _ in range(most // 3)] if single else []
        return list(dict.fromkeys([*chosen, *(c for c in others if all(map(has_one_reduction, c)))])), len(of_good)

    def note(self, kind: str, trial: Trial, inputs: Inputs, outputs: Inputs, error: str) -> None:
        """Record ``"admitted"``, ``"wrong"``, ``"hidden"`` or ``"stuck"``: once for all cases."""
        known = self.found[kind].get((inputs, outputs))
        record = known or Record(inputs, outputs, trial.case, error, self.line, num_cases=0)
        self.found[kind][inputs, outputs] = replace(record, num_cases=record.num_cases + 1)

    def records(self, kind: str) -> list[Record]:
        """What was recorded; nothing is admitted and right that was wrong in some case."""
        wrong = self.found["wrong"] if kind == "admitted" else {}
        return [record for key, record in self.found[kind].items() if key not in wrong]

    def right_of_each_kind(self, mesh: tuple[int, ...]) -> list[tuple[Trial, Inputs, Inputs]]:
        """What is admitted and right on a mesh, with the first trial of each kind: the inputs as given come first."""
        keys = [(mesh, record.inputs, record.outputs) for record in self.records("admitted")]
        return [(trial, *key[1:]) for key in keys for trial in self._of_kinds(key)]

    def _of_kinds(self, key: tuple[tuple[int, ...], Inputs, Inputs]) -> list[Trial]:
        of_kinds = self._right.get(key, {})
        # What holds for uneven shards or empty ones holds for even ones.
        others = [kind for kind in of_kinds if kind != EVEN]
        return [of_kinds[kind] for kind in others or of_kinds]


def on_each_axis(inputs: Inputs) -> list[Inputs]:
    """The choices for single axes that a choice for a mesh is made of."""
    num_axes = len(inputs[0]) if inputs else 0
    return [tuple((p[axis],) for p in inputs) for axis in range(num_axes)] if num_axes > 1 else []


def _plain(placements: Placements) -> Placements:
    return tuple(Partial(p.reduce_op) if isinstance(p, Partial) else p for p in placements)


def _together(choices: Sequence[Inputs]) -> Inputs:
    """Choices for single axes as one for a mesh."""
    return tuple(tuple(p for (p,) in of_tensor) for of_tensor in zip(*choices, strict=True))
