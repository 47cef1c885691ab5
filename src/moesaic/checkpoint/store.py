"""Write and read checkpoints, on all ranks together.

Every rank passes its own shards. Failures are shared: either all ranks return, or all raise `CheckpointError`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moesaic import ranks
from moesaic.checkpoint import background, exchange, folder
from moesaic.checkpoint.folder import CheckpointError, Manifest
from moesaic.checkpoint.reader import SafeReader
from moesaic.checkpoint.sealed import describe_file

_log = logging.getLogger(__name__)


def save(
    root: str | Path,
    step: int,
    state: dict[str, Any],
    info: dict[str, Any],
    *,
    keep: int = 2,
    planner: dcp.SavePlanner | None = None,
    blocking: bool = True,
    spare: Collection[int] = (),
) -> Path:
    """Write `state` (tensors and DTensors, nested in dicts) as `root/step-<step>` and keep the `keep` newest ones.

    `info` is JSON; that of rank 0 is written. `planner` is for states that are not in memory. Checkpoints of the steps
    in `spare` are kept as well. All ranks must see `root`. If any rank fails, all raise, and earlier checkpoints are
    unchanged.

    With `blocking=False` it returns when the state is copied to the host's memory, and a thread writes the copy. The
    tensors of `state` may change then. One save is in the background at a time: the next call of `save`, `load` or
    `wait` waits for it, and raises if it has failed. So does the end of the process wait.

    Raises `CheckpointError` if it cannot be written; `ValueError` for a `step` below 0, a `keep` below 1, or a
    `planner` in the background; `TypeError` or `ValueError` for an `info` that is not JSON.
    """
    root = Path(root)
    if keep < 1:
        raise ValueError(f"keep: must be at least 1, got {keep}; the checkpoint that is written is one of them")
    final = root / folder.folder_name(step)
    if blocking:
        background.wait()
        _write(final, step, state, info, keep, planner, spare)
        return final
    if planner is not None:
        raise ValueError("planner: a state that is not in memory cannot be saved in the background; use blocking=True")
    ranks.on_leader(lambda: folder.check_info(info))
    # Copied after the save before is done: so there is one copy in memory.
    background.wait()
    copy, note, kept = background.copied(state), json.loads(json.dumps(info)), frozenset(spare)
    background.start(lambda: _write(final, step, copy, note, keep, None, kept))
    return final


def _write(
    final: Path,
    step: int,
    state: dict[str, Any],
    info: dict[str, Any],
    keep: int,
    planner: dcp.SavePlanner | None,
    spare: Collection[int],
) -> None:
    work = final.with_name(final.name + ".tmp")
    try:
        ranks.on_leader(lambda: _begin(work, info))
        ranks.together(lambda: _check_shared(work))
        with _one_process_is_meant():
            dcp.save(
                state,
                storage_writer=dcp.FileSystemWriter(work, sync_files=True),
                planner=planner,
                process_group=ranks.group_here(),
                no_dist=not ranks.active(),
            )
        described = ranks.together(lambda: _describe_own(work))
        files = {name: entry for part in described for name, entry in part.items()}
        manifest = Manifest(step=step, world_size=ranks.world_size(), info=info, files=files)
        ranks.on_leader(lambda: _finish(work, final, manifest, keep, spare))
    except (OSError, CheckpointException) as error:
        if ranks.is_leader():
            shutil.rmtree(work, ignore_errors=True)
        raise CheckpointError(f"cannot write the checkpoint {final}: {_reason(error)}") from error


def load(root: str | Path, state: dict[str, Any], *, check: Callable[[Manifest], None] | None = None) -> Manifest:
    """Read the newest sound checkpoint of `root` into the tensors of `state`, in place, whatever layout wrote it.

    All files are checked against their hashes before any is read. A damaged checkpoint is skipped, with a warning that
    names the file. `check` gets the manifest of the one to read before its tensors are read; what it raises is raised.
    Raises `CheckpointError` if no checkpoint is left, or if it lacks part of `state` or has it in a dtype of another
    kind.
    """
    root = Path(root)
    background.wait()
    found = ranks.on_leader(lambda: _names(root))
    problems = []
    for name in reversed(found):
        try:
            manifest = verify(root / name)
        except CheckpointError as error:
            problems.append(str(error))
            if ranks.is_leader():
                _log.warning("%s; trying the checkpoint before it", error)
            continue
        if check is not None:
            check(manifest)
        read_into(root / name, state)
        return manifest
    raise CheckpointError("; ".join([f"there is no sound checkpoint in {root}", *problems]))


def verify(path: str | Path) -> Manifest:
    """Check all files of the checkpoint in `path`, and give back its manifest.

    The ranks share the work. All raise `CheckpointError` if a file is damaged or missing.
    """

    path = Path(path)

    def own_part() -> Manifest:
        manifest = folder.read_manifest(path)
        folder.check_contents(path, manifest)
        for index, (name, entry) in enumerate(sorted(manifest.files.items())):
            if index % ranks.world_size() == ranks.rank():
                folder.verify_file(path / name, entry)
        return manifest

    return ranks.together(own_part)[ranks.rank()]


def read_into(path: Path, state: dict[str, Any], *, alone: bool = False) -> None:
    """Read a verified checkpoint into the tensors of `state`, in place. With `alone`, other ranks take no part."""
    try:
        with _one_process_is_meant():
            dcp.load(
                state,
                storage_reader=SafeReader(path),
                planner=_SameKinds(),
                no_dist=alone or not ranks.active(),
            )
    except CheckpointException as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {_reason(error)}") from error


class _SameKinds(dcp.DefaultLoadPlanner):
    """Refuses what would be rounded or cut without a word: 0.7 read into an integer is 0."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Compare the dtypes of what is there with those of what is asked for."""
        super().set_up_planner(*args, **kwargs)
        assert self.metadata is not None
        for name, wanted in self.state_dict.items():
            found = self.metadata.state_dict_metadata.get(name)
            if not isinstance(wanted, Tensor) or not isinstance(found, TensorStorageMetadata):
                continue
            dtype = found.properties.dtype
            floats = dtype.is_floating_point and wanted.dtype.is_floating_point
            if dtype != wanted.dtype and not floats and not (dtype.is_complex and wanted.is_complex()):
                raise ValueError(f"{name} is {dtype} in the checkpoint and {wanted.dtype} here")


def _begin(work: Path, info: dict[str, Any]) -> None:
    folder.check_info(info)
    folder.recover(work.parent)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)


def _names(root: Path) -> list[str]:
    # A folder that cannot be written to can be read all the same.
    with contextlib.suppress(OSError):
        folder.recover(root)
    return [path.name for path in folder.checkpoints(root)]


def _check_shared(work: Path) -> None:
    if not work.is_dir():
        raise OSError(f"rank {ranks.rank()} does not see {work}; all ranks need one shared file system")


def _describe_own(work: Path) -> dict[str, dict[str, Any]]:
    """The manifest entries of the files that this rank wrote."""
    own = sorted(work.glob(f"__{ranks.rank()}_*"))
    if ranks.is_leader():
        own.append(work / ".metadata")
    return {path.name: describe_file(path) for path in own}


def _finish(work: Path, final: Path, manifest: Manifest, keep: int, spare: Collection[int]) -> None:
    folder.write_manifest(work, manifest)
    exchange.publish(work, final)
    folder.prune(final.parent, keep, manifest.step, spare)


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """Without the warning of DCP that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _reason(error: BaseException) -> str:
    """The failures of all ranks in one line."""
    if isinstance(error, CheckpointException):
        causes = {str(cause) or type(cause).__name__: None for cause, _ in error.failures.values()}
        return "; ".join(causes)
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) + (f": {error.filename}" if error.filename else "")
    return str(error)
