"""``moesaic check module:function``: options, finding the check, exit status."""

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from moesaic.options import parse
from moesaic.testing.check import check_gradients
from moesaic.testing.errors import CheckError
from moesaic.testing.layout import parse_layouts
from moesaic.testing.record import Check


@dataclass(frozen=True)
class Options:
    """Check that a parallel model has the gradients of one process, on gloo ranks of this machine.

    Exit status: 0 all equal; 1 something differs; 2 the check, or a layout, cannot be run.
    """

    check: Annotated[str, tyro.conf.Positional]
    """A function that returns a moesaic.testing.Check, or a Check, as module:name."""
    layouts: str = ""
    """Layouts to check, such as "tp=2,ep=2 ; ep=4,etp=1". world=4 in a layout sets its number of ranks. By default
    those of the check."""
    steps: int | None = None
    """Optimizer steps. By default those of the check."""
    timeout_s: float | None = None
    """Seconds after which a layout counts as hung. By default those of the check."""


def run(arguments: Sequence[str]) -> int:
    """Run ``moesaic check`` and return its exit status."""
    options = parse(Options, "check", arguments)
    try:
        check = _found(options.check)
        changes: dict[str, Any] = {"steps": options.steps, "timeout_s": options.timeout_s}
        changes = {name: value for name, value in changes.items() if value is not None}
        if options.layouts:
            changes["layouts"] = parse_layouts(options.layouts, check.world)
        report = check_gradients(replace(check, **changes))
    except CheckError as error:
        print(f"moesaic check: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0 if report.ok else 1 if report.ran else 2


def _found(path: str) -> Check:
    module, colon, name = path.partition(":")
    if not colon or not name or not all(module.split(".")):
        raise CheckError(f"{path!r}: expected module:function, such as mymodel.check:{name or 'tiny'}")
    # As `python -m` does: what lies in the current folder can be imported, by the ranks too.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that it imports itself
        raise CheckError(f"there is no module {error.name!r} here or among the installed ones") from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise CheckError(f"{path}: {module} has no {part!r}")
        found = getattr(found, part)
    found = found if isinstance(found, Check) else found() if callable(found) else found
    if not isinstance(found, Check):
        raise CheckError(f"{path}: expected a moesaic.testing.Check or a function that returns one, got {found!r}")
    return found
