"""Names of models and datasets: looked for on this machine first. A typing mistake stays here, and is told at once."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Literal

from moesaic.train.errors import UserError, first_line
from moesaic.train.textfiles import shown

_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = (".jsonl", ".json", ".ndjson", ".csv", ".parquet", ".txt", ".text", ".md", ".py", ".gz", ".bz2", ".xz", ".zip")
# Seconds. Downloads retry for much longer.
_PATIENCE = 10


def check_is_name(flag: str, name: str) -> None:
    """Raise `UserError` unless `name`, which is no path here, can be a name on the hub: owner/name.

    It is a mistyped path if there is a folder of the owner's name, or it ends as a file does.
    """
    path = Path(name)
    if _ON_HUB.fullmatch(name) and not os.path.exists(path.parent) and not name.lower().endswith(_FILES):
        return
    near = _nearest(path)
    hint = f"; did you mean {shown(near)}?" if near else ""
    owner = "" if "/" in name or near else "; a name on the hub is owner/name"
    raise UserError(f"{flag} {shown(name)}: there is no such file or folder{hint}{owner}")


def check_on_hub(flag: str, name: str, kind: Literal["model", "dataset"]) -> None:
    """Raise `UserError` soon if the hub has no such repository, or cannot be reached. Never asks for what is cached."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    cached = Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}")
    if constants.HF_HUB_OFFLINE or cached.exists():
        return
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_PATIENCE)
    except GatedRepoError:
        return  # The download says what to do about that.
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{flag} {name}: there is no such folder here, and no such {kind} on the hub; if it is private, log "
            "in with `hf auth login`"
        ) from error
    except Exception as error:
        raise UserError(
            f"{flag} {name}: there is no such folder here, and the hub cannot be asked: {first_line(error)}; "
            "give a folder, or set HF_HUB_OFFLINE=1 to use only what was downloaded before"
        ) from error


def _nearest(path: Path) -> Path | None:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return None
    near = difflib.get_close_matches(path.name, names, n=1)
    return path.parent / near[0] if near else None
