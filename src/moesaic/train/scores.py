"""The scores of a model on held-out data, and the prompt at the end: for text and for conversations."""

from __future__ import annotations

import json
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from moesaic.parallel.mesh import Meshes
from moesaic.train import baselines, evaluate
from moesaic.train.chat import Renderer, encode_prompt
from moesaic.train.config import TrainConfig
from moesaic.train.corpus import Conversation
from moesaic.train.packing import Conversations, PackedRows
from moesaic.train.pipelining import passes
from moesaic.train.prepared import PreparedConversations, PreparedText


@runtime_checkable
class Scores(Protocol):
    """What is measured in a run."""

    name: str
    """The name of the number in metrics and result.json."""
    inputs: Tensor
    """The held-out tokens `[N, S]`."""

    def measure(self) -> float:
        """The number for the model as it is now. Collective."""
        ...

    def compare(self, before: float | None, now: float) -> tuple[dict[str, float], str]:
        """The number beside others to compare it with: for result.json, and as text."""
        ...

    def prompt(self) -> tuple[str, list[int]]:
        """The text that the model continues at the end, and its tokens."""
        ...


def measuring(config: TrainConfig, meshes: Meshes, device: torch.device) -> dict[str, Any]:
    """The options of `evaluate.nats` in a run."""
    size = config.batch_size // passes(config)
    return {"meshes": meshes, "batch_size": size, "device": device, "dtype": config.dtype}


def scores_of(
    text: PreparedText | PreparedConversations,
    config: TrainConfig,
    model: nn.Module,
    meshes: Meshes,
    device: torch.device,
) -> Scores:
    """The scores of a model on the held-out part of its data."""
    options = measuring(config, meshes, device)
    if isinstance(text, PreparedConversations):
        return _OfConversations(text, config, model, options)
    return _OfText(text, config, model, options)


class _OfText:
    name = "bits_per_byte"

    def __init__(self, text: PreparedText, config: TrainConfig, model: nn.Module, options: dict[str, Any]):
        self._text = text
        self._prompt = config.prompt
        self._model, self._options = model, options
        assert config.seq_len is not None
        chosen = evaluate.choose_texts(text.held_out(), config.eval_bytes)
        self._held_out = evaluate.cut_windows(chosen, text.tokenizer(), config.seq_len)
        self.inputs = self._held_out.inputs

    def measure(self) -> float:
        return evaluate.bits_per_byte(self._model, self._held_out, **self._options)

    def compare(self, before: float | None, now: float) -> tuple[dict[str, float], str]:
        counts, texts = self._text.byte_counts(), self._held_out.texts
        numbers = {
            "unigram": baselines.unigram_bits(counts, texts),
            "bigram": baselines.bigram_bits(counts, texts),
            **({} if before is None else {"before": before}),
            "model": now,
        }
        names = {
            "unigram": "unigram bytes",
            "bigram": "bigram bytes",
            "before": "before fine-tuning",
            "model": "this model",
        }
        shown = "   ".join(f"{names[name]} {value:.3f}" for name, value in numbers.items())
        size = f"{self._held_out.num_bytes:,} bytes from {len(texts)} documents"
        return numbers, f"held-out text, {size}, in bits per byte:\n  {shown}"

    def prompt(self) -> tuple[str, list[int]]:
        text = "def main(" if self._prompt is None else self._prompt
        return text, self._text.tokenizer()(text, add_special_tokens=False)["input_ids"]


class _OfConversations:
    name = "held_out_loss"

    def __init__(self, text: PreparedConversations, config: TrainConfig, model: nn.Module, options: dict[str, Any]):
        self._prompt = config.prompt
        self._model, self._options = model, options
        self._documents = text.held_out_documents()
        self._renderer = Renderer(text.tokenizer(), config.loss_on)
        count = evaluate.count_within(self._documents, config.eval_bytes)
        everything = text.held_out()
        chosen = Conversations(everything.tokens, everything.counted, everything.ends[:count])
        assert config.seq_len is not None
        rows = PackedRows(chosen, config.seq_len, packed=config.packing, pad_id=text.eos_id)
        rows.check_not_empty("held-out conversation")
        self._count = count - rows.left_out
        self._held_out = evaluate.take_rows(rows)
        self.inputs = self._held_out.inputs

    def measure(self) -> float:
        return evaluate.mean_loss(self._model, self._held_out, **self._options)

    def compare(self, before: float | None, now: float) -> tuple[dict[str, float], str]:
        numbers = {**({} if before is None else {"before": before}), "model": now}
        names = {"before": "before fine-tuning", "model": "this model"}
        shown = "   ".join(f"{names[name]} {value:.3f}" for name, value in numbers.items())
        targets = self._held_out.num_targets
        return numbers, f"held-out: loss of {targets:,} tokens in {self._count} conversations, in nats:\n  {shown}"

    def prompt(self) -> tuple[str, list[int]]:
        given = self._prompt
        document, tokenizer = self._documents[0], self._renderer.tokenizer
        if "prompt" in json.loads(document.text):
            text = self._renderer.prompt(document) if given is None else given
            return text, encode_prompt(tokenizer, text)
        if given is not None:
            asked = json.dumps({"messages": [{"role": "user", "content": given}]})
            document = Conversation("", asked, "--prompt")
        text = self._renderer.prompt(document)
        # Special tokens are in the template.
        return text, tokenizer(text, add_special_tokens=False)["input_ids"]
