"""The tokenizer: one that is given, or a byte-level BPE trained on the corpus. Both are transformers tokenizers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moesaic.train.errors import UserError, first_line
from moesaic.train.hub import check_is_name, check_on_hub

END_OF_TEXT = "<|endoftext|>"
# All bytes and the end of text.
SMALLEST_VOCABULARY = 257
_BATCH = 256


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens (fewer if the text has fewer pairs), lossless on any text."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"a vocabulary of {vocab_size} cannot hold all 256 bytes and the end of text: set vocab_size in the model "
            f"config to {SMALLEST_VOCABULARY} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def load(name: str | Path, flag: str = "--tokenizer") -> Any:
    """The transformers tokenizer in a folder, or of a name. Raises `UserError` if there is none or it has no end.

    `flag` is what errors call it.
    """
    if not os.path.exists(name):
        check_is_name(flag, str(name))
        check_on_hub(flag, str(name), "model")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{flag} {name}: transformers cannot load it: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{flag} {name} has no end-of-text token (eos_token), which has to part documents")
    return tokenizer


def identity(tokenizer: Any) -> str:
    """A hash of everything that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = backend.to_str()
    else:
        rules = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(f"{rules}\n{tokenizer.eos_token_id}".encode()).hexdigest()


def bpe_recipe(vocab_size: int) -> str:
    """What, beside the text, decides the outcome of `train_bpe`."""
    return f"byte-level BPE, {vocab_size} tokens, tokenizers {tokenizers.__version__}"


def encode(tokenizer: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    """The tokens of each text, with no special tokens added."""
    for start in range(0, len(texts), _BATCH):
        batch = list(texts[start : start + _BATCH])
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            yield from (found.ids for found in backend.encode_batch_fast(batch, add_special_tokens=False))
        else:
            yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
