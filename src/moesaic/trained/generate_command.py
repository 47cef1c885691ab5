"""``moesaic generate``: options, the prompt, the text on the screen, exit status."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from moesaic import ranks
from moesaic.options import parse
from moesaic.train.config import flag
from moesaic.train.errors import UserError
from moesaic.train.flags import LayoutOptions

if TYPE_CHECKING:
    from moesaic.train.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model, and the text that it continues."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A run folder of moesaic train, one of its checkpoints, an export, or another transformers model: a folder, or a
    name on the Hugging Face hub. In a run folder the export is used, or the newest checkpoint if that is newer."""
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """The text that the model continues, or with --chat the message that it answers. - reads it from stdin."""
    chat: bool = False
    """Put the prompt into the tokenizer's chat template, and stop at the end of the answer."""
    system: str | None = None
    """With --chat: a system message before the prompt."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """The dtype of weights and computation. auto: that of the files."""


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen."""

    max_tokens: int = 200
    """The most tokens to add. The model may end its text earlier."""
    temperature: float = 0.8
    """Lower: more likely tokens. 0: always the most likely one."""
    top_p: float = 0.95
    """Choose among the most likely tokens whose probabilities add up to this number. 1: among all."""
    top_k: int = 0
    """Choose among this many of the most likely tokens. 0: among all."""
    seed: int = 0
    """The same seed gives the same text."""
    stream: bool = True
    """Print the text while it is generated. Otherwise at the end."""


@dataclass(frozen=True)
class Options(ModelOptions, SamplingOptions, LayoutOptions):
    """Let a model continue a text, or answer a message. Prints what the model adds.

    Runs in one process, or in many under torchrun, which then share the model: --tp, --ep, --etp and --dp-shard split
    its weights.

    Exit status: 0 success; 1 a checkpoint is damaged; 2 the call cannot work.
    """


def run(arguments: Sequence[str]) -> int:
    """Run ``moesaic generate`` and return its exit status."""
    options = parse(Options, "generate", arguments, speak=ranks.leads_launch())
    from moesaic.trained.on_ranks import run_on_ranks

    return run_on_ranks("generate", _generate, options, check)


def check(options: Options) -> None:
    """Raise `UserError` for values that cannot work."""
    if not (math.isfinite(options.temperature) and options.temperature >= 0):
        raise UserError(f"--temperature must be a number, 0 or more, not {options.temperature}")
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top-p must be more than 0 and at most 1, not {options.top_p}")
    for name, least in (("max_tokens", 1), ("top_k", 0), ("seed", 0)):
        if getattr(options, name) < least:
            raise UserError(f"{flag(name)} must be at least {least}, not {getattr(options, name)}")
    if options.system is not None and not options.chat:
        raise UserError("--system is a message of a conversation; add --chat")


def _generate(options: Options, runtime: Runtime) -> None:
    from moesaic.parallel.build import build_meshes
    from moesaic.parallel.mesh import sizes_in
    from moesaic.train.chat import encode_prompt
    from moesaic.trained import source as sources
    from moesaic.trained.generate import Stream, chat_prompt, end_of_turn, generate
    from moesaic.trained.on_ranks import tell

    prompt = ranks.on_leader(lambda: sys.stdin.read() if options.prompt == "-" else options.prompt)
    found = ranks.on_leader(lambda: sources.find(options.source))
    tokenizer = sources.load_tokenizer(found)
    if options.chat:
        ids, stop = chat_prompt(tokenizer, prompt, options.system), end_of_turn(tokenizer)
    else:
        ids, stop = encode_prompt(tokenizer, prompt), []
    meshes = build_meshes(**sizes_in(options), device_type=runtime.device.type)
    tell(runtime, f"loading {found}")
    model = sources.load(found, meshes, runtime.device, options.dtype)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and len(ids) + options.max_tokens > most:
        tell(
            runtime,
            f"warning: a prompt of {len(ids)} tokens and --max-tokens {options.max_tokens} pass the {most} positions "
            "that the model was made for",
        )
    streams = options.stream and runtime.leader
    added = generate(model, tokenizer, ids, options, meshes, stop=stop, streamer=Stream(tokenizer) if streams else None)
    if runtime.leader and not options.stream:
        print(tokenizer.decode(added, skip_special_tokens=True), flush=True)
    ranks.barrier()
