"""The messages of a conversation, checked before a chat template sees them.

A template prints what it is given: a message without content as nothing, a number or a list as Python writes it, and a
role that it does not know under that name. None of that is an error there, so it has to be one here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Set
from functools import lru_cache
from typing import Any, NamedTuple

from moesaic.train.rows import RowError

KNOWN_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython", "observation"})
# What other tools call them.
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
_HINTS = {"human": "user", **dict.fromkeys(["gpt", "chatgpt", "model", "bot", "chatbot", "ai"], "assistant")}
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", "weight")
_STRINGS = ("name", "tool_call_id", "reasoning_content", "thinking")


class _Names(NamedTuple):
    """What a message calls its speaker and its text."""

    role: str
    content: str


_PLAIN, _SHAREGPT = _Names("role", "content"), _Names("from", "value")


def read_messages(given: Any, column: str, roles: Set[str] = frozenset()) -> list[dict[str, Any]]:
    """The messages of a row, checked, with 'role' and 'content'; those with 'from' and 'value' (ShareGPT) are renamed.

    Args:
        given: What is in the row.
        column: Its name, for errors.
        roles: Roles that are known beside the usual ones.

    Raises:
        RowError: The text names the message, the value and the remedy.
    """
    if isinstance(given, Mapping) and all(isinstance(values, list) for values in given.values()):
        # A list of objects as the `datasets` library may hold it: an object of lists.
        given = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
    if not isinstance(given, list) or not given:
        raise RowError(f"{column!r} must be a list of messages, and not empty, got {_short(given)}")
    first = given[0]
    names = _SHAREGPT if isinstance(first, dict) and "role" not in first and "from" in first else _PLAIN
    return [_read_message(message, f"message {number}", names, roles) for number, message in enumerate(given, 1)]


def read_tools(given: Any) -> list[dict[str, Any]] | None:
    """The tools of a row: a list of objects, or that as JSON in a string; None if there are none."""
    value = given
    if isinstance(given, str) and given.strip():
        try:
            value = json.loads(given)
        except ValueError as error:
            raise RowError(f"'tools' is a string that is not JSON ({error}); give a list of objects") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError(f"'tools' must be a list of objects, got {_short(given)}")
    return value


def is_empty_answer(message: Mapping[str, Any]) -> bool:
    """Whether the assistant says nothing here, calls no tool and has no thoughts."""
    if message["role"] != "assistant" or any(message.get(key) for key in ("tool_calls", *_STRINGS[2:])):
        return False
    content = message.get("content")
    return not text_of(content).strip()


def text_of(content: Any) -> str:
    """A message's content as one string: its parts joined, if it has parts."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def function_of(call: Any) -> Mapping[str, Any]:
    """The function of a tool, or of a call of one, which some write without the object around it."""
    function = (call.get("function") or call) if isinstance(call, dict) else None
    return function if isinstance(function, dict) else {}


def _read_message(message: Any, place: str, names: _Names, roles: Set[str]) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get(names.role), str):
        raise RowError(f"{place} must be an object with {names.role!r} and {names.content!r}, got {_short(message)}")
    renamed = _SHAREGPT_ROLES if names is _SHAREGPT else {}
    role = renamed.get(message[names.role], message[names.role])
    _check_role(role, place, (KNOWN_ROLES | roles) - _HINTS.keys(), renamed)
    place = f"{place} ({message[names.role]})"
    for key in message:
        if (meant := _misspelt(key)) is not None and key not in names:
            raise RowError(f"{place} has a key {key!r}; did you mean {meant!r}?")
    for key in _STRINGS:
        if not isinstance(message.get(key), str | None):
            raise RowError(f"{place}: {key!r} must be a string, got {_short(message[key])}")
    if message.get("weight") not in (None, 1):
        raise RowError(
            f"{place}: 'weight' {_short(message['weight'])} is not supported, all answers count alike; take the key out"
        )
    if names is _PLAIN:
        _check_calls(message, place)
        _check_content(message, place, names)
        return message
    if message[names.role] == "function_call":
        return {"role": role, "content": "", "tool_calls": _calls_of(message, place)}
    _check_content(message, place, names)
    rest = {key: value for key, value in message.items() if key not in names}
    return {"role": role, "content": message[names.content], **rest}


def _check_role(role: str, place: str, known: Set[str], renamed: Mapping[str, str]) -> None:
    if role in known:
        return
    plain = role.strip().lower()
    names = sorted(known | renamed.keys())
    near = [_HINTS[plain]] if plain in _HINTS and not renamed else difflib.get_close_matches(plain, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise RowError(
        f"{place} has the role {_short(role)}, which is unknown{hint} Known are "
        f"{', '.join(sorted(KNOWN_ROLES | renamed.keys()))}, and roles that the chat template names"
    )


def _check_calls(message: Mapping[str, Any], place: str) -> None:
    calls = message.get("tool_calls")
    if calls is None:
        return
    if message["role"] != "assistant":
        raise RowError(f"{place} has 'tool_calls', which only the assistant can have; take them out")
    if not isinstance(calls, list):
        raise RowError(f"{place}: 'tool_calls' must be a list of objects, got {_short(calls)}")
    for call in calls:
        function = function_of(call)
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise RowError(f"{place}: a tool call must be an object with a function and its name, got {_short(call)}")
        if not isinstance(function.get("arguments"), dict | str | None):
            raise RowError(f"{place}: 'arguments' must be an object, or JSON, got {_short(function['arguments'])}")


def _calls_of(message: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """What ShareGPT writes as JSON into the message."""
    try:
        calls = json.loads(message.get("value") or "")
    except (TypeError, ValueError) as error:
        raise RowError(f"{place}: 'value' must be a tool call as JSON, got {_short(message.get('value'))}") from error
    calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
    _check_calls({"role": "assistant", "tool_calls": calls}, place)
    return calls


def _check_content(message: Mapping[str, Any], place: str, names: _Names) -> None:
    key = names.content
    content = message.get(key)
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return
    if key not in message:
        raise RowError(f"{place} has no {key!r}, only {', '.join(map(repr, message))}; give it one, or take it out")
    if content is None:
        raise RowError(
            f"{place}: {key!r} is null, which is allowed beside 'tool_calls' only; give a string, or take it out"
        )
    if not isinstance(content, list):
        raise RowError(f"{place}: {key!r} must be a string, not {type(content).__name__}, got {_short(content)}")
    if not content:
        raise RowError(f"{place}: {key!r} is a list without parts; give a string, or take the message out")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RowError(
                f'{place}: the parts of {key!r} must be text, {{"type": "text", "text": "..."}}, got {_short(part)}'
            )


@lru_cache(maxsize=1024)
def _misspelt(key: Any) -> str | None:
    if key in _KEYS:
        return None
    near = difflib.get_close_matches(str(key).lower(), _KEYS, n=1, cutoff=0.85)
    return near[0] if near else None


def _short(value: Any, most: int = 60) -> str:
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= most else text[:most] + "..."
