"""Rows that are conversations: which forms are read, and what is refused before a template sees it."""

import bz2
import csv
import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.train.corpus import documents
from moesaic.train.errors import UserError
from moesaic.train.messages import KNOWN_ROLES, read_messages
from moesaic.train.rows import RowError, read_rows

USER = {"role": "user", "content": "one"}
ANSWER = {"role": "assistant", "content": "ONE"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}

_contents = st.text() | st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": st.text()}), min_size=1, max_size=3
)
_messages = st.fixed_dictionaries(
    {"role": st.sampled_from(sorted(KNOWN_ROLES)), "content": _contents},
    optional={"name": st.text() | st.none(), "tool_calls": st.none(), "id": st.integers(), "weight": st.just(1)},
)
_not_contents = st.none() | st.integers() | st.floats() | st.booleans() | st.just({}) | st.lists(st.text(), max_size=2)


@given(st.lists(_messages, min_size=1, max_size=5))
def test_good_messages_are_read_as_they_are(messages):
    assert read_messages(messages, "messages") == messages


@given(st.lists(_messages, min_size=1, max_size=5), st.data())
def test_one_bad_message_is_found(messages, data):
    number = data.draw(st.integers(1, len(messages)))
    message = dict(messages[number - 1])
    change = data.draw(st.sampled_from(["content", "no content", "role", "no role", "message"]))
    if change == "content":
        message["content"] = data.draw(_not_contents)
    elif change == "no content":
        del message["content"]
    elif change == "role":
        message["role"] = data.draw(st.text() | st.none() | st.integers())
        if message["role"] in KNOWN_ROLES:
            return
    elif change == "no role":
        del message["role"]
    bad = [*messages[: number - 1], "text" if change == "message" else message, *messages[number:]]
    with pytest.raises(RowError, match=rf"^message {number}\b"):
        read_messages(bad, "messages")


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "asistant", "content": "x"}, "message 2 has the role 'asistant', which is unknown; did you mean"),
        ({"role": "Assistant", "content": "x"}, "did you mean 'assistant'?"),
        ({"role": "gpt", "content": "x"}, "did you mean 'assistant'?"),
        ({"role": "assistant"}, "message 2 (assistant) has no 'content', only 'role'"),
        ({"role": "assistant", "contents": "x"}, "message 2 (assistant) has a key 'contents'; did you mean 'content'?"),
        ({"role": "assistant", "content": "", "tool_call": [CALL]}, "did you mean 'tool_calls'?"),
        ({"role": "assistant", "content": None}, "'content' is null, which is allowed beside 'tool_calls' only"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "'content' is null, which is allowed"),
        ({"role": "tool", "content": "x", "tool_calls": [CALL]}, "'tool_calls', which only the assistant can have"),
        ({"role": "assistant", "content": None, "tool_calls": [{"name": ""}]}, "a function and its name, got {'name'"),
        ({"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": 3}]}, "'arguments' must be"),
        ({"role": "assistant", "content": 42}, "'content' must be a string, not int, got 42"),
        ({"role": "assistant", "content": [{"type": "image"}]}, "the parts of 'content' must be text"),
        ({"role": "assistant", "content": "x", "thinking": 3}, "'thinking' must be a string, got 3"),
        ({"role": "assistant", "content": "x", "weight": 0}, "'weight' 0 is not supported"),
        ({"role": "assistant", "content": "\ud83d"}, "rows.jsonl:2: '\\ud83d' is a lone surrogate"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_message_is_said(tmp_path, message, error):
    with pytest.raises(UserError) as raised:
        _read(tmp_path, {"messages": [USER, ANSWER]}, {"messages": [USER, message]})
    assert str(raised.value).startswith(f"--data {tmp_path / 'rows.jsonl'}:2: ")
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_looks_wrong_and_is_not(tmp_path):
    rows = [
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL], "name": None}]},
        {"messages": [ANSWER, USER, {"role": "system", "content": ""}]},
        {"messages": [{"role": "narrator", "content": "x"}, ANSWER]},
    ]
    assert _read(tmp_path, *rows, roles={"narrator"}) == rows
    with pytest.raises(UserError, match="unknown; did you mean 'assistant'"):
        _read(tmp_path, {"messages": [{"role": "model", "content": "x"}]}, roles={"model"})


def test_empty_answers_are_counted(tmp_path):
    notes = []
    rows = [{"messages": [USER, ANSWER | {"content": content}]} for content in ("", " \n", "x")]
    rows.append({"messages": [USER, ANSWER | {"content": "", "tool_calls": [CALL]}]})
    _read(tmp_path, *rows, notify=notes.append)
    where = tmp_path / "rows.jsonl"
    assert notes == [f"--data {where}: conversations with an empty answer, which is learned: 2, first {where}:1"]


def test_sharegpt_rows(tmp_path):
    turns = [
        {"from": "human", "value": "one"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "ONE", "weight": 1},
    ]
    messages = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "1"},
        {**ANSWER, "weight": 1},
    ]
    tools = [{"name": "f"}]
    rows = [
        {"conversations": turns},
        {"conversations": turns, "system": "be loud", "tools": json.dumps(tools)},
        {"conversations": [USER, ANSWER]},
    ]
    assert _read(tmp_path, *rows) == [
        {"messages": messages},
        {"messages": [{"role": "system", "content": "be loud"}, *messages], "tools": tools},
        {"messages": [USER, ANSWER]},
    ]
    for turn, error in [
        ({"from": "gpt"}, r"message 1 \(gpt\) has no 'value'"),
        ({"from": "humn", "value": "x"}, "message 1 has the role 'humn', which is unknown; did you mean 'human'"),
        ({"from": "function_call", "value": "f(1)"}, r"'value' must be a tool call as JSON, got 'f\(1\)'"),
    ]:
        with pytest.raises(UserError, match=error):
            _read(tmp_path, {"conversations": [turn]})


def test_alpaca_rows(tmp_path):
    rows = [
        {"instruction": "add", "input": "1 and 2", "output": "3"},
        {"instruction": "one", "input": "", "output": "ONE"},
        {"instruction": "one", "output": "ONE", "input": None, "system": "be loud", "history": [["zero", "ZERO"]]},
    ]
    before = [{"role": "user", "content": "zero"}, {"role": "assistant", "content": "ZERO"}]
    assert _read(tmp_path, *rows) == [
        {"messages": [{"role": "user", "content": "add\n1 and 2"}, {"role": "assistant", "content": "3"}]},
        {"messages": [USER, ANSWER]},
        {"messages": [{"role": "system", "content": "be loud"}, *before, USER, ANSWER]},
    ]
    for change, error in [
        ({"input": 3}, "'input' must be a string, not int"),
        ({"output": None}, "'output' must not be null"),
        ({"history": [["x"]]}, "'history' must be a list of pairs of strings"),
    ]:
        with pytest.raises(UserError, match=f"rows.jsonl:1: {error}"):
            _read(tmp_path, rows[0] | change)


def test_a_list_of_messages_as_datasets_may_hold_it(tmp_path):
    columns = {"role": ["user", "assistant"], "content": ["one", "ONE"]}
    assert _read(tmp_path, {"messages": columns}, {"messages": [USER]})[0] == {"messages": [USER, ANSWER]}


ROWS = [{"text": "a, b"}, {"text": "NA"}, {"text": "42"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.JSONL", LINES.encode("utf-8-sig")),
        ("rows.ndjson", LINES.replace("\n", "\r\n\r\n").encode()),
        ("rows.jsonl", LINES.encode("utf-16")),
        ("rows.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("rows.json", LINES.encode()),
        ("rows.json", json.dumps(ROWS, indent=2).encode()),
        ("rows.json.bz2", bz2.compress(json.dumps(ROWS).encode())),
        ("rows.csv", b'text\r\n"a, b"\r\nNA\r\n42\r\n'),
    ],
)
def test_forms_of_files(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert [document.text for document in documents(str(tmp_path / name))] == ["a, b", "NA", "42"]


def test_cells_may_be_long(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "rows.csv").write_text(f"text\nx\n{'y' * 2 * limit}\n")
    assert [len(row.values["text"]) for row in read_rows("", tmp_path / "rows.csv")] == [1, 2 * limit]
    assert csv.field_size_limit() == limit


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("rows.jsonl", "", ": there is no text in it"),
        ("rows.json", "", ": there is no text in it"),
        ("rows.jsonl", LINES + '{"text": ' + DEEP + "}", ":4: this JSON is nested too deeply"),
        ("rows.json", f"[{DEEP}]", ": this JSON is nested too deeply"),
        ("rows.json", "[1]", ", row 1: expected an object such as"),
        ("rows.json", '{\n"version": 1}', ": no column 'messages'"),
        ("rows.csv", "text,n\na\n", ": one line of text is too few"),
        ("rows.csv", "text,n\na,1,2\n", ":2: this row has more cells than the first line has columns"),
        ("rows.csv", 'text\n"a\n', ":2: not a row of CSV"),
        ("rows.csv", "n,text\n1\n", ":2: 'text' must not be null"),
    ],
)
def test_broken_files_of_rows(tmp_path, name, text, error):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as raised:
        documents(str(tmp_path / name))
    assert str(raised.value).startswith(f"--data {tmp_path / name}{error}")


def _read(folder, *rows, **options):
    path = folder / "rows.jsonl"
    last = {"messages": [USER, {**ANSWER, "content": "another"}]}
    rows = (*rows, last) if len(rows) == 1 and "messages" in rows[0] else rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [json.loads(document.text) for document in documents(str(path), **options)]
