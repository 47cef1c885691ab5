"""Text, or conversations, as documents, each of which is either for training or held out.

A document is held out by a hash of its key (its path within the corpus), so the choice is the same on every machine
and does not move when other documents come or go. Of a few documents at least one is held out. Of those with the same
text only the first counts: what is held out is never trained on.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from moesaic.train.errors import UserError
from moesaic.train.forms import Form, choose_form, has_empty_answer
from moesaic.train.hub import check_is_name
from moesaic.train.rows import RowError, is_lines, is_table, read_rows
from moesaic.train.textfiles import Skipped, UnreadableError, kind_of, list_skipped, read_text, shown, text_files

HELD_OUT_PART = 0.05
# Without tests, which would be most of it, and without what was written by a program.
_STDLIB_WITHOUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
# A corpus of fewer documents is cut into pieces of this many characters, so that some of it can be held out.
_FEW_DOCUMENTS = 40
_PIECE = 16_384
# A single piece is cut into about this many.
_PARTS = 20


@dataclass(frozen=True)
class Document:
    """One text and the key that names it within its corpus."""

    key: str
    text: str

    @property
    def digest(self) -> bytes:
        """A hash of its key. Names of files may hold bytes that are not UTF-8."""
        return hashlib.sha256(self.key.encode("utf-8", "surrogateescape")).digest()

    @property
    def held_out(self) -> bool:
        """Whether this document is for measuring and not for training, in a corpus that is large enough."""
        return int.from_bytes(self.digest[:8], "big") < HELD_OUT_PART * 2**64


@dataclass(frozen=True)
class Conversation(Document):
    """A document whose text is JSON: `{"messages"}` or `{"messages", "tools"}`, or `{"prompt", "completion"}`."""

    place: str = ""
    """Where it is from, for errors."""


def documents(
    source: str,
    text_column: str | None = None,
    *,
    roles: Set[str] = frozenset(),
    notify: Callable[[str], None] = lambda text: None,
) -> Sequence[Document]:
    """The documents of `source`, in a fixed order, no two with the same text; all or none are `Conversation`s.

    Args:
        source: "stdlib", a folder of text files, a text file, or rows: a file of JSON or CSV, a folder of .jsonl or
            .parquet files, or a dataset that the `datasets` library can load (.parquet, a folder of `save_to_disk`, or
            a name). The columns of the first row decide what the rows are, see `forms`.
        text_column: Makes rows text, of this column.
        roles: Roles that messages may have beside the usual ones.
        notify: Told once of the files that are left out, and of empty answers.

    Raises:
        UserError: There are not two documents, a row is not like the first, or a message is not one.
    """
    result = all_documents(source, text_column, roles=roles, notify=notify)
    if isinstance(result[0], Conversation):
        if len(result) < 2:
            raise UserError(
                f"--data {shown(source)}: one conversation is too few to train on some and hold out others; give more"
            )
        return result
    if len(result) < _FEW_DOCUMENTS:
        result = _cut(result, _PIECE)
    if len(result) == 1:
        result = _cut(result, len(result[0].text) // _PARTS + 1)
    if len(result) == 1:
        raise UserError(
            f"--data {shown(source)}: one line of text is too few to train on some and hold out others; give more"
        )
    return result


def all_documents(
    source: str,
    text_column: str | None = None,
    *,
    roles: Set[str] = frozenset(),
    notify: Callable[[str], None] = lambda text: None,
) -> list[Document]:
    """As :func:`documents`, for data of which nothing is held out: one document is enough, and few are not cut."""
    try:
        result = _unique(_find(source, text_column, roles, notify))
    except UnreadableError as error:
        raise UserError(f"--data {shown(source)}: {error}") from error
    if not result:
        raise UserError(f"--data {shown(source)}: there is no text in it")
    return result


def split(corpus: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """The documents for training, and those held out; of two or more at least one each."""
    held_out = [document for document in corpus if document.held_out]
    by_digest = sorted(corpus, key=lambda document: document.digest)
    if not held_out:
        held_out = by_digest[:1]
    elif len(held_out) == len(corpus):
        held_out = [document for document in corpus if document is not by_digest[-1]]
    kept_back = {document.key for document in held_out}
    return [document for document in corpus if document.key not in kept_back], held_out


def fingerprint(corpus: Sequence[Document]) -> str:
    """A hash of every key and text: two corpora with the same one are the same."""
    total = hashlib.sha256()
    for document in corpus:
        total.update(document.digest)
        total.update(hashlib.sha256(document.text.encode()).digest())
    return total.hexdigest()


def _find(source: str, text_column: str | None, roles: Set[str], notify: Callable[[str], None]) -> Iterator[Document]:
    if not source.strip():
        raise UserError("--data is empty; give a file, a folder or the name of a dataset")
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return _files(source, *text_files(root, ".py", without=_STDLIB_WITHOUT), notify)
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:
        raise UserError(f"--data {shown(source)}: {error}") from error
    kind = kind_of(path)
    if kind is None:
        check_is_name("--data", source)
    if kind is None or is_table(path):
        return _from_rows(source, path, text_column, roles, notify)
    if kind == "a folder":
        return _files(source, *text_files(path), notify)
    return _text_file(path)


def _files(
    source: str, paths: Mapping[str, Path], skipped: list[Skipped], notify: Callable[[str], None]
) -> Iterator[Document]:
    """The files that hold text; `notify` is told of the others."""
    rows = [key for key in paths if is_lines(key)]
    if rows:
        notify(
            f"--data {shown(source)}: {len(rows)} of {len(paths)} files are named like rows and read as plain text: "
            f"{shown(rows[0])}, ...; to read rows, give the file, or a folder of such files only"
        )
    for key, path in paths.items():
        try:
            yield Document(key, read_text(path))
        except UnreadableError as error:
            skipped.append(Skipped(key, str(error)))
    if skipped:
        total = len(paths) + sum(name not in paths for name, _ in skipped)
        notify(f"--data {shown(source)}: left out {len(skipped)} of {total} files: {list_skipped(skipped)}")


def _text_file(path: Path) -> Iterator[Document]:
    try:
        yield Document(path.name, read_text(path))
    except UnreadableError as error:
        raise UserError(f"--data {shown(path)} cannot be read as text: {error}") from error


def _from_rows(
    source: str, path: Path, text_column: str | None, roles: Set[str], notify: Callable[[str], None]
) -> Iterator[Document]:
    form: Form | None = None
    empty: dict[str, str] = {}
    for row in read_rows(source, path):
        try:
            form = form or choose_form(row, text_column)
            if lacking := [column for column in form.columns if column not in row.values]:
                raise RowError(f"no {' and no '.join(map(repr, lacking))}, which the first row has")
            if null := [column for column in form.columns if row.values[column] is None]:
                raise RowError(f"{' and '.join(map(repr, null))} must not be null; give a value, or take the row out")
            content = form.read(row.values, roles)
            text = content if isinstance(content, str) else json.dumps(content)
            # JSON can hold what is not text: half of a pair of UTF-16.
            (content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"--data {row.place}: {error.object[error.start]!a} is a lone surrogate, half of a character; "
                "write the character whole, or take it out"
            ) from error
        except (RowError, TypeError) as error:
            raise UserError(f"--data {row.place}: {error}") from error
        except RecursionError as error:
            raise UserError(f"--data {row.place}: this row is nested too deeply to be read; take it out") from error
        # Rows have no path, so the text itself decides.
        key = hashlib.sha256(text.encode()).hexdigest()
        if has_empty_answer(content):
            empty[key] = row.place
        yield Document(key, text) if isinstance(content, str) else Conversation(key, text, row.place)
    if empty:
        first = next(iter(empty.values()))
        notify(
            f"--data {shown(source)}: conversations with an empty answer, which is learned: {len(empty)}, first {first}"
        )


def _unique(found: Iterable[Document]) -> list[Document]:
    """The first of those with the same text; none that is empty."""
    unique: dict[bytes, Document] = {}
    for document in found:
        if document.text:
            unique.setdefault(hashlib.sha256(document.text.encode()).digest(), document)
    return list(unique.values())


def _cut(corpus: Sequence[Document], size: int) -> list[Document]:
    """Pieces of about `size` characters. They may be equal where the whole was not."""
    return _unique(piece for document in corpus for piece in _pieces(document, size))


def _pieces(document: Document, size: int) -> Iterator[Document]:
    """The document cut at the ends of lines; within a line if it is longer than `_PIECE`."""
    whole = document.text.splitlines(keepends=True)
    lines = (line[start : start + _PIECE] for line in whole for start in range(0, len(line), _PIECE))
    piece: list[str] = []
    length = count = 0
    for line in lines:
        piece.append(line)
        length += len(line)
        if length >= size:
            yield Document(f"{document.key}#{count}", "".join(piece))
            piece, length, count = [], 0, count + 1
    if piece:
        yield Document(f"{document.key}#{count}", "".join(piece))
