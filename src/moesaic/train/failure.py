"""When a run fails: what can be saved is saved, one line says what happened, and tracebacks go to a file.

The ranks that are left meet (:mod:`moesaic.train.peers`), and one of them speaks for all.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint import CheckpointError, latest, wait
from moesaic.checkpoint.run_folder import CHECKPOINTS, FAILURES
from moesaic.sharding.parts import local_part
from moesaic.train.config import TrainConfig
from moesaic.train.errors import TrainingError, first_line
from moesaic.train.peers import Meeting, Report, last_collectives
from moesaic.train.runtime import Runtime
from moesaic.train.training import Training, save


def failed(
    error: BaseException, runtime: Runtime, folder: Path | None, training: Training | None, config: TrainConfig
) -> TrainingError:
    """What to raise instead of an error that not all ranks have. Every rank that is left comes here.

    `training` is what is to be saved: if it is that of one step, all ranks are there and all numbers are finite, this
    writes a checkpoint. In `folder` go the tracebacks; without one that of the rank that failed is printed.
    """
    log = None if folder is None else _write_log(error, folder, runtime.rank)
    report = Report(
        step=None if training is None else training.step,
        sound=training is not None and _is_sound(training),
        unsaved=training is not None and training.step != training.saved,
        error=f"{type(error).__name__}: {first_line(error)}",
    )
    if runtime.peers is None:
        meeting: Meeting | None = Meeting({runtime.rank: report}, runtime.rank, [])
    else:
        meeting = runtime.peers.meet(report)
    if meeting is not None and runtime.rank not in meeting.reports:
        # The others went on without this rank, and have told so.
        return TrainingError(report.error, told=False)
    if folder is None and meeting is not None and meeting.first == runtime.rank:
        # There is no file for it.
        traceback.print_exception(error)
    said = [_what(meeting, report, runtime)]
    if training is not None and folder is not None and meeting is not None:
        said += _rescue(meeting, training, config, folder, runtime)
    speaker = 1 if meeting is None else min(meeting.reports)
    if log is not None:
        said.append(f"The traceback is in {log}.")
    if folder is not None:
        said.append(way_back(folder))
    return TrainingError(" ".join(said), told=runtime.rank == speaker)


def way_back(folder: Path, how: str = "") -> str:
    """Which the last checkpoint is, and the command that goes on from it, at the end of the text."""
    newest = latest(folder / CHECKPOINTS)
    if newest is None:
        return f"There is no checkpoint yet. To start again{how}: {command_to_continue(folder, 'auto')}"
    return f"The last checkpoint is {newest}. To continue from it{how}: {command_to_continue(folder)}"


def command_to_continue(folder: Path, *how: str) -> str:
    """The command that goes on with a run, on as many processes as there are now."""
    hosts, processes = (int(os.environ.get(name, "1")) for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    launcher = "python"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        launcher = f"torchrun --standalone --nproc-per-node {processes}" if hosts == 1 else "torchrun ..."
    options = shlex.join(["--resume", *how, "--out", str(folder)])
    return f"{launcher} -m moesaic train {options}"


def _what(meeting: Meeting | None, own: Report, runtime: Runtime) -> str:
    reports = [own] if meeting is None else meeting.reports.values()
    step = min((report.step for report in reports if report.step is not None), default=None)
    where = "" if step is None else f" after step {step}"
    if meeting is None:
        return f"the launcher or a rank was lost{where}, and with it the way to the other ranks ({own.error})."
    if meeting.lost:
        names = ("rank " if len(meeting.lost) == 1 else "ranks ") + ", ".join(map(str, meeting.lost))
        verb = "was" if len(meeting.lost) == 1 else "were"
        return f"{names} {verb} lost{where}: killed, stopped or cut off; nothing was heard from there."
    assert meeting.first is not None
    who = "the program" if runtime.peers is None else f"rank {meeting.first}"
    return f"{who} failed{where}: {meeting.reports[meeting.first].error.removesuffix('.')}."


def _rescue(meeting: Meeting, training: Training, config: TrainConfig, folder: Path, runtime: Runtime) -> list[str]:
    """Save, if that can be done and is of use; say why not, or what was saved."""
    reports = meeting.reports.values()
    if meeting.lost or not any(report.unsaved for report in reports):
        return []
    if not meeting.can_save():
        return ["Some weights are not finite, or in the middle of an update, so they are not saved."]
    # One in the background has failed with the connections, or is done.
    with contextlib.suppress(CheckpointError):
        wait()
    try:
        if runtime.peers is not None:
            runtime.peers.rejoin()
        # FSDP lets go of what the step has gathered.
        training.model.state_dict()
        training.optimizer.zero_grad(set_to_none=True)
        save(training, config, folder)
        wait()
    except Exception as error:
        return [f"Step {training.step} could not be saved: {first_line(error)}."]
    return [f"Step {training.step} is saved."]


@torch.no_grad()
def _is_sound(training: Training) -> bool:
    """Whether this rank's weights and optimizer state are those of one step, and finite."""
    state: list[Any] = [*training.model.parameters()]
    for of_parameter in training.optimizer.state.values():
        state += [value for value in of_parameter.values() if isinstance(value, Tensor)]
    try:
        return training.whole and all(bool(torch.isfinite(local_part(tensor)[0]).all()) for tensor in state)
    except RuntimeError:
        # A device that has failed.
        return False


def _write_log(error: BaseException, folder: Path, rank: int) -> Path | None:
    """Add the traceback to this rank's file, and torch's record of the last collectives if there is one."""
    path = folder / FAILURES / f"rank-{rank}.log"
    # A full disk must not hide what happened.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8", errors="replace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.write("".join(traceback.format_exception(error)) + "\n")
        if (record := last_collectives()) is not None:
            path.with_suffix(".collectives.json").write_text(record)
        return path
    return None
