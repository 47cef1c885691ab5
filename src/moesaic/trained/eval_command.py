"""``moesaic eval``: options, what is printed, exit status."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from moesaic import ranks
from moesaic.options import parse
from moesaic.train.config import flag
from moesaic.train.errors import UserError
from moesaic.train.flags import LayoutOptions

if TYPE_CHECKING:
    from moesaic.parallel.mesh import Meshes
    from moesaic.train.runtime import Runtime
    from moesaic.train.sets import Measured
    from moesaic.trained.source import Trained


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model, and how it computes."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A run folder of moesaic train, one of its checkpoints, an export, or another transformers model: a folder, or a
    name on the Hugging Face hub. In a run folder the export is used, or the newest checkpoint if that is newer."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """The dtype of the computation; bf16 uses autocast. Weights are fp32."""
    batch_size: int = 8
    """Rows that are computed at the same time, over all ranks. It is rounded up to a multiple of the number of data
    parallel ranks."""


@dataclass(frozen=True)
class DataOptions:
    """The data to measure on."""

    data: str | None = None
    """The data, as for moesaic train: a folder of text files, a file, or a dataset. All of it is measured. By default
    the data that the run has held out."""
    text_column: str | None = None
    """The column with the text, for rows that are not conversations. By default 'text'."""
    loss_on: Literal["assistant", "last", "all"] | None = None
    """Which tokens of a conversation count. By default as in the run, or all messages of the assistant."""
    packing: bool = True
    """Put several conversations into one row, unless the run did not. They do not see each other; a model in which they
    would is refused."""
    seq_len: int | None = None
    """Tokens in a row. By default as in the run. Without a run it is 1,024 for text, and for conversations the length
    of the longest one, if the model has so many positions."""
    max_bytes: int | None = None
    """The most bytes of data to measure. By default as in the run for its held-out data, and 1 MiB for other data."""
    json: bool = False
    """Print the result as one JSON object, with the load of every expert."""


@dataclass(frozen=True)
class Options(ModelOptions, DataOptions, LayoutOptions):
    """Measure a model: loss, perplexity, bits per byte of text, and how its routers spread the tokens.

    Runs in one process, or under torchrun in several, which share the model and the data. The numbers are the same.

    Exit status: 0 success; 1 a checkpoint is damaged; 2 the call cannot work.
    """


def run(arguments: Sequence[str]) -> int:
    """Run ``moesaic eval`` and return its exit status."""
    options = parse(Options, "eval", arguments, speak=ranks.leads_launch())
    from moesaic.trained.on_ranks import run_on_ranks

    return run_on_ranks("eval", _measure, options, check)


def check(options: Options) -> None:
    """Raise `UserError` for values that cannot work."""
    for name, least in (("batch_size", 1), ("seq_len", 2), ("max_bytes", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"{flag(name)} must be at least {least}, not {value}")


def _measure(options: Options, runtime: Runtime) -> None:
    from moesaic.parallel.build import build_meshes
    from moesaic.parallel.mesh import sizes_in
    from moesaic.trained import source as sources
    from moesaic.trained.on_ranks import tell

    found = ranks.on_leader(lambda: sources.find(options.source))
    _check_data(options, found)
    tokenizer = sources.load_tokenizer(found)
    meshes = build_meshes(**sizes_in(options), device_type=runtime.device.type)
    tell(runtime, f"loading {found}")
    model = sources.load(found, meshes, runtime.device, "fp32")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    data, measured = _rows(options, found, tokenizer, positions, runtime)
    result = {
        "source": found.weights,
        "step": found.step,
        "data": data,
        "documents": measured.documents,
        "left_out": measured.left_out,
        **measure(model, measured, options, meshes, runtime),
    }
    if runtime.leader:
        print(json.dumps(result) if options.json else shown(result), flush=True)
    ranks.barrier()


def _check_data(options: Options, found: Trained) -> None:
    if options.data is not None:
        return
    settings = found.settings
    if settings is None:
        raise UserError(f"{options.source} is not a run folder, so nothing is held out; give --data")
    if options.text_column is not None or options.loss_on not in (None, settings.loss_on):
        raise UserError("--text-column and --loss-on are those of the run, without --data; give --data too")


def measure(model: Any, measured: Measured, options: Options, meshes: Meshes, runtime: Runtime) -> dict[str, Any]:
    """The numbers of a model on some rows. Collective."""
    from moesaic.train import evaluate
    from moesaic.train.packing import check_apart
    from moesaic.trained.routing import counting, describe

    if measured.shared:
        vocab_size = model.config.get_text_config().vocab_size
        check_apart(model, meshes, vocab_size=vocab_size, device=runtime.device)
    batch_size = -(-options.batch_size // meshes.dp_size) * meshes.dp_size
    rows = measured.rows
    with counting(model) as loads:
        nats = evaluate.nats(
            model, rows, meshes=meshes, batch_size=batch_size, device=runtime.device, dtype=options.dtype
        )
    loss = nats / rows.num_targets
    result: dict[str, Any] = {"tokens": rows.num_targets, "loss": loss, "perplexity": math.exp(min(loss, 700))}
    if isinstance(rows, evaluate.HeldOutText):
        result |= {"bytes": rows.num_bytes, "bits_per_byte": nats / math.log(2) / rows.num_bytes}
    return result | {"layers": {name: describe(tokens) for name, tokens in loads.tokens.items()}}


def _rows(options: Options, found: Trained, tokenizer: Any, positions: Any, runtime: Runtime) -> tuple[str, Measured]:
    """What the data is called, and its rows."""
    from moesaic.train.architecture import find_model
    from moesaic.train.evaluate import DOCUMENT_CHARACTERS
    from moesaic.train.prepared import PreparedText
    from moesaic.train.run import prepare_on_ranks
    from moesaic.train.sets import Form, as_rows, read_documents
    from moesaic.trained.on_ranks import tell

    settings = found.settings
    # A run without packing may be one of a model that cannot do with it.
    packing = options.packing and (settings is None or settings.packing)
    form: dict[str, Any] = {"packing": packing, "positions": positions if isinstance(positions, int) else None}
    given = {"loss_on": options.loss_on, "seq_len": options.seq_len, "max_bytes": options.max_bytes}

    def notify(text: str) -> None:
        tell(runtime, text)

    if options.data is not None:
        if settings is not None:
            form |= {"loss_on": settings.loss_on, "seq_len": settings.seq_len}
        documents = read_documents(options.data, tokenizer, options.text_column, notify)
        name = options.data
    else:
        assert settings is not None  # _check_data has seen to it
        text = prepare_on_ranks(settings, find_model(settings.model), runtime, notify)
        documents = text.held_out() if isinstance(text, PreparedText) else text.held_out_documents()
        form |= {"loss_on": settings.loss_on, "seq_len": settings.seq_len, "max_bytes": settings.eval_bytes}
        form |= {"characters": DOCUMENT_CHARACTERS}
        name = f"held out of {settings.data}"
    form |= {key: value for key, value in given.items() if value is not None}
    return name, as_rows(documents, tokenizer, Form(**form), notify)


def shown(result: dict[str, Any]) -> str:
    """The result as text."""
    what = (
        f"{result['bytes']:,} bytes of {result['documents']} documents"
        if "bytes" in result
        else (f"{result['documents']} conversations")
    )
    left = f"; {result['left_out']} more are left out (--max-bytes)" if result["left_out"] else ""
    numbers = {"loss": "loss {:.4f}", "perplexity": "perplexity {:.2f}", "bits_per_byte": "bits per byte {:.4f}"}
    lines = [
        f"{result['data']}: {result['tokens']:,} tokens, {what}{left}",
        "   ".join(form.format(result[name]) for name, form in numbers.items() if name in result),
        "",
    ]
    width = max(map(len, ["layer", *result["layers"]]))
    lines.append(f"{'layer':{width}}  busiest expert  entropy  experts without a token")
    for name, layer in result["layers"].items():
        dead = f"{len(layer['dead'])} of {len(layer['tokens'])}"
        lines.append(f"{name:{width}}  {layer['busiest']:11.2f} x    {layer['entropy']:.4f}  {dead}")
    lines += ["", "busiest: over the mean of the layer. Entropy of the load: 1 is balanced, 0 is one expert for all."]
    return "\n".join(lines)
