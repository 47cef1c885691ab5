"""Files as text: what is in a file as characters, or the reason why it cannot be read.

Text is UTF-8 unless the file itself says otherwise: by a byte order mark, or by a declaration like those of Python, XML
and HTML. Files packed by gzip, bzip2 or xz are unpacked. No encoding is guessed: Latin-1 and its neighbours all decode
without an error, and the wrong one gives wrong text.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

_UNPACK: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b\x08": gzip.open,
    b"\xfd7zXZ\0": lzma.open,
    **{b"BZh%d1AY&SY" % level: bz2.open for level in range(1, 10)},
}
_PACKED = {b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar"}
# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_DECLARATIONS = [
    # Python, and editors, in one of the first two lines.
    re.compile(rb"\A(?:[^\n]*\n)?[^\n]*coding[:=][ \t]*([-\w.]+)"),
    re.compile(rb"\A\s*<\?xml[^>]*\bencoding=[\"']([-\w.]+)"),
    re.compile(rb"(?i)<meta[^>]*\bcharset=[\"']?([-\w.]+)"),
]
_DECLARED_WITHIN = 1024
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}
_BROKEN = (EOFError, zlib.error, lzma.LZMAError)


class UnreadableError(Exception):
    """A file cannot be read as text; the text says why.

    Attributes:
        line: The number of the line that cannot be read, if it is one line.
    """

    def __init__(self, reason: str, line: int | None = None):
        super().__init__(reason)
        self.line = line


class Skipped(NamedTuple):
    """A file that is left out, and why."""

    name: str
    reason: str


def shown(path: object) -> str:
    """A path as text that any terminal takes: bytes of a name that are not UTF-8 appear as escapes."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def kind_of(path: Path) -> str | None:
    """What is there, links followed: "a file", "a folder", "a device" and so on, or None. Raises `UnreadableError`."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UnreadableError(getattr(error, "strerror", None) or str(error)) from error
    return "a file" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "not a file")


@contextmanager
def open_unpacked(path: Path) -> Iterator[Any]:
    """A regular file as a stream of bytes, unpacked. Raises `UnreadableError`, also for what is found while reading."""
    try:
        kind = kind_of(path)
        if kind not in ("a file", None):
            raise UnreadableError(f"{kind}, not a file")
        with open(path, "rb") as file:
            head = file.peek(16)
            for magic, name in _PACKED.items():
                if head.startswith(magic):
                    raise UnreadableError(f"packed as {name}; unpack it")
            unpack = next((unpack for magic, unpack in _UNPACK.items() if head.startswith(magic)), None)
            yield file if unpack is None else unpack(file)
    except _BROKEN as error:
        raise UnreadableError(f"its compressed data are broken: {error}") from error
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error


def read_text(path: Path) -> str:
    """All the text of a file. Raises `UnreadableError`."""
    with open_unpacked(path) as stream:
        data = stream.read()
    encoding = _marked(data)
    if encoding is not None and "\0" not in (text := _decode(data, encoding)):
        return text
    if b"\0" in data:
        raise UnreadableError("binary")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        found = (pattern.search(data[:_DECLARED_WITHIN]) for pattern in _DECLARATIONS)
        declared = next((match[1].decode() for match in found if match), None)
        if declared is None:
            raise UnreadableError(
                "not UTF-8; if it is text, convert it (iconv -f LATIN1 -t UTF-8, if it is Latin-1)"
            ) from error
    return _decode(data, declared)


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, ends included, one at a time. Raises `UnreadableError`, which names the line."""
    with open_unpacked(path) as stream:
        encoding = _marked(stream.peek(4)) or "utf-8"
        number = None
        try:
            if not encoding.startswith("utf-8"):
                # A line's end is more than one byte there.
                yield from io.StringIO(stream.read().decode(encoding), newline="\n")
                return
            for number, line in enumerate(stream, 1):
                yield line.decode(encoding if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UnreadableError(
                f"not {error.encoding.upper()} ({error.reason}); convert it, with iconv for one", number
            ) from error


def text_files(
    root: Path, suffix: str = "", without: frozenset[str] = frozenset()
) -> tuple[dict[str, Path], list[Skipped]]:
    """The files under a folder by their path within it, sorted, and what cannot be looked into.

    Hidden files and folders are left out, and links to folders are not followed.
    """
    paths: list[Path] = []
    skipped: list[Skipped] = []

    def unreadable(error: OSError) -> None:
        skipped.append(Skipped(_within(root, Path(error.filename)), error.strerror or str(error)))

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        subfolders[:] = [name for name in subfolders if name not in without and not name.startswith(".")]
        links = [path for name in subfolders if (path := Path(folder, name)).is_symlink()]
        skipped += [Skipped(_within(root, path), "a link to a folder") for path in links]
        paths += [Path(folder, name) for name in names if name.endswith(suffix) and not name.startswith(".")]
    keys = {_within(root, path): path for path in paths}
    return {key: keys[key] for key in sorted(keys)}, skipped


def list_skipped(skipped: Sequence[Skipped], most: int = 5) -> str:
    """The first few by name and reason, and how many more."""
    named = ", ".join(f"{shown(name)} ({reason})" for name, reason in skipped[:most])
    return named + (f", and {len(skipped) - most} more" if len(skipped) > most else "")


def _within(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _marked(data: bytes) -> str | None:
    return next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), None)


def _decode(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except (UnicodeError, LookupError) as error:
        raise UnreadableError(f"declared as {encoding}, but not that: {error}") from error
