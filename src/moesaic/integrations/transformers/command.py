"""``moesaic convert`` and ``moesaic upcycle``: options, a progress bar, exit status."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers.utils import logging as transformers_logging

from moesaic.checkpoint import CheckpointError
from moesaic.integrations.transformers.convert import convert
from moesaic.integrations.transformers.progress import Progress
from moesaic.integrations.transformers.upcycle import upcycle
from moesaic.options import parse

_ERRORS = (OSError, ValueError, NotImplementedError)


@dataclass(frozen=True)
class ConvertOptions:
    """Convert a transformers checkpoint to the format of moesaic train (DCP), or back, and verify the result.

    To cast a transformers checkpoint, use --to hf --dtype bfloat16. To add adapters (LoRA) to its weights, use
    --adapter. With --to peft the adapters of a run become files of peft, and with --to dcp a folder of such files
    becomes a checkpoint of adapters.

    Tensors are read and written one by one. Peak memory is twice the experts of one layer, plus one file of the result.

    Exit status: 0 success; 1 the verification failed, or a checkpoint is damaged; 2 the call cannot work.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A transformers checkpoint (a folder or a name on the hub), a run folder, one checkpoint in a run folder, or a
    folder of adapters of peft."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The folder to write."""
    to: Literal["dcp", "hf", "peft"] | None = None
    """The format to write. By default dcp if SRC is hf or peft, and hf if it is dcp. From hf to hf, or from peft to
    peft, another option must change something."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Cast tensors to this dtype, except those that transformers keeps in float32. By default no tensor is cast."""
    ignore_unexpected: bool = False
    """Skip tensors of SRC that the language model does not have, such as a vision model or MTP layers. The program
    prints how many."""
    adapter: str | None = None
    """A folder of adapters of peft. They are added to the weights of SRC, a transformers checkpoint."""
    base: str | None = None
    """If SRC is a folder of adapters: the model that they belong to. By default the model that their config names."""
    each_expert: bool = False
    """With --to peft: write a pair of tensors for each expert, under the names of the model's files."""


@dataclass(frozen=True)
class UpcycleOptions:
    """Turn a dense checkpoint into a mixture-of-experts checkpoint. Without noise both models compute the same.

    Llama and Mistral become Mixtral, Qwen2 becomes Qwen2-MoE, and Qwen3 becomes Qwen3-MoE.

    Exit status: 0 success; 2 the call cannot work.
    """

    dense: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DENSE")]
    """A dense transformers checkpoint: a folder, or a name on the hub."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The folder to write."""
    experts: int
    """Number of experts in a layer."""
    top_k: int
    """Number of experts for each token."""
    granularity: int = 1
    """Cut the dense feed-forward layer into this many slices; each expert gets one slice. Must divide --experts,
    --top-k and the hidden dim."""
    noise: float = 0.0
    """Standard deviation of noise on the experts' weights, as a fraction of the weights' own."""
    seed: int = 0
    """Seed of the router's weights and the noise."""


def run_convert(arguments: Sequence[str]) -> int:
    """Run ``moesaic convert`` and return its exit status."""
    options = parse(ConvertOptions, "convert", arguments)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    try:
        with _bar() as progress:
            convert(
                options.source,
                options.target,
                to=options.to,
                dtype=dtype,
                ignore_unexpected=options.ignore_unexpected,
                adapter=options.adapter,
                base=options.base,
                each_expert=options.each_expert,
                progress=progress,
            )
    except CheckpointError as error:
        return _fail("convert", error, 1)
    except _ERRORS as error:
        return _fail("convert", error, 2)
    print(f"{options.target}: written and verified")
    return 0


def run_upcycle(arguments: Sequence[str]) -> int:
    """Run ``moesaic upcycle`` and return its exit status."""
    options = parse(UpcycleOptions, "upcycle", arguments)
    try:
        with _bar() as progress:
            upcycle(
                options.dense,
                options.out,
                experts=options.experts,
                top_k=options.top_k,
                granularity=options.granularity,
                noise=options.noise,
                seed=options.seed,
                progress=progress,
            )
    except _ERRORS as error:
        return _fail("upcycle", error, 2)
    print(f"{options.out}: written")
    return 0


def _fail(command: str, error: Exception, status: int) -> int:
    print(f"moesaic {command}: {error}", file=sys.stderr, flush=True)
    return status


@contextmanager
def _bar() -> Iterator[Progress]:
    """A progress bar, on a terminal only. Advice of transformers is switched off meanwhile."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    try:
        with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
            yield _progress_on(bar)
    finally:
        transformers_logging.set_verbosity(verbosity)


def _progress_on(bar: Bar) -> Progress:
    def begin(what: str, num_bytes: int) -> None:
        bar.add_task(what, total=num_bytes)

    def advance(num_bytes: int) -> None:
        bar.advance(bar.task_ids[-1], num_bytes)

    return Progress(begin, advance)
