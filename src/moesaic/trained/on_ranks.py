"""What the commands about trained models share: they run in one process or under torchrun, and only one rank speaks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from moesaic import ranks
from moesaic.parallel.mesh import resolve_layout, sizes_in
from moesaic.train.errors import TrainingError, UserError, check_packages
from moesaic.train.flags import LayoutOptions
from moesaic.train.runtime import Runtime, launched_world_size, started

T = TypeVar("T", bound=LayoutOptions)


def run_on_ranks(command: str, work: Callable[[T, Runtime], None], options: T, check: Callable[[T], None]) -> int:
    """Do the work on every rank of the launch, and return the exit status. Rank 0 tells what went wrong.

    The options have those of a layout. They are checked first, without a process group, so that mistakes are told soon.
    """
    leader = ranks.leads_launch()
    try:
        check_packages("it", "train", "transformers", "tokenizers")
        check(options)
        try:
            resolve_layout(launched_world_size(), **sizes_in(options))
        except ValueError as error:
            raise UserError(str(error)) from error
        from moesaic.checkpoint import CheckpointError

        try:
            with started(options.device) as runtime:
                work(options, runtime)
        except CheckpointError as error:
            raise TrainingError(str(error)) from error
        return 0
    except UserError as error:
        message, status = error, 2
    except TrainingError as error:
        message, status = error, 1
    if leader:
        print(f"moesaic {command}: {message}", file=sys.stderr, flush=True)
    return status


def tell(runtime: Runtime, text: str) -> None:
    """Print a note of rank 0 beside the result, which goes to stdout."""
    if runtime.leader:
        print(text, file=sys.stderr, flush=True)
