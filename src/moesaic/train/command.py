"""``moesaic train``: parse its options, check the call, train; exit status.

What trains is imported late, so that help and mistakes in options answer at once.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence

from moesaic import ranks
from moesaic.options import parse as parse_options
from moesaic.train.config import TrainConfig, check, read_settings
from moesaic.train.errors import TrainingError, UserError


def run(arguments: Sequence[str]) -> int:
    """Run ``moesaic train`` and return its exit status. All ranks fail alike, and only the first one says so."""
    leader = tells = ranks.leads_launch()
    try:
        config = parse(arguments, leader)
        from moesaic.train.launch import check_launch

        check_launch(config)
        from moesaic.checkpoint import CheckpointError
        from moesaic.train.loop import train

        try:
            train(config)
        except CheckpointError as error:
            raise TrainingError(str(error)) from error
        return 0
    except UserError as error:
        message, status = error, 2
    except TrainingError as error:
        message, status = error, 1
        tells = leader if error.told is None else error.told
    if tells:
        print(f"moesaic train: {message}", file=sys.stderr, flush=True)
    return status


def parse(arguments: Sequence[str], leader: bool) -> TrainConfig:
    """The settings of a call; with ``--resume`` those of the run, but for those in a file and flags that are given."""
    arguments, auto = _without_auto(arguments)

    def on_top_of(default: TrainConfig) -> TrainConfig:
        return parse_options(TrainConfig, "train", arguments, default=default, speak=leader)

    config = on_top_of(TrainConfig())
    if config.config is not None:
        from moesaic.train.settings_file import arguments_in

        # Those that come later override.
        arguments = [*arguments_in(config.config), *arguments]
        config = on_top_of(TrainConfig())
    if auto:
        config = dataclasses.replace(config, resume="auto")
    if config.resume or "TORCHELASTIC_RESTART_COUNT" in os.environ:
        from moesaic.checkpoint.run_folder import CONFIG
        from moesaic.train.folder import resumable_folder, settle_resume

        config = settle_resume(config)
        folder = resumable_folder(config.out) if config.resume is True else config.out
        if folder is not None and (config.resume is True or (config.resume and (folder / CONFIG).is_file())):
            settings = read_settings(folder / CONFIG)
            config = dataclasses.replace(on_top_of(settings), out=folder, resume=config.resume)
    check(config)
    return config


def _without_auto(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments with ``--resume`` for ``--resume auto``, and whether that was there: a flag takes no value."""
    rest: list[str] = []
    auto = False
    for argument in arguments:
        if argument == "--resume=auto" or (argument == "auto" and rest[-1:] == ["--resume"]):
            rest, auto = [*rest, *(["--resume"] if argument != "auto" else [])], True
        else:
            rest.append(argument)
    return rest, auto
