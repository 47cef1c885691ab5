"""Which tokens a conversation becomes, and which of them are learned."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from moesaic.train.chat import Renderer, encode_prompt
from moesaic.train.corpus import Conversation, documents, split
from moesaic.train.errors import UserError
from moesaic.train.tokenizer import train_bpe
from tests.train.chats import CHANGING, MARKED, PLAIN, tiny_tokenizer, write_chats

MESSAGES = [
    {"role": "system", "content": "be loud"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "ONE"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "TWO"},
]
WHOLE = "<system>be loud</end><user>one</end><assistant>ONE</end><user>two</end><assistant>TWO</end>"


def _render(template, loss_on, **values):
    tokenizer = tiny_tokenizer(template)
    values = values or {"messages": MESSAGES}
    rendered = Renderer(tokenizer, loss_on).render(Conversation("", json.dumps(values), "chats.jsonl:7"))
    assert len(rendered.ids) == len(rendered.counted)
    learned = [token for token, counted in zip(rendered.ids, rendered.counted, strict=True) if counted]
    return tokenizer.decode(rendered.ids), tokenizer.decode(learned), tokenizer


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize(
    ("loss_on", "learned"), [("assistant", "ONE</end>TWO</end>"), ("last", "TWO</end>"), ("all", WHOLE)]
)
def test_answers_are_learned_up_to_their_end(template, loss_on, learned):
    assert _render(template, loss_on)[:2] == (WHOLE, learned)


# Its prompt ends in a space, which tokenizers put into the first token of the answer.
SPACED_MARKED = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}\n"
    "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPACED = SPACED_MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def _learned(tokenizer, loss_on="assistant"):
    rendered = Renderer(tokenizer, loss_on).render(
        Conversation("", json.dumps({"messages": MESSAGES}), "chats.jsonl:7")
    )
    return [tokenizer.decode([i]) for i, counted in zip(rendered.ids, rendered.counted, strict=True) if counted]


@pytest.mark.parametrize("template", [SPACED, SPACED_MARKED], ids=["plain", "marked"])
def test_a_token_across_the_end_of_the_prompt_is_learned(template):
    tokenizer = train_bpe(["assistant: ONE\n", "assistant: TWO\n"] * 50, 280)
    tokenizer.chat_template = template
    assert _learned(tokenizer) == [" ONE", "\n", " TWO", "\n"]


@pytest.mark.parametrize("template", [SPACED, SPACED_MARKED], ids=["plain", "marked"])
def test_an_answer_may_end_in_what_is_no_token(template):
    words = ["</s>", "[UNK]", "system", "user", "assistant", ":", "be", "loud", "one", "two", "ONE", "TWO"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]")
    tokenizer.chat_template = template
    assert _learned(tokenizer) == ["ONE", "TWO"]


def test_a_tokenizer_without_offsets_learns_all_or_nothing():
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = PLAIN
    assert "".join(_learned(tokenizer, "all")) == WHOLE
    with pytest.raises(UserError, match="--tokenizer: ByT5Tokenizer does not tell where .*--loss-on all"):
        _learned(tokenizer)


def test_a_template_that_changes_what_was_said_is_refused():
    with pytest.raises(UserError, match=r"--data chats.jsonl:7: cannot tell which tokens message 3 is.*--loss-on last"):
        _render(CHANGING, "assistant")
    assert _render(CHANGING, "last")[1] == "TWO</end>"
    assert _render(CHANGING, "all")[1].count("*") == 1


def test_prompt_and_completion_need_no_template():
    whole, learned, tokenizer = _render(None, "assistant", prompt="one is ", completion="ONE")
    assert whole == f"one is ONE{tokenizer.eos_token}"
    assert learned == f"ONE{tokenizer.eos_token}"
    assert _render(None, "all", prompt="one is ", completion="ONE")[1] == whole


def test_a_prompt_is_asked_as_it_was_trained():
    tokenizer = tiny_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<system>", tokenizer.eos_token)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<system> $A {tokenizer.eos_token}", special_tokens=special
    )
    row = Conversation("", json.dumps({"prompt": "one is ", "completion": "ONE"}))
    rendered = Renderer(tokenizer, "assistant").render(row)
    asked = encode_prompt(tokenizer, "one is ")
    assert tokenizer.decode(asked) == "<system>one is "
    assert asked == rendered.ids[: rendered.counted.index(True)]


def test_tools_reach_the_template():
    template = "{{ tools | length }} tools" + PLAIN
    assert _render(template, "last", messages=MESSAGES, tools=[{"name": "f"}])[0].startswith("1 tools<system>")


def test_the_prompt_asks_for_the_last_answer():
    prompt = Renderer(tiny_tokenizer(), "assistant").prompt(Conversation("", json.dumps({"messages": MESSAGES})))
    assert WHOLE.startswith(prompt)
    assert prompt.endswith("<user>two</end><assistant>")


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            None,
            MESSAGES,
            "chats.jsonl:7: a conversation, but the tokenizer has no chat template.*--tokenizer",
        ),
        (PLAIN, MESSAGES[:2], "chats.jsonl:7: no message has the role 'assistant'.*--loss-on all"),
        (PLAIN, MESSAGES[2:], "chats.jsonl:7: cannot tell which tokens message 1 is"),
        ({"rag": PLAIN}, MESSAGES, "chats.jsonl:7: the tokenizer has chat templates, but none for this"),
        ("{{ raise_exception('no system') }}", MESSAGES, "chats.jsonl:7: .* does not take this .*: no system"),
    ],
    ids=["no template", "no answer", "no question", "no default", "template refuses"],
)
def test_errors_name_the_line(template, messages, message):
    with pytest.raises(UserError, match=message):
        _render(template, "assistant", messages=messages)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "rows.jsonl:2: not a line of JSON"),
        ("[1]", 'rows.jsonl:2: expected an object such as {"text": ...}, got list'),
        ('{"text": "x"}', "rows.jsonl:2: no 'messages', which the first row has"),
        ('{"messages": []}', "rows.jsonl:2: 'messages' must be a list of messages, and not empty"),
        ('{"messages": [{"content": "x"}]}', "rows.jsonl:2: message 1 must be an object with 'role' and 'content'"),
        ("\xff", "rows.jsonl:2: not UTF-8 (invalid start byte); convert it"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps({"messages": MESSAGES}).encode() + b"\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError) as error:
        documents(str(path))
    assert message in str(error.value)


def test_which_column_is_taken(tmp_path):
    path = tmp_path / "rows.jsonl"

    def kind(text_column=None, **row):
        rows = [row, {name: value + value for name, value in row.items()}]
        path.write_text("\n\n".join(map(json.dumps, rows)))
        found = documents(str(path), text_column)
        return type(found[0]).__name__, json.loads(found[0].text) if isinstance(found[0], Conversation) else None

    assert kind(messages=MESSAGES, text="x", prompt="p") == ("Conversation", {"messages": MESSAGES})
    assert kind(prompt="p", completion="c") == ("Conversation", {"prompt": "p", "completion": "c"})
    for row in ({"prompt": "p", "completion": 3}, {"prompt": "p"}):
        with pytest.raises(UserError, match=r"rows.jsonl:1: (no column|'completion' must be a string, not int)"):
            kind(**row)


def test_a_folder_of_json_lines_and_what_is_held_out(tmp_path):
    (tmp_path / "chats").mkdir()
    for part in range(2):
        write_chats(tmp_path / "chats" / f"{part}.jsonl", seed=part, count=5)
    corpus = documents(str(tmp_path / "chats"))
    assert isinstance(corpus[-1], Conversation)
    assert corpus[-1].place.startswith(str(tmp_path / "chats" / "1.jsonl:"))
    train, held_out = split(corpus)
    # Of so few, none would be by its hash.
    assert len(held_out) == 1
    assert {document.key for document in corpus} == {document.key for document in train + held_out}
    with pytest.raises(UserError, match="one conversation is too few"):
        documents(str(write_chats(tmp_path / "one.jsonl", count=1)))


PARTS = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}</end>{% endfor %}"
STRINGS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% endif %}</end>{% endfor %}"
)
CONCATENATED = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</end>' }}{% endfor %}"
BOTH = PARTS.replace("{% for p", "{% if m.content is string %}{{ m.content }}{% else %}{% for p").replace(
    "{% endfor %}</end>", "{% endfor %}{% endif %}</end>"
)


@pytest.mark.parametrize("template", [PLAIN, MARKED, PARTS, STRINGS, CONCATENATED, BOTH])
def test_strings_and_lists_of_parts_train_alike_under_any_template(template):
    parts = [
        {**message, "content": [{"type": "text", "text": part} for part in (message["content"], "")]}
        for message in MESSAGES
    ]
    expected = (WHOLE, WHOLE)
    assert _render(template, "all", messages=MESSAGES)[:2] == expected
    assert _render(template, "all", messages=parts)[:2] == expected
    assert _render(template, "all", messages=[*parts[:2], *MESSAGES[2:]])[:2] == expected
    if template in (PLAIN, MARKED):
        assert _render(template, "last", messages=parts)[1] == "TWO</end>"
    asked = Conversation("", json.dumps({"messages": MESSAGES[1:2]}))
    assert Renderer(tiny_tokenizer(template), "last").prompt(asked).startswith("<user>one</end>")


CALL = {"name": "f", "arguments": {"city": "Zürich", "days": [1, {"two": True}]}}
CALLS = "{% for c in m.tool_calls %}call {{ c.function.name }} ARGUMENTS{% endfor %}</end>"
JSON_CALL = 'call f {"city": "Zürich", "days": [1, {"two": true}]}'


@pytest.mark.parametrize("arguments", [CALL["arguments"], json.dumps(CALL["arguments"], ensure_ascii=False)])
@pytest.mark.parametrize(
    "printed",
    [
        "{{ c.function.arguments | tojson }}",
        "{{ c.function.arguments }}",
        "{{ '' + c.function.arguments }}",
        "{% set a = c.function.arguments %}{{ a if a is string else a | tojson }}",
    ],
)
def test_arguments_of_tool_calls_are_json_under_any_template(printed, arguments):
    template = PLAIN.replace("{{ m.content }}</end>", "{{ m.content }}" + CALLS.replace("ARGUMENTS", printed))
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [MESSAGES[1], {"role": "assistant", "content": None, "tool_calls": [call]}]
    whole, learned, _ = _render(template, "assistant", messages=messages)
    assert whole == f"<user>one</end><assistant>{JSON_CALL}</end>"
    assert learned == f"{JSON_CALL}</end>"


@pytest.mark.parametrize(
    ("template", "answer", "fault"),
    [
        (PLAIN, {"content": "", "tool_calls": [{"function": CALL}]}, "does not print the call of 'f' in message 2"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", {"content": "ONE"}, "does not print what message 1 says"),
        (
            "{% for m in messages %}{{ '' + m.content if m.role == 'user' else m.content[0] }}{% endfor %}",
            {"content": [{"type": "text", "text": "yes"}]},
            "prints the parts of message 2 as code",
        ),
    ],
)
def test_a_template_that_does_not_print_an_answer_is_refused(template, answer, fault):
    with pytest.raises(UserError, match=f"chats.jsonl:7: the tokenizer's chat template {fault}.*--tokenizer"):
        _render(template, "all", messages=[MESSAGES[1], {"role": "assistant", **answer}])


def test_what_a_template_changes_by_intent_is_no_fault():
    thoughts = {"role": "assistant", "content": "<think>hm</think>ONE"}
    split = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] | upper | tojson }}</end>{% endfor %}"
    )
    assert _render(split, "all", messages=[MESSAGES[1], thoughts])[0] == '<user>"ONE"</end><assistant>"ONE"</end>'


def test_a_conversation_that_is_nested_too_deeply_is_named():
    tools = '[{"name": "f", "deep": ' + "[" * 100_000 + "]" * 100_000 + "}]"
    text = f'{{"messages": {json.dumps(MESSAGES)}, "tools": {tools}}}'
    with pytest.raises(UserError, match="chats.jsonl:7: this conversation is nested too deeply"):
        Renderer(tiny_tokenizer(), "all").render(Conversation("", text, "chats.jsonl:7"))


def test_tools_that_the_template_does_not_print_are_counted():
    renderer = Renderer(tiny_tokenizer(), "all")
    for name in ("f", "user"):
        tools = [{"type": "function", "function": {"name": name}}]
        renderer.render(Conversation("", json.dumps({"messages": MESSAGES, "tools": tools})))
    assert renderer.without_tools == 1
