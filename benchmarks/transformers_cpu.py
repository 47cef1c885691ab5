"""transformers models on CPU by implementation of their experts, and what dispatching their tokens puts on the wire.

Tokens per second of the forward pass, of forward and backward, and of `generate()` with batches of 1 and 8, for small
models with the proportions of large ones. All implementations run on one and the same model, interleaved in one
process, and medians are compared. `batched_mm` copies an expert's weights for each token that goes to it: its time is
by the token, and it gets few of them in the forward and backward passes. Bytes on the wire: see `wire_bytes.py`.

    python benchmarks/transformers_cpu.py [--quick] [--threads 1] [--json benchmarks/results/NAME.json]
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import tyro
import wire_bytes
from as_they_come import QUICK, Results
from experts_cpu import medians
from grouped_mm_cpu import Machine, processor
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moesaic.integrations.transformers import register

OURS, DEFAULT = "moesaic", "grouped_mm"
IMPLEMENTATIONS = ("eager", "batched_mm", DEFAULT, OURS)
SEQUENCES, LENGTH = 2, 256
FEW = 16  # of each sequence, for `batched_mm`
PROMPT, NEW = 16, 16
RESULTS = Path(__file__).parent / "results"

_COMMON = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "experts_implementation": DEFAULT,
}


@dataclass(frozen=True)
class Model:
    """A family and the sizes of its MoE blocks: E experts, top K, D model dim, F expert hidden dim."""

    name: str
    classes: str
    E: int
    K: int
    F: int
    config: dict[str, Any]
    D: int = _COMMON["hidden_size"]

    def build(self, dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.classes}Config")(**_COMMON | self.config)
        return getattr(transformers, f"{self.classes}ForCausalLM")(config).to(dtype).eval()


MODELS = (
    Model(
        "Mixtral", "Mixtral", 8, 2, 1792, {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1792}
    ),
    Model(
        "Qwen3-MoE",
        "Qwen3Moe",
        128,
        8,
        192,
        {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 192, "norm_topk_prob": True},
    ),
    # Latent attention, a dense first layer, a shared expert, and routing by groups.
    Model(
        "DeepSeek-V3",
        "DeepseekV3",
        64,
        8,
        192,
        {
            "n_routed_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 192,
            "intermediate_size": 1024,
            "n_shared_experts": 1,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 1,
            "num_hidden_layers": 3,
            "num_key_value_heads": 8,
            "q_lora_rank": 192,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 64,
            "head_dim": 32,
        },
    ),
)
Part = Literal["forward", "forward+backward", "generate", "wire"]


@dataclass(frozen=True)
class Options:
    """What to run."""

    quick: Annotated[bool, tyro.conf.arg(help=QUICK)] = False
    rounds: Annotated[int, tyro.conf.arg(help="timed rounds; every implementation runs once a round")] = 3
    threads: Annotated[int, tyro.conf.arg(help="torch threads")] = 1
    models: Annotated[tuple[str, ...], tyro.conf.arg(help="names of models to run")] = tuple(m.name for m in MODELS)
    dtypes: Annotated[tuple[Literal["float32", "bfloat16"], ...], tyro.conf.arg(help="dtypes")] = (
        "float32",
        "bfloat16",
    )
    parts: Annotated[tuple[Part, ...], tyro.conf.arg(help="what to measure")] = (
        "forward",
        "forward+backward",
        "generate",
        "wire",
    )
    json: Annotated[
        Path | None, tyro.conf.arg(help="the numbers go to this file; by default one in benchmarks/results")
    ] = None


@dataclass(frozen=True)
class Pass:
    """What is run, on which tokens, and how many its time is divided by."""

    name: str
    run: Callable[[Any, Tensor], Any]
    ids: Tensor
    few: Tensor
    new: int | None = None

    def call(self, model: Any, implementation: str) -> Callable[[], Any]:
        ids = self.ids_of(implementation)

        def call() -> Any:
            # Sets an attribute of the configurations, which is nothing beside what is timed.
            model.set_experts_implementation(implementation)
            return self.run(model, ids)

        return call

    def ids_of(self, implementation: str) -> Tensor:
        return self.few if implementation == "batched_mm" else self.ids

    def tokens(self, implementation: str) -> int:
        ids = self.ids_of(implementation)
        return ids.numel() if self.new is None else ids.shape[0] * self.new


def passes(part: str) -> list[Pass]:
    ids = torch.randint(3, 1024, (8, LENGTH), generator=torch.Generator().manual_seed(1))
    if part == "generate":
        prompts = ids[:, :PROMPT]
        return [Pass(f"generate, batch {n}", generate, prompts[:n], prompts[:n], NEW) for n in (1, 8)]
    batch = ids[:SEQUENCES]
    return [Pass(part, forward if part == "forward" else step, batch, batch[:, :FEW])]


@torch.no_grad()
def forward(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def step(model: Any, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def generate(model: Any, ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)


def check_equal(model: Any, dtype: torch.dtype) -> None:
    """Fast and wrong does not count.

    The median over tokens: in half precision near ties of later layers go elsewhere.
    """
    (one,) = passes("forward")
    results = {name: one.call(model, name)().double() for name in (DEFAULT, OURS)}
    errors = (results[OURS] - results[DEFAULT]).norm(dim=-1) / results[DEFAULT].norm(dim=-1)
    assert errors.median() < (1e-5 if dtype == torch.float32 else 2e-2), f"error {errors.median():.2g}"


def measure(shape: Model, dtype: torch.dtype, machine: Machine, options: Options) -> Iterator[dict[str, Any]]:
    model = shape.build(dtype)
    check_equal(model, dtype)
    for part in (part for part in options.parts if part != "wire"):
        for one in passes(part):
            calls = {name: one.call(model, name) for name in IMPLEMENTATIONS}
            seconds = medians(calls, machine, options.rounds)
            speeds = {name: one.tokens(name) / s for name, s in seconds.items()}
            best = max((name for name in speeds if name != OURS), key=lambda name: speeds[name])
            yield {
                "model": {k: v for k, v in asdict(shape).items() if k != "config"},
                "what": one.name,
                "dtype": str(dtype).removeprefix("torch."),
                "tokens_per_s": speeds,
                "against_default": speeds[OURS] / speeds[DEFAULT],
                "best_peer": best,
                "against_best": speeds[OURS] / speeds[best],
            }


def cells(row: dict[str, Any]) -> list[str]:
    return [
        row["model"]["name"],
        row["what"],
        row["dtype"],
        *(f"{row['tokens_per_s'][name]:,.0f}" for name in IMPLEMENTATIONS),
        f"{row['against_default']:.2f}x",
        f"{row['against_best']:.2f}x",
        row["best_peer"],
    ]


def show(rows: list[dict[str, Any]], options: Options) -> None:
    table = Table(title=f"tokens/s on CPU, {options.threads} thread(s), median of {options.rounds} round(s)")
    for column in ("model", "what", "dtype"):
        table.add_column(column)
    for column in (*IMPLEMENTATIONS, f"against {DEFAULT}", "against the best", ""):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*cells(row))
    Console(width=150).print(table)


def main(options: Options) -> None:
    if options.quick:
        options = replace(options, rounds=1, dtypes=("bfloat16",), models=options.models[:1])
    wire_options = wire_bytes.Options(**({"dim": 256, "tokens": 64} if options.quick else {}))
    torch.set_num_threads(options.threads)
    register()
    machine = Machine(options.threads)
    quick = "_quick" if options.quick else ""
    file = (
        options.json or RESULTS / f"transformers_cpu_{options.threads}thread{'s'[: options.threads != 1]}{quick}.json"
    )
    record = {
        "what": "transformers models on CPU, by implementation of the experts",
        "rounds": options.rounds,
        "threads": options.threads,
        "processor": processor(),
        "load": os.getloadavg()[0],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "training": {"sequences": SEQUENCES, "length": LENGTH, "length_batched_mm": FEW},
        "generation": {"prompt": PROMPT, "new": NEW},
        "wire": [],
    }
    with Results(file, record, lambda row: "  ".join(cells(row))) as results:
        for shape in (m for m in MODELS if m.name in options.models):
            for dtype in options.dtypes:
                for row in measure(shape, getattr(torch, dtype), machine, options):
                    results.add(row)
        for row in wire_bytes.measure(wire_options) if "wire" in options.parts else ():
            record["wire"].append(row)
            print(wire_bytes.as_text(row), flush=True)
    if results.rows:
        show(results.rows, options)
    if record["wire"]:
        wire_bytes.show(record["wire"], wire_options)
    results.done()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
