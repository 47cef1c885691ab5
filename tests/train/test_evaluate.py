"""Bits per byte: every token of the text counts once, on any layout."""

from math import log2
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedConfig

from moesaic.parallel import build_meshes
from moesaic.train import evaluate
from moesaic.train.corpus import Document
from moesaic.train.tokenizer import train_bpe

TEXTS = ["one two three four\n" * 3, "fünf, sechs", "x"]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 270)


class _Uniform(nn.Module):
    """Every token is equally likely."""

    config = PreTrainedConfig()

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.vocab_size))


class _Next(nn.Module):
    """Thinks the next token is the present one plus one, with probability e^2 against e^0 for each other."""

    config = PreTrainedConfig()

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, input_ids, use_cache):
        guess = nn.functional.one_hot((input_ids + 1) % self.vocab_size, self.vocab_size)
        return SimpleNamespace(logits=2.0 * guess)


@pytest.mark.parametrize("seq_len", [2, 5, 7, 1000])
def test_windows_have_every_token_of_the_text_as_target_once(bpe, seq_len):
    held_out = evaluate.cut_windows(TEXTS, bpe, seq_len)
    targets = held_out.targets.flatten()
    ids = [bpe(text)["input_ids"] for text in TEXTS]
    assert targets[targets >= 0].tolist() == [token for part in ids for token in part]
    assert held_out.num_bytes == sum(len(text.encode()) for text in TEXTS)
    # A target is what comes next: its window's next input, where there is one.
    assert (held_out.inputs[:, 1:] == held_out.targets[:, :-1])[held_out.targets[:, :-1] >= 0].all()
    assert held_out.inputs[0, 0] == bpe.eos_token_id


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_bits_of_a_uniform_model_are_known(bpe, batch_size):
    held_out = evaluate.cut_windows(TEXTS, bpe, 5)
    tokens = sum(len(bpe(text)["input_ids"]) for text in TEXTS)
    model = _Uniform(512).train()
    bits = evaluate.bits_per_byte(
        model, held_out, meshes=build_meshes(), batch_size=batch_size, device=torch.device("cpu"), dtype="fp32"
    )
    assert bits == pytest.approx(tokens * log2(512) / held_out.num_bytes)
    assert model.training


def _bits_on_ranks(held_out, **layout):
    meshes = build_meshes(**layout)
    model = _Next(300)

    # As the parallel model does, a rank only gives the logits of its part of the sequence.
    def shard(module, args, output):
        return SimpleNamespace(logits=output.logits[:, meshes.sequence_positions(output.logits.shape[1])])

    model.register_forward_hook(shard)
    return evaluate.bits_per_byte(
        model, held_out, meshes=meshes, batch_size=4, device=torch.device("cpu"), dtype="fp32"
    )


@pytest.mark.parametrize("layout", [{"tp": 1}, {"cp": 2, "tp": 2}, {"tp": 4}], ids=str)
def test_bits_do_not_depend_on_the_layout(bpe, ranks, layout):
    held_out = evaluate.cut_windows(TEXTS, bpe, 5)
    expected = _bits_on_ranks(held_out)
    found = ranks(_bits_on_ranks, 4, held_out, **layout)
    assert found == [found[0]] * 4
    assert found[0] == pytest.approx(expected)


@given(st.lists(st.text(max_size=40), max_size=5), st.integers(1, 100))
def test_texts_are_beginnings_within_the_budget(texts, budget):
    documents = [Document(str(index), text) for index, text in enumerate(texts)]
    chosen = evaluate.choose_texts(documents, budget)
    size = sum(len(text.encode()) for text in chosen)
    total = sum(len(text.encode()) for text in texts)
    assert size <= budget
    # At most what remains of a character is lost, in each document that did not fit.
    assert size >= min(budget, total) - 3
    filled = iter(texts)
    for part in chosen:
        assert any(text.startswith(part) for text in filled)


def test_long_documents_leave_room_for_others():
    chosen = evaluate.choose_texts([Document("a", "x" * 10**6), Document("b", "y")], 10**6)
    assert [len(text) for text in chosen] == [16_384, 1]
