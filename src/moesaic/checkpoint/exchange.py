"""Folders that change places in one operation of the system, so that a name is never without a folder."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from moesaic.checkpoint.sealed import flush

OLD = ".old"
"""What a folder that is replaced is called for a moment, where the system cannot exchange two."""

_AT_FDCWD = -100
_EXCHANGE = 2
# A kernel, a C library or a file system without this operation.
_REFUSED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


def exchange(one: Path, other: Path) -> bool:
    """Let two folders of one file system swap their names. False, and nothing done, where the system cannot.

    It is ``renameat2(RENAME_EXCHANGE)`` on Linux and ``renamex_np(RENAME_SWAP)`` on macOS.

    Raises:
        OSError: the system can, and it failed.
    """
    names = os.fsencode(one), os.fsencode(other)
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if sys.platform.startswith("linux") and hasattr(library, "renameat2"):
        failed = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE)
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, _EXCHANGE)
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in _REFUSED:
        return False
    raise OSError(number, os.strerror(number), str(other))


def publish(work: Path, final: Path) -> None:
    """Give the complete folder ``work`` its final name, and flush that to disk. What has the name already goes.

    If this is interrupted where folders cannot be exchanged, :func:`recover` finishes or undoes it.
    """
    if not final.exists():
        os.rename(work, final)
        flush(final.parent)
        return
    if exchange(work, final):
        flush(final.parent)
        shutil.rmtree(work, ignore_errors=True)
        return
    old = final.with_name(final.name + OLD)
    shutil.rmtree(old, ignore_errors=True)
    os.rename(final, old)
    try:
        os.rename(work, final)
    except OSError:
        os.rename(old, final)
        raise
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(final: Path, is_whole: Callable[[Path], bool]) -> None:
    """Put back what had a name, if :func:`publish` was interrupted between its two renames."""
    old = final.with_name(final.name + OLD)
    if not final.exists() and old.is_dir() and is_whole(old):
        os.rename(old, final)
        flush(final.parent)
