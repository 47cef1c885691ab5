"""transformers' own Trainer, unchanged, at depth 1 and 2."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from moesaic.integrations.transformers import register, swap_moe, to_transformers_state_dict
from tests.integrations.families import assert_close, make_model
from tests.integrations.trainer_settings import SETTINGS

pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
register()

FAMILIES = ["Mixtral", "DeepSeek-V3", "Llama-4"]
STEPS = 4


def train(model: Any, folder: Path, **arguments: Any) -> list[float]:
    """The loss of every step."""
    resume = arguments.pop("resume_from_checkpoint", None)
    ids = torch.randint(3, 61, (2, 16), generator=torch.Generator().manual_seed(3)).repeat(2 * STEPS, 1)
    settings = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        **{"max_steps": STEPS, **SETTINGS} | arguments,
    )
    trainer = Trainer(model, settings, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_what_it_was(tmp_path, family):
    model = make_model(family)
    layers = swap_moe(copy.deepcopy(model))
    kernels = copy.deepcopy(model)
    ignored = family == "Llama-4"
    with pytest.warns(UserWarning, match="do not ask for it") if ignored else contextlib.nullcontext():
        kernels.set_experts_implementation("moesaic")
    expected = train(model, tmp_path / "plain")
    assert expected[-1] < expected[0]
    assert train(kernels, tmp_path / "kernels") == pytest.approx(expected, rel=1e-4)
    assert train(layers, tmp_path / "layers") == pytest.approx(expected, rel=1e-4)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "layers" / "final").state_dict()
    for name, tensor in to_transformers_state_dict(layers).items():
        assert torch.equal(loaded[name], tensor), name
        # Adam moves weights whose gradient is rounding error as far as any other, hence the mean.
        assert (tensor - model.state_dict()[name]).abs().mean() < 1e-4, name


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name == "Mixtral" else [pytest.mark.slow]) for name in FAMILIES]
)
def test_resuming(tmp_path, family):
    model = swap_moe(make_model(family))
    whole = train(copy.deepcopy(model), tmp_path / "whole")
    train(copy.deepcopy(model), tmp_path / "half", save_strategy="steps", save_steps=2)
    resumed = train(model, tmp_path / "rest", resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert resumed[-2:] == whole[-2:]


def test_files_as_they_are_on_disk(tmp_path):
    other = make_model("Mixtral")
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
        other.model.layers[1].mlp.experts.down_proj.mul_(2)
    other.save_pretrained(tmp_path)
    on_disk = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert any("experts.0.w1" in name for name in on_disk)
    model = swap_moe(make_model("Mixtral"))
    model.load_state_dict(on_disk)
    for name, tensor in to_transformers_state_dict(model).items():
        assert_close(tensor, other.state_dict()[name], name, rtol=0)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"unheard_of\""):
        model.load_state_dict(on_disk | {"unheard_of": torch.zeros(1)})
    del on_disk["lm_head.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"lm_head.weight\""):
        model.load_state_dict(on_disk)
    before = model.lm_head.weight.clone()
    assert model.load_state_dict(on_disk, strict=False).missing_keys == ["lm_head.weight"]
    assert torch.equal(model.lm_head.weight, before)
