"""Check that a parallel model's gradients are those of one process."""

import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from torch import nn

from moesaic.testing import worker
from moesaic.testing.compare import compare, unsteady
from moesaic.testing.errors import CheckError
from moesaic.testing.layout import Layout
from moesaic.testing.pool import RankError, Ranks, preload
from moesaic.testing.record import Check, Run
from moesaic.testing.reference import Reference
from moesaic.testing.report import Finding, LayoutReport, Report, narrowed


def assert_equal_gradients(
    build: Callable[[], nn.Module],
    inputs: Callable[[int, Layout], Any],
    parallelize: Callable[[nn.Module, Layout], nn.Module | None],
    layouts: Sequence[Mapping[str, int]],
    *,
    pools: "Pools | None" = None,
    **options: Any,
) -> Report:
    """Fail unless a model laid over ranks has the outputs, loss, gradients and weights that one process has.

    Ranks are processes of this machine, one to eight, that talk by gloo; no launcher is needed. Everything is compared
    with one process in fp64. What counts as equal follows from how far two runs of one process in the ranks' precision
    are from it, one of them with sums in another order.

    Args:
        build, inputs, parallelize, layouts, options: as in :class:`Check`.
        pools: processes of earlier checks, which are used again.

    Returns:
        The report, whose notes say what is worth knowing though it is no fault.

    Raises:
        AssertionError: something differs; the message is the report.
        CheckError: the check cannot be run, and what to change.

    Example:
        assert_equal_gradients(build, inputs, parallelize, [{"tp": 2, "ep": 2}, {"ep": 4}], loss=loss, steps=2)
    """
    report = check_gradients(
        Check(build=build, inputs=inputs, parallelize=parallelize, layouts=layouts, **options), pools
    )
    if not report.ran:
        raise CheckError(str(report))
    if not report.ok:
        raise AssertionError(f"\n{report}")
    return report


def check_gradients(check: Check, pools: "Pools | None" = None) -> Report:
    """Run a check and report; see :func:`assert_equal_gradients`. With ``pools``, processes of earlier checks are used.

    Raises:
        CheckError: the one process fails, a function cannot be imported by name, or a layout is not legal.
    """
    start = time.monotonic()
    layouts = [layout if isinstance(layout, Layout) else Layout(layout, check.world) for layout in check.layouts]
    if not layouts:
        raise CheckError("layouts: there is none; give at least one mapping of axes to sizes, such as {'tp': 2}")
    if check.steps < 1:
        raise CheckError(f"steps: must be at least 1, got {check.steps}")
    _check_importable(check)
    preload(*_modules(check))
    with _or_new(pools) as ranks_of:
        reference = ranks_of.reference(check)
        if reference.unsteady:
            names = ", ".join(reference.unsteady[:3])
            text = f"changed when the one process ran twice: {names}"
            noisy = Finding("noisy", "the model", text)
            return Report([LayoutReport(layout, [noisy]) for layout in layouts], seconds=time.monotonic() - start)
        reports = [_check_layout(check, layout, reference, ranks_of) for layout in layouts]
    narrowed(reports)
    return Report(reports, [], time.monotonic() - start)


class Pools:
    """Ranks by their number, and runs of one process, kept between checks: ``pools(world, timeout_s)``."""

    def __init__(self) -> None:
        self._by_size: dict[int, Ranks] = {}
        self._references: dict[bytes, Reference] = {}

    def __call__(self, world: int, timeout_s: float) -> Ranks:
        ranks = self._by_size.setdefault(world, Ranks(world))
        ranks.timeout_s = timeout_s
        return ranks

    def reference(self, check: Check) -> Reference:
        """What the one process sees; checks that differ in layouts alone, or in what only ranks do, share it.

        Raises:
            CheckError: it fails.
        """
        alone = replace(check, layouts=(), parallelize=_as_it_is, backward=None, where=None, world=None)
        if alone.clip is not None:
            alone = replace(alone, clip=_unclipped)
        key = pickle.dumps(alone)
        if key not in self._references:
            try:
                self._references[key] = self(1, check.timeout_s)(worker.run_reference, alone)[0]
            except RankError as error:
                raise CheckError(f"the one process failed, in {alone.exact} or {alone.dtype}\n{error}") from None
        return self._references[key]

    def stop(self) -> None:
        """End the processes; a later call starts new ones."""
        for ranks in self._by_size.values():
            ranks.stop()


def _as_it_is(model: nn.Module, layout: Layout) -> None:
    """What the one process does in place of ``parallelize``; it is not called."""


def _unclipped(model: nn.Module, max_norm: float) -> None:
    """That something clips is all that the one process has to know."""


@contextmanager
def _or_new(pools: Pools | None) -> Iterator[Pools]:
    if pools is not None:
        yield pools
        return
    new = Pools()
    try:
        yield new
    finally:
        new.stop()


def _check_layout(check: Check, layout: Layout, reference: Reference, pools: Pools) -> LayoutReport:
    start = time.monotonic()
    report = LayoutReport(layout)
    norms = [float(step.norm) / 2 for step in reference.exact.steps if step.norm is not None]

    def run(trace: bool) -> list[Run]:
        ranks = pools(layout.world, check.timeout_s)
        return ranks(worker.run_rank, check, layout, norms, reference.exact.choices, reference.ties, trace)

    try:
        runs = run(trace=False)
        report = compare(check, layout, reference, runs)
        if report.findings:
            # Once more with the outputs of layers; a fault that comes and goes is another fault.
            again = run(trace=True)
            shares = _shares(check, layout, pools) if _unexplained(report) else ()
            report = compare(check, layout, reference, again, shares or ())
            if shares is None:
                report.notes.append(
                    "a rank's batch alone is nothing that the one process takes: tokens were not weighed"
                )
            changed = unsteady(reference, runs, again)
            if changed:
                text = f"changed when the ranks ran twice: {', '.join(changed[:3])}"
                report.findings.insert(0, Finding("noisy", "the parallel model", text))
    except (RankError, CheckError) as error:
        report.error = str(error)
    report.seconds = time.monotonic() - start
    return report


def _unexplained(report: LayoutReport) -> bool:
    return all(finding.kind in ("unrelated", "replicas differ") for finding in report.findings)


def _shares(check: Check, layout: Layout, pools: Pools) -> list | None:
    """What one process gets from each rank's batch alone, or None where it does not take that."""
    if check.loss is None and check.backward is not None:
        return None
    try:
        return pools(1, check.timeout_s)(worker.run_shares, check, layout)[0]
    except RankError:
        return None


def _check_importable(check: Check) -> None:
    """Raise unless ranks can import every function by its name."""
    for field in fields(check):
        function = getattr(check, field.name)
        try:
            pickle.dumps(function)
        except Exception as error:
            said = str(error)
        else:
            if getattr(getattr(function, "func", function), "__module__", None) != "__main__":
                continue
            said = "it is defined in __main__"
        raise CheckError(
            f"{field.name}: ranks import it by name, and cannot ({said}); define it at the top of a module of its own, "
            "or pass functools.partial of such a function, or an object of such a class"
        )


def _modules(check: Check) -> list[str]:
    functions = [check.build, check.inputs, check.parallelize, check.loss, check.backward, check.clip, check.optimizer]
    found = {getattr(getattr(f, "func", f), "__module__", None) for f in functions if f is not None}
    return sorted(m for m in found if m and m != "__main__")
