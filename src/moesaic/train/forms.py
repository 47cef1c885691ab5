"""The forms of rows that are read: which columns tell them, and what a row of each comes to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

from moesaic.train.messages import is_empty_answer, read_messages, read_tools
from moesaic.train.rows import Row, RowError

# Text, or what is kept of a conversation: {"messages"} or {"messages", "tools"}, or {"prompt", "completion"}.
Content = str | dict[str, Any]


class Form(NamedTuple):
    """A form of rows."""

    columns: tuple[str, ...]
    """Those by which it is known; none may be null."""
    read: Callable[[Mapping[str, Any], Set[str]], Content]
    """Of a row's values, and the roles that are known beside the usual ones. Raises `RowError`."""


def choose_form(row: Row, text_column: str | None) -> Form:
    """The form of a row, and of all after it: the first that has its columns there. Raises `RowError`."""
    forms = _FORMS if text_column is None else (_text_form(text_column),)
    for form in forms:
        if set(form.columns) <= row.values.keys():
            return form
    if text_column is not None:
        wanted = repr(text_column)
    else:
        wanted = ", ".join(" and ".join(map(repr, form.columns)) for form in forms[:-1])
        wanted += f", or {' and '.join(map(repr, forms[-1].columns))}"
    columns = ", ".join(map(str, itertools.islice(row.values, 20)))
    raise RowError(f"no column {wanted}; choose one that holds text with --text-column: {columns}")


def has_empty_answer(content: Content) -> bool:
    """Whether there is an answer in it that says nothing."""
    if isinstance(content, str):
        return False
    if "completion" in content:
        return not content["completion"].strip()
    return any(map(is_empty_answer, content["messages"]))


def _conversation(messages: list[dict[str, Any]], tools: Any) -> Content:
    kept = read_tools(tools)
    return {"messages": messages} if kept is None else {"messages": messages, "tools": kept}


def _read_chat(values: Mapping[str, Any], roles: Set[str]) -> Content:
    return _conversation(read_messages(values["messages"], "messages", roles), values.get("tools"))


def _read_sharegpt(values: Mapping[str, Any], roles: Set[str]) -> Content:
    messages = read_messages(values["conversations"], "conversations", roles)
    if (system := _string(values, "system", optional=True)) and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return _conversation(messages, values.get("tools"))


def _read_alpaca(values: Mapping[str, Any], roles: Set[str]) -> Content:
    """The input stands below the instruction; earlier turns are pairs in 'history'."""
    asked = "\n".join(filter(None, [_string(values, "instruction"), _string(values, "input", optional=True)]))
    messages = []
    if system := _string(values, "system", optional=True):
        messages.append({"role": "system", "content": system})
    for turn in [*_history(values), (asked, _string(values, "output"))]:
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return _conversation(messages, values.get("tools"))


def _history(values: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    history = values.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history)
    if not pairs or not all(isinstance(text, str) for turn in history for text in turn):
        raise RowError(f"'history' must be a list of pairs of strings, got {history!r:.60}")
    return history


def _read_completion(values: Mapping[str, Any], roles: Set[str]) -> Content:
    return {name: _string(values, name) for name in ("prompt", "completion")}


def _text_form(column: str) -> Form:
    return Form((column,), lambda values, roles: _string(values, column))


def _string(values: Mapping[str, Any], column: str, *, optional: bool = False) -> str:
    value = values.get(column)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        remedy = "; put its messages into one list 'messages'" if isinstance(value, list) else ""
        raise RowError(f"{column!r} must be a string, not {type(value).__name__}{remedy}")
    return value


_FORMS = (
    Form(("messages",), _read_chat),
    _text_form("text"),
    Form(("prompt", "completion"), _read_completion),
    Form(("conversations",), _read_sharegpt),
    Form(("instruction", "output"), _read_alpaca),
)
