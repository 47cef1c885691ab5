"""transformers' Trainer on a model over meshes does what it does on one process: losses, weights, evaluation, files."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainingArguments

import moesaic
from moesaic.integrations.transformers import MeshTrainerMixin, swap_moe, to_transformers_state_dict
from moesaic.parallel import Meshes, resolve_layout
from moesaic.sharding.internals import mesh_without_ranks
from tests.distributed.parity import assert_close, meshes_of
from tests.distributed.test_families import PLANNED
from tests.distributed.test_qwen3_parity import name_of
from tests.integrations.families import VOCAB, make_model
from tests.integrations.trainer_settings import COMPARED

pytest.importorskip("accelerate", reason="transformers' Trainer needs it")

BATCH, LENGTH, STEPS = 8, 11, 3


def make_trainer(model: Any, folder: Path, dp: int, meshes: Any = None) -> Any:
    """Two forward passes a step. Sequences have from none to all of their labels."""
    from transformers import Trainer

    ids = torch.randint(3, VOCAB, (STEPS * BATCH, LENGTH), generator=torch.Generator().manual_seed(3))
    prompts = torch.arange(LENGTH) < (5 * torch.arange(len(ids)).unsqueeze(1)) % (LENGTH + 1)
    rows = [{"input_ids": row, "labels": row.masked_fill(p, -100)} for row, p in zip(ids, prompts, strict=True)]
    settings = TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH // 2 // dp,
        per_device_eval_batch_size=BATCH // 2 // dp,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        max_grad_norm=0.5,
        optim="adamw_torch",
        **COMPARED,
    )
    kind, more = Trainer, {}
    if meshes is not None:
        kind, more = type("MeshTrainer", (MeshTrainerMixin, Trainer), {}), {"meshes": meshes}
    return kind(model, settings, train_dataset=rows, eval_dataset=rows[:BATCH], **more)


def run(trainer: Any, folder: Path) -> dict[str, list[float]]:
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder / "final"))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "loss": [entry["loss"] for entry in logged],
        "grad_norm": [float(entry["grad_norm"]) for entry in logged],
        "evaluation": [evaluated],
    }


# Refusals come before any rank is asked.
TP_2 = resolve_layout(2, tp=2)
_names, _sizes = zip(*TP_2.of_view("dense").items(), strict=True)
meshes_on_two_ranks = Meshes(TP_2, {"dense": mesh_without_ranks(_sizes, _names)})


def make_swapped(family: str) -> Any:
    return swap_moe(make_model(family, **PLANNED[family], use_cache=False))


def check_trainer(family: str, layout: dict[str, int], expected: Any, weights: dict[str, Tensor], folder: Path) -> None:
    meshes = meshes_of(layout)
    model = moesaic.parallelize(make_swapped(family), meshes)
    found = run(make_trainer(model, folder, meshes.dp_size, meshes), folder)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-5), name
    saved = AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()
    for name, weight in weights.items():
        assert_close(name, saved[name], weight)


def check_layout(ranks: Any, family: str, layout: dict[str, int], folder: Path, world_size: int = 4) -> None:
    one = make_swapped(family)
    expected = run(make_trainer(one, folder / "one", 1), folder / "one")
    ranks(check_trainer, world_size, family, layout, expected, to_transformers_state_dict(one), folder / "ranks")


@pytest.mark.long
@pytest.mark.parametrize("layout", [{"tp": 2, "ep": 2, "etp": 2}, {"ep": 4}, {"cp": 2, "ep": 2}], ids=name_of)
@pytest.mark.parametrize("family", ["Qwen3-MoE", "Mixtral", "DeepSeek-V3"])
def test_steps_are_those_of_one_process(ranks, family, layout, tmp_path):
    check_layout(ranks, family, layout, tmp_path)


@pytest.mark.long
def test_two_ranks_with_other_numbers_of_labels(ranks, tmp_path):
    check_layout(ranks, "Qwen3-MoE", {"ep": 2}, tmp_path, world_size=2)


def test_what_would_not_mean_what_it_says_is_refused(unchecked, tmp_path):
    class Base:
        def __init__(self, *args: Any, **options: Any) -> None:
            raise AssertionError("it went on")

    class Mine(MeshTrainerMixin, Base):
        pass

    def refused(text: str, args: Any, meshes: Any = meshes_on_two_ranks, **options: Any) -> None:
        with pytest.raises((TypeError, ValueError), match=text):
            Mine(make_swapped("Mixtral"), args, meshes=meshes, **options)

    settings = partial(TrainingArguments, str(tmp_path), use_cpu=True, report_to="none")
    refused("meshes: expected the result of moesaic.build_meshes", settings(), None)
    refused("args: expected TrainingArguments", None)
    refused("model: MixtralForCausalLM has parameters .* call moesaic.parallelize", settings())
    refused("average_tokens_across_devices: must be True", settings(average_tokens_across_devices=False))
    refused("label_smoothing_factor: .* with tp 2 .* or use tp=1", settings(label_smoothing_factor=0.1))
    refused("compute_metrics: .* or use tp=1", settings(), compute_metrics=print)
