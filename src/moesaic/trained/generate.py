"""Text from a model in any layout, by transformers' own `generate`.

Every rank has the same prompt and takes part in every step. Two things are added to `generate`. With cp or tp a rank
has the logits of its part of the sequence, so those of the last token go to all ranks. And all take the scores of
rank 0: ranks round differently, and must not choose different tokens.

With cp a rank has the keys of its part only, and the next token changes who has what. So there is no cache, and every
step computes the whole sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer

from moesaic import ranks
from moesaic.parallel.mesh import Meshes
from moesaic.parallel.sequence import positions_of_parts
from moesaic.train.errors import UserError, first_line
from moesaic.train.model import quiet
from moesaic.trained.generate_command import SamplingOptions


def generate(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    sampling: SamplingOptions,
    meshes: Meshes,
    *,
    stop: Sequence[int] = (),
    streamer: Any = None,
) -> list[int]:
    """The tokens that the model adds to a prompt, the same on all ranks. Collective.

    `stop` are tokens that end the text, beside those of the model and the tokenizer. `streamer` is one of transformers.
    """
    device = next(model.parameters()).device
    inputs = torch.tensor([list(prompt) or [tokenizer.eos_token_id]], device=device)
    own: Any = getattr(model.generation_config, "eos_token_id", None)
    ends = {*([own] if isinstance(own, int) else own or []), tokenizer.eos_token_id, *stop}
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices), quiet(), _whole_logits(model, meshes), torch.no_grad():
        torch.manual_seed(sampling.seed)
        # With cp or tp the model itself refuses: it would not do without what is added here.
        found = type(model).generate(
            model,
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=sampling.max_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.eos_token_id,
            logits_processor=LogitsProcessorList([_OfLeader()]),
            streamer=streamer,
            use_cache=meshes.cp_size == 1,
            **chosen,
        )
    return found[0, inputs.shape[1] :].tolist()


class _OfLeader(LogitsProcessor):
    """The scores of rank 0, on all ranks."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if ranks.active():
            scores = scores.contiguous()
            dist.broadcast(scores, 0)
        return scores


@contextmanager
def _whole_logits(model: Any, meshes: Meshes) -> Iterator[None]:
    """The logits of the last token, on every rank, where a rank would have those of its part of the sequence."""
    if meshes.sequence_parts == 1:
        yield
        return
    group = meshes.sequence_ranks()

    def gather(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        given = kwargs.get("input_ids", args[0] if args else None)
        parts = positions_of_parts(given.shape[1], meshes.cp_size, meshes.tp_size)
        [owner] = [rank for rank, part in enumerate(parts) if part[-1:].tolist() == [given.shape[1] - 1]]
        logits = output.logits
        last = torch.zeros_like(logits[:, :1]) if logits.shape[1] else logits.new_zeros(1, 1, logits.shape[2])
        if owner == group.rank():
            last = logits[:, -1:].contiguous()
        dist.broadcast(last, group=group, group_src=owner)
        output.logits = last
        return output

    # The model refuses these two, since what it gives with them is for somebody who puts the parts together, as here.
    # The logits that `generate` wants to keep would be the last ones of each part.
    cache: list[Any] = []

    def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        cache[:] = [kwargs.get("past_key_values")]
        return args, {name: kwargs[name] for name in kwargs.keys() - {"logits_to_keep", "past_key_values"}}

    def show(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "past_key_values": cache.pop()}

    handles = [
        model.register_forward_pre_hook(hide, prepend=True, with_kwargs=True),
        model.register_forward_pre_hook(show, with_kwargs=True),
        model.register_forward_hook(gather, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Stream(TextStreamer):
    """Prints the text as it comes, without the prompt and special tokens."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)


def chat_prompt(tokenizer: Any, message: str, system: str | None) -> list[int]:
    """The tokens that ask for an answer to a message, by the tokenizer's chat template. Raises `UserError`."""
    messages = [
        *([] if system is None else [{"role": "system", "content": system}]),
        {"role": "user", "content": message},
    ]
    text = _rendered(tokenizer, messages, add_generation_prompt=True)
    # Special tokens are in the template.
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_of_turn(tokenizer: Any) -> list[int]:
    """The special token that the chat template puts behind an answer, if it is one."""
    answer = "moesaic"
    text = _rendered(tokenizer, [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}])
    behind = text[text.rindex(answer) + len(answer) :] if answer in text else ""
    ids = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *(n for n, token in tokenizer.added_tokens_decoder.items() if token.special)}
    return ids[:1] if ids and ids[0] in special else []


def _rendered(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "--chat: the tokenizer of this model has no chat template; leave --chat out, or take a model with one"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:
        raise UserError(f"--chat: the chat template does not take these messages: {first_line(error)}") from error
