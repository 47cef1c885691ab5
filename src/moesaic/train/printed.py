"""Whether a chat template prints what messages say, and other forms of the same messages for templates that need them.

Some templates take a message's content as a string, others as a list of parts; some take a tool call's arguments as an
object, others as JSON. One that gets the other form prints nothing, or what Python prints.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from moesaic.train.messages import function_of, text_of

Message = Mapping[str, Any]


def forms_of(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The messages as they are, and then in each other form that says the same."""
    tried: list[list[Message]] = []
    for content, arguments in itertools.product(_CONTENTS, _ARGUMENTS):
        form = [_with_arguments(content(message), arguments) for message in messages]
        if form not in tried:
            tried.append(form)
            yield form


def find_fault(text: str, messages: Sequence[Message]) -> str | None:
    """What a template that made `text` of `messages` does wrong, if that can be seen: "does not print ..."."""
    folded = text.casefold()
    for number, message in enumerate(messages, 1):
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if any(_is_printed(part, text) or json.dumps(part, ensure_ascii=False) in text for part in parts):
            return f"prints the parts of message {number} as code"
        if (parts or message["role"] in ("user", "assistant")) and not _has_a_word(folded, text_of(content)):
            return f"does not print what message {number} says"
        for call in message.get("tool_calls") or []:
            function = function_of(call)
            if function["name"] not in text:
                return f"does not print the call of {function['name']!r} in message {number}"
            if _is_mistaken(function.get("arguments"), text):
                return f"does not print the arguments in message {number} as JSON"
    return None


def are_printed(tools: Sequence[Mapping[str, Any]], text: str) -> bool:
    """Whether the names of tools are in a text."""
    names = [function_of(tool).get("name") for tool in tools]
    return all(name in text for name in names if isinstance(name, str))


def _has_a_word(folded: str, content: str) -> bool:
    """Whether a word of the content is in a text; some templates trim it, escape it or leave thoughts out."""
    words = [match[0] for match in itertools.islice(re.finditer(r"\w+", content), 1000)]
    return not words or any(word.casefold() in folded for word in words)


def _is_printed(value: Any, text: str) -> bool:
    """Whether an object is in a text as Python prints it, where that differs from JSON."""
    return str(value) in text and str(value) != json.dumps(value, ensure_ascii=False)


def _is_mistaken(arguments: Any, text: str) -> bool:
    if isinstance(arguments, str):
        escaped = json.dumps(arguments, ensure_ascii=False)[1:-1]
        return escaped != arguments and escaped in text
    values = [arguments, *(arguments or {}).values()]
    return any(isinstance(value, dict | list) and value and _is_printed(value, text) for value in values)


def _as_string(message: Message) -> Message:
    return {**message, "content": text_of(message.get("content"))}


def _as_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _as_object(arguments: Any) -> Any:
    try:
        value = json.loads(arguments)
    except (TypeError, ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_json(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _same(value: Any) -> Any:
    return value


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = function_of(call)
        if "arguments" in function:
            function = {**function, "arguments": change(function["arguments"])}
        calls.append({**call, "function": function} if call.get("function") else function)
    return {**message, "tool_calls": calls}


_CONTENTS: tuple[Callable[[Message], Message], ...] = (_same, _as_string, _as_parts)
_ARGUMENTS: tuple[Callable[[Any], Any], ...] = (_same, _as_object, _as_json)
