"""Adapters in the stages of a pipeline: their gradients are those of one process, and files are those of the model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import moesaic
from moesaic.integrations.transformers import export_pretrained
from moesaic.layers import quantize_
from moesaic.parallel import Pipeline, PipelineConfig, build_meshes, split_into_stages
from moesaic.parallel.split import name_in_whole
from tests.distributed.parity import assert_close, whole
from tests.distributed.test_stages import BATCH, LENGTH, loss_of, model_of, schedule
from tests.integrations.families import VOCAB

peft = pytest.importorskip("peft")
# peft asks for an old name of a property of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EVERYWHERE = {"target_modules": ["q_proj", "o_proj", "lm_head"], "target_parameters": [*EXPERTS, "mlp.gate.weight"]}


def adapted(family: str, settings: dict[str, Any], format: Any = None, **changes: Any) -> nn.Module:
    """A model whose adapters add something, around quantised experts if there is a format."""
    from moesaic.integrations.peft import add_adapters

    model = model_of(family, **changes)
    if format is not None:
        quantize_(model, format)
    add_adapters(model, peft.LoraConfig(r=2, lora_alpha=6, **settings))
    with torch.no_grad():
        for _, parameter in trained(model):
            nn.init.normal_(parameter, std=0.2)
    return model


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def check_adapters(
    family: str, form: dict[str, Any], runs: list[tuple[dict[str, int], PipelineConfig]], folder: Path
) -> None:
    from moesaic.integrations.peft import load_adapters, merge_adapters, save_adapters

    plain = adapted(family, **form)
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    targets, reference = ids.roll(-1, 1), copy.deepcopy(plain)
    with moesaic.balance_losses() as losses:
        logits = reference(input_ids=ids).logits
    (loss_of(logits, targets) + sum(losses)).backward()
    gradients = {name: parameter.grad for name, parameter in trained(reference)}
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    save_adapters(reference, folder / "expected")
    expected = load_file(folder / "expected" / "adapter_model.safetensors")
    for layout, config in runs:
        when = f", {layout}, {config}"
        meshes = build_meshes(**layout, device_type="cpu")
        stages = split_into_stages(copy.deepcopy(plain), meshes, config)
        stages = moesaic.parallelize(stages, meshes, compute="local")
        pipeline = Pipeline(stages, microbatches=2)
        mine = slice(meshes.dp_rank * BATCH // meshes.dp_size, (meshes.dp_rank + 1) * BATCH // meshes.dp_size)
        part = meshes.sequence_positions(LENGTH)
        pipeline.step(ids[mine], targets[mine][:, part], loss_of)
        total = moesaic.clip_grad_norm_(
            stages.parameters(), float("inf"), group=meshes.stages, counted_elsewhere=pipeline.copies()
        )
        assert_close(f"norm{when}", total, norm)
        for name, parameter in trained(stages):
            name = name_in_whole(name)
            assert_close(f"gradient of {name}{when}", whole(parameter.grad), gradients[name])
        assert not any(p.grad is not None for p in stages.parameters() if not p.requires_grad)
        # Of all stages one file, which they read back.
        save_adapters(stages, folder / "saved")
        saved = load_file(folder / "saved" / "adapter_model.safetensors")
        assert saved.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(saved[name], tensor), name
        with torch.no_grad():
            for _, parameter in trained(stages):
                parameter.zero_()
        load_adapters(stages, folder / "saved")
        assert_close(f"logits{when}", stages.eval()(ids[mine], everywhere=True), logits[mine][:, part].detach())
        if form.get("format") is None:
            merge_adapters(stages)
            assert_close(f"merged{when}", stages(ids[mine], everywhere=True), logits[mine][:, part].detach())
            export_pretrained(stages, folder / "merged")
        else:
            with pytest.raises(ValueError, match="is quantised and read-only; save the adapters"):
                merge_adapters(stages)


QWEN = {"settings": EVERYWHERE, "num_hidden_layers": 4}
QLORA = {
    "settings": {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "layers_to_transform": [2]},
    "num_hidden_layers": 3,
    "format": "nf4",
}
# The first stage has nothing to train.
TIED = {
    "settings": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "num_hidden_layers": 2,
    "tie_word_embeddings": True,
}


def test_adapters_of_two_stages(same_ranks, tmp_path):
    same_ranks(check_adapters, 2, "Qwen3-MoE", TIED, [({"pp": 2}, schedule("1f1b"))], tmp_path)


@pytest.mark.slow
def test_adapters_of_stages_equal_one_process(same_ranks, tmp_path):
    runs = [
        ({"pp": 2, "ep": 2}, schedule("interleaved")),
        ({"pp": 2, "tp": 2, "etp": 2}, schedule("zero-bubble")),
        ({"pp": 2, "cp": 2}, schedule("1f1b")),
    ]
    same_ranks(check_adapters, 4, "Qwen3-MoE", QWEN, runs, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1])
def test_fsdp_shards_a_stage_that_is_frozen(same_ranks, tmp_path, layer):
    form = {"settings": {"target_modules": ["q_proj"], "layers_to_transform": [layer]}, "num_hidden_layers": 2}
    same_ranks(check_adapters, 4, "Qwen3-MoE", form, [({"pp": 2, "ep": 2}, schedule("1f1b"))], tmp_path)


@pytest.mark.slow
def test_adapters_around_quantised_experts_of_stages(same_ranks, tmp_path):
    runs = [({"pp": 2}, schedule("gpipe", layers=[2, 1])), ({"pp": 2}, schedule("1f1b", layers=[1, 2]))]
    same_ranks(check_adapters, 2, "Qwen3-MoE", QLORA, runs, tmp_path)


def check_refusals() -> None:
    from moesaic.integrations.peft import add_adapters

    meshes = build_meshes(pp=2, device_type="cpu")
    model = model_of("Qwen3-MoE")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"PeftModel is a wrapper around Qwen3MoeForCausalLM; give that one.*get_base"):
        split_into_stages(wrapped, meshes)
    stages = split_into_stages(wrapped.get_base_model(), meshes)
    with pytest.raises(ValueError, match="it has been cut into stages; call add_adapters before split_into_stages"):
        add_adapters(stages, peft.LoraConfig(target_modules=["q_proj"]))


def test_adapters_come_before_the_cut(same_ranks):
    same_ranks(check_refusals, 2)
