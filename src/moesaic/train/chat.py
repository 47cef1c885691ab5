"""Conversations as tokens, by the tokenizer's own chat template, and which of the tokens are learned.

Learned are the answers: what the template puts between `{% generation %}` and `{% endgeneration %}` or, where it has no
such marks, what rendering one more message adds to the prompt for it. That is checked: the prompt has to be how the
whole conversation begins. Some templates render an answer otherwise once others follow it, and are refused for that.
A token is learned if any of its characters is of an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from moesaic.train.corpus import Conversation
from moesaic.train.errors import UserError, first_line
from moesaic.train.printed import are_printed, find_fault, forms_of

LossOn = Literal["assistant", "last", "all"]
_QUOTED = re.compile(r"""(["'])(\w+)\1""")
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Rendered(NamedTuple):
    """A conversation's tokens, and of each whether it is a target."""

    ids: list[int]
    counted: list[bool]


class Renderer:
    """Renders conversations with a tokenizer. Raises `UserError` if it has no chat template where one is needed.

    Attributes:
        without_tools: How many conversations had tools that the template does not print.
    """

    def __init__(self, tokenizer: Any, loss_on: LossOn):
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.without_tools = 0

    def render(self, conversation: Conversation) -> Rendered:
        """Its tokens. `UserError` names the file and line of a conversation that cannot be rendered."""
        with _not_too_deep(conversation):
            return self._render(conversation)

    def prompt(self, conversation: Conversation) -> str:
        """The text that asks for its last answer; the same for a conversation without one asks for the first."""
        with _not_too_deep(conversation):
            return self._prompt(conversation)

    def _render(self, conversation: Conversation) -> Rendered:
        values = json.loads(conversation.text)
        if "prompt" in values:
            return self._render_completion(values["prompt"], values["completion"])
        messages, tools = values["messages"], values.get("tools")
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers and self.loss_on != "all":
            raise UserError(
                f"--data {conversation.place}: no message has the role 'assistant', so there is nothing to learn; take "
                "it out, or choose --loss-on all"
            )
        messages, text = self._suited(conversation, messages, tools)
        if tools and not are_printed(tools, text):
            self.without_tools += 1
        if self.loss_on == "all":
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return Rendered(ids, [True] * len(ids))
        if not self.tokenizer.is_fast:
            raise UserError(
                f"--tokenizer: {type(self.tokenizer).__name__} does not tell where in the text its tokens are, which "
                "decides what is learned; choose --loss-on all, or give a tokenizer with a tokenizer.json"
            )
        if self.loss_on == "assistant" and _MARKS.search(self._template(conversation)):
            spans = self._marked(conversation, messages, tools, text)
        else:
            chosen = answers if self.loss_on == "assistant" else answers[-1:]
            spans = [self._span(conversation, messages, tools, text, index) for index in chosen]
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        counted = [any(_overlap(token, span) for span in spans) for token in found["offset_mapping"]]
        return Rendered(found["input_ids"], counted)

    def _prompt(self, conversation: Conversation) -> str:
        values = json.loads(conversation.text)
        if "prompt" in values:
            return values["prompt"]
        messages = values["messages"]
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        asked = messages[: answers[-1]] if answers and answers[-1] else messages
        return self._suited(conversation, asked, values.get("tools"), add_generation_prompt=True)[1]

    def _render_completion(self, prompt: str, completion: str) -> Rendered:
        """Encoded apart, as a prompt is when the model is asked to go on; then the end of text."""
        end = self.tokenizer.eos_token_id
        asked = encode_prompt(self.tokenizer, prompt)
        said = [*self.tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"], end]
        return Rendered(asked + said, [self.loss_on == "all"] * len(asked) + [True] * len(said))

    def _marked(self, conversation: Conversation, messages: list, tools: Any, text: str) -> list[tuple[int, int]]:
        """Where what the template marks as answers is in the rendered text."""
        # Without the keys that have no value, as `apply_chat_template` gives messages to a template.
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        rendered: Any = render_jinja_template(
            [given],
            tools=tools,
            chat_template=self._template(conversation),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        (marked,), (spans,) = rendered
        if marked != text:
            raise UserError(
                f"--data {conversation.place}: the chat template renders this conversation differently each time; "
                "choose --loss-on all"
            )
        return spans

    def _span(self, conversation: Conversation, messages: list, tools: Any, text: str, index: int) -> tuple[int, int]:
        """Where answer `index` is in the rendered text, from what asks for it to its end."""
        start = self._apply(conversation, messages[:index], tools, add_generation_prompt=True) if index else ""
        end = self._apply(conversation, messages[: index + 1], tools)
        if not (text.startswith(end) and end.startswith(start) and index):
            raise UserError(
                f"--data {conversation.place}: cannot tell which tokens message {index + 1} is: the chat template "
                "renders a conversation otherwise when it goes on, or has no prompt for it. Mark answers in the "
                "template with {% generation %} and {% endgeneration %}, or choose --loss-on last, or all"
            )
        return len(start), len(end)

    def _suited(self, conversation: Conversation, messages: list, tools: Any, **options: Any) -> tuple[list, str]:
        """The messages in the form that the template takes, and the text it makes of them."""
        problem: UserError | None = None
        for form in forms_of(messages):
            try:
                text = self._apply(conversation, form, tools, **options)
            except UserError as error:
                problem = problem or error
                continue
            fault = find_fault(text, form)
            if fault is None:
                return form, text
            problem = problem or UserError(
                f"--data {conversation.place}: the tokenizer's chat template {fault}; give a tokenizer whose template "
                "does with --tokenizer, or take the conversation out"
            )
        assert problem is not None
        raise problem

    def _apply(self, conversation: Conversation, messages: Sequence[Any], tools: Any, **options: Any) -> Any:
        self._template(conversation)
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **{"tokenize": False, **options})
        except Exception as error:
            raise UserError(
                f"--data {conversation.place}: the tokenizer's chat template does not take this conversation: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error

    def _template(self, conversation: Conversation) -> str:
        template = getattr(self.tokenizer, "chat_template", None)
        if not template:
            raise UserError(
                f"--data {conversation.place}: a conversation, but the tokenizer has no chat template; give one that "
                "has with --tokenizer, or use rows of 'prompt' and 'completion'"
            )
        try:
            return self.tokenizer.get_chat_template(tools=json.loads(conversation.text).get("tools"))
        except ValueError as error:
            raise UserError(
                f"--data {conversation.place}: the tokenizer has chat templates, but none for this: {error}"
            ) from error


@contextmanager
def _not_too_deep(conversation: Conversation) -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        raise UserError(
            f"--data {conversation.place}: this conversation is nested too deeply to be rendered; take it out"
        ) from error


def named_in_template(tokenizer: Any) -> frozenset[str]:
    """The words that a tokenizer's chat templates have in quotes, which the roles of its own are among."""
    template = getattr(tokenizer, "chat_template", None) or ""
    templates = template.values() if isinstance(template, dict) else [template]
    return frozenset(word for text in templates for _, word in _QUOTED.findall(text))


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt without a template: with what the tokenizer puts before a text, and no end of text."""
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _overlap(token: tuple[int, int], span: tuple[int, int]) -> bool:
    """Whether a token has a character of the span. One without characters, as a space may be, is where it begins."""
    (start, end), (first, last) = token, span
    return max(start, first) < min(end, last) or (start == end and first <= start < last)
