"""Which implementations compute a run on the CPU: kept with its checkpoints, and taken up again when it goes on.

So what ``moesaic tune`` measures later, and another machine's own choice, leave a run's numbers as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moesaic import ranks
from moesaic.ops import fastest, library
from moesaic.ops.choices import from_json, to_json
from moesaic.ops.processor import processor
from moesaic.train.errors import UserError

KEY = "implementations"
"""In the info of a checkpoint and in config.json."""


def settle(device: torch.device) -> dict[str, Any] | None:
    """From now on nothing changes what this process goes by; on CPU what to keep of that, else None.

    That is the choices, and the instruction set of the kernels.
    """
    if device.type != "cpu":
        return None
    fastest.use(fastest.in_force())
    return {"kernels": processor().kernels, "choices": to_json(fastest.in_force())}


def tell_of_missing_kernels(device: torch.device, notify: Callable[[str], None]) -> None:
    """Say so where an install without a compiler computes more slowly than it could."""
    if device.type == "cpu" and isinstance(why := library.load(), str):
        notify(f"without the CPU kernels: {why}. Until then torch computes the experts")


def take_up(saved: dict[str, Any] | None, device: torch.device, folder: Path, notify: Callable[[str], None]) -> None:
    """From now on all ranks go by what was kept with the run in ``folder``. None changes nothing. Collective.

    Raises:
        UserError: a rank cannot compute by that. On all ranks, and before anything is computed.
    """
    if saved is None or device.type != "cpu":
        return

    def take() -> str:
        choices = from_json(saved["choices"])
        try:
            fastest.check_runs(choices, f"the run in {folder}")
        except RuntimeError as error:
            raise UserError(
                f"{error}. Or go on with what is the fastest here, by --choose-again: its last digits may then differ"
            ) from error
        fastest.use(choices)
        return processor().kernels

    kernels = ranks.together(take)
    other = next((index for index, here in enumerate(kernels) if here != saved["kernels"]), None)
    if other is not None and "cpu" in fastest.in_force().values():
        notify(
            f"rank {other} has {kernels[other]} kernels, and this run was computed by those of {saved['kernels']}: "
            "it goes on, and its last digits may differ from those of a run that was not interrupted"
        )
