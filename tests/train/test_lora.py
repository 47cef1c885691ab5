"""Low-rank adapters in the program, and peft's own on models with our layers.

Gradients are those of weights with the product added.
"""

import dataclasses
import json
import os
import re
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.cli import main
from moesaic.integrations.transformers import load_pretrained, register, swap_moe
from moesaic.parallel import build_meshes, parallelize
from moesaic.train.config import TrainConfig
from moesaic.train.errors import UserError
from moesaic.train.loop import train
from moesaic.trained.source import find, load
from tests.integrations.mxfp4_files import write_gpt_oss
from tests.train.chats import FAMILIES, PLAIN, tiny_tokenizer, write_chats, write_model
from tests.train.test_resume import _fit, _rows

peft = pytest.importorskip("peft")
# peft asks for an old name of a property of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.randint(300, (2, 11), generator=torch.Generator().manual_seed(0))


def _draw_adapters(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def _product(a, b, shape, scale):
    """What an adapter adds to a weight of this shape; of experts each has its own columns of b and rows of a."""
    if len(shape) == 2:
        return scale * b @ a
    experts = shape[0]
    return scale * torch.einsum("ore,eri->eoi", b.reshape(shape[1], -1, experts), a.reshape(experts, -1, shape[2]))


def _by_hand(model, plain, scale=2.0):
    """Logits of `plain` with the adapters of `model` added to its weights, and the gradients of the adapters."""
    leaves, weights, outer = {}, dict(plain.named_parameters()), {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (f"{name}.{part}.default.weight" for part in ("lora_A", "lora_B"))
            leaves |= {key: model.get_parameter(key).detach().clone().requires_grad_() for key in (a, b)}
            target = re.sub(r"(\.base_layer)+$", "", name) + "." + getattr(module, "parameter_name", "weight")
            outer[target] = (a, b)
    state = {
        name: weight.detach() + _product(leaves[outer[name][0]], leaves[outer[name][1]], weight.shape, scale)
        if name in outer
        else weight.detach()
        for name, weight in weights.items()
    }
    logits = torch.func.functional_call(plain, state, kwargs={"input_ids": IDS, "use_cache": False}).logits
    logits.square().mean().backward()
    return logits.detach(), {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_merged_weights(tmp_path, family):
    """Of plain peft around a plain model whose experts run on our kernels."""
    register()
    folder = write_model(tmp_path, family)
    model, plain = (
        AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moesaic").double() for _ in range(2)
    )
    attention = [name for name, module in model.named_modules() if "attn" in name and isinstance(module, nn.Linear)]
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=attention, target_parameters=experts)
    adapters = peft.LoraModel(model, settings, "default")
    _draw_adapters(model)
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.square().mean().backward()
    expected_logits, expected = _by_hand(model, plain)
    torch.testing.assert_close(
        logits.detach(), expected_logits, rtol=1e-6, atol=1e-6 * expected_logits.abs().max().item()
    )
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert grads.keys() == expected.keys()
    assert any("experts" in name for name in grads)
    for name, grad in grads.items():
        assert (grad - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name

    # Merged, it is an ordinary model again.
    adapters.merge_and_unload().save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", experts_implementation="moesaic")
    assert (again(input_ids=IDS).logits - expected_logits).abs().max() <= 1e-6 * expected_logits.abs().max()


def _attention_adapters(folder, ep):
    """Gradients of adapters on attention, of this rank's row or of both."""
    model = swap_moe(AutoModelForCausalLM.from_pretrained(folder).double())
    peft.LoraModel(model, peft.LoraConfig(r=3, target_modules=["q_proj", "o_proj"]), "default")
    _draw_adapters(model)
    meshes = build_meshes(ep=ep, device_type="cpu")
    parallelize(model, meshes)
    rows = IDS if ep == 1 else IDS[meshes.dp_rank][None]
    (model(input_ids=rows, use_cache=False).logits.square().sum() / IDS.numel()).backward()
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in named}


def test_adapters_on_attention_go_before_parallelize(tmp_path, ranks):
    write_model(tmp_path, "qwen3_moe")
    expected = _attention_adapters(tmp_path, 1)
    assert expected
    for grads in ranks(_attention_adapters, 2, tmp_path, 2):
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert (grad - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name


def test_adapters_of_peft_on_experts_are_refused_by_parallelize(tmp_path):
    write_model(tmp_path, "mixtral")
    model = swap_moe(AutoModelForCausalLM.from_pretrained(tmp_path))
    peft.LoraModel(model, peft.LoraConfig(target_parameters=["experts.w1"], target_modules=[]), "default")
    with pytest.raises(
        ValueError, match=r"experts of 'model.layers.0.mlp' are ParamWrapper .* by moesaic.integrations"
    ):
        parallelize(model, build_meshes())


@pytest.fixture
def adapted(tmp_path, cache):
    write_model(tmp_path / "model", "mixtral")
    return TrainConfig(
        data=str(write_chats(tmp_path / "chats.jsonl")),
        model=str(tmp_path / "model"),
        lora_rank=4,
        lr=1e-2,
        steps=6,
        batch_size=4,
        seq_len=64,
        out=tmp_path / "run",
        save_every=0,
        log_every=1,
        tensorboard=False,
        device="cpu",
    )


def test_a_resume_is_exact(adapted, cache, tmp_path):
    adapted = dataclasses.replace(adapted, lora_dropout=0.2)
    whole = dataclasses.replace(adapted, out=tmp_path / "whole")
    _fit(whole, cache)
    _fit(adapted, cache, {2: [signal.SIGTERM]})
    _fit(dataclasses.replace(adapted, resume=True), cache)
    assert len(_rows(whole.out)) == 6
    assert _rows(adapted.out) == _rows(whole.out)
    for changes in ({"lora_on": "experts"}, {"lora_alpha": 16.0}, {"lora_rslora": True}, {"lora_dropout": 0.0}):
        with pytest.raises(UserError, match="--model had other contents"):
            _fit(dataclasses.replace(adapted, resume=True, **changes), cache)
    assert AutoTokenizer.from_pretrained(adapted.out / "tokenizer").chat_template == PLAIN


def _call(config, *more):
    named = ("--model", config.model, "--data", config.data, "--out", str(config.out), "--lora-rank", "4")
    sizes = ("--steps", "40", "--lr", "1e-2", "--seq-len", "64", "--batch-size", "4", "--sample-tokens", "3")
    return main(["train", *named, *sizes, "--device", "cpu", *more])


def test_the_whole_program(adapted, capsys):
    assert _call(adapted) == 0
    assert re.search(r"fine-tuning [\d,]+ parameters of adapters", capsys.readouterr().out)
    result = json.loads((adapted.out / "result.json").read_text())
    assert result["held_out_loss"]["model"] < 0.8 * result["held_out_loss"]["before"]
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (adapted.model, adapted.out / "export"))
    changed = {name for name, weight in after.named_parameters() if not torch.equal(weight, before.get_parameter(name))}
    assert {name.rpartition("layers.")[2][2:].removesuffix(".weight") for name in changed} == {
        *(f"self_attn.{letter}_proj" for letter in "qkvo"),
        *("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    }
    # The adapters alone, around the model that the run began with, are the merged model.
    with_adapters = peft.PeftModel.from_pretrained(before, adapted.out / "export" / "adapter")
    assert with_adapters.peft_config["default"].base_model_name_or_path == adapted.model
    expected = after(input_ids=IDS).logits
    assert (with_adapters(input_ids=IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (_of_checkpoint(adapted.out) - expected).abs().max() <= 1e-5 * expected.abs().max()


def _of_checkpoint(run):
    """Logits of the run's checkpoint, its adapters beside the weights."""
    [checkpoint] = (run / "checkpoints").iterdir()
    model = load(find(str(checkpoint)), build_meshes(), torch.device("cpu"), "auto")
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_quantised_experts(adapted, capsys):
    assert _call(adapted, "--quantize-experts", "nf4", "--steps", "8") == 0
    shown = capsys.readouterr().out
    assert "parameters of adapters around experts in nf4" in shown
    assert re.search(r"Those were not quantised: logits differ by \de-\d\d of the largest", shown)
    # The merged model is the pretrained one, as it was, with the adapters.
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (adapted.model, adapted.out / "export"))
    with_adapters = peft.PeftModel.from_pretrained(before, adapted.out / "export" / "adapter")
    expected = with_adapters(input_ids=IDS).logits
    assert (after(input_ids=IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    # The checkpoint has the experts as they were trained beside.
    trained = load_pretrained(adapted.model, quantize="nf4", adapter=adapted.out / "export" / "adapter")
    assert (_of_checkpoint(adapted.out) - trained(input_ids=IDS).logits).abs().max() == 0
    assert AutoTokenizer.from_pretrained(adapted.out / "export").chat_template == PLAIN
    assert main(["train", "--model", adapted.model, "--quantize-experts", "nf4"]) == 2
    assert "only adapters beside them can be trained; add --lora-rank" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize(("format", "mesh"), [("nf4", {"tp": 2, "ep": 2, "etp": 2}), ("mxfp4", {"ep": 4})])
def test_ranks_train_adapters_around_quantised_experts(adapted, cache, ranks, tmp_path, format, mesh):
    write_model(tmp_path / "model", "mixtral", hidden_size=64, intermediate_size=128)
    adapted = dataclasses.replace(adapted, quantize_experts=format, compute="local")
    alone = dataclasses.replace(adapted, out=tmp_path / "alone")
    _whole_run(alone, cache)
    ranks(_whole_run, 4, dataclasses.replace(adapted, **mesh), cache)
    for one, other in zip(_steps(alone), _steps(adapted), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    _assert_same_exports(adapted, alone)


@pytest.mark.long
def test_a_resume_with_quantised_experts_is_exact(adapted, cache, tmp_path):
    adapted = dataclasses.replace(adapted, quantize_experts="nf4")
    whole = dataclasses.replace(adapted, out=tmp_path / "whole")
    _fit(whole, cache)
    _fit(adapted, cache, {2: [signal.SIGTERM]})
    with pytest.raises(UserError, match="--model had other contents"):
        _fit(dataclasses.replace(adapted, resume=True, quantize_experts="int8"), cache)
    _fit(dataclasses.replace(adapted, resume=True), cache)
    assert _rows(adapted.out) == _rows(whole.out)


@pytest.mark.slow
def test_a_model_of_mxfp4_files(adapted, capsys, tmp_path):
    tokenizer = tiny_tokenizer()
    write_gpt_oss(tmp_path / "model", vocab_size=len(tokenizer), pad_token_id=None, max_position_embeddings=256)
    tokenizer.save_pretrained(tmp_path / "model")
    assert _call(adapted) == 2
    assert "experts are stored as mxfp4 and read-only" in capsys.readouterr().err
    assert _call(adapted, "--quantize-experts", "mxfp4", "--steps", "8", "--no-packing") == 0
    assert "logits equal within" in capsys.readouterr().out
    rows = _steps(adapted)
    assert rows[-1]["loss"] < rows[0]["loss"]
    # The export has the experts decoded, with the adapters in them, and says nothing of a format.
    exported = json.loads((adapted.out / "export" / "config.json").read_text())
    assert "quantization_config" not in exported
    assert main(["generate", str(tmp_path / "model"), "a", "--max-tokens", "2", "--device", "cpu"]) == 0


def test_where_it_cannot_be(adapted, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else True)
    assert _call(adapted) == 2
    assert "pip install '.[lora]'" in capsys.readouterr().err
    monkeypatch.undo()
    assert _call(dataclasses.replace(adapted, model="qwen3-moe-small")) == 2
    assert "--model is a new one" in capsys.readouterr().err


def _whole_run(config, cache):
    os.environ["XDG_CACHE_HOME"] = str(cache)
    train(config)


@pytest.mark.long
def test_ranks_train_the_adapters_that_one_process_trains(adapted, cache, ranks, tmp_path):
    """With the same data and the same dropout: batches and masks do not depend on the layout."""
    adapted = dataclasses.replace(adapted, lora_dropout=0.2)
    alone = dataclasses.replace(adapted, out=tmp_path / "alone")
    _whole_run(alone, cache)
    several = dataclasses.replace(adapted, tp=2, ep=2, etp=2, compute="local")
    ranks(_whole_run, 4, several, cache)
    for one, other in zip(_steps(alone), _steps(adapted), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    _assert_same_exports(adapted, alone)


def _assert_same_exports(config, alone):
    for file in ("export/adapter/adapter_model.safetensors", "export/model.safetensors"):
        theirs, ours = load_file(alone.out / file), _all_tensors((config.out / file).parent)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (ours[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


def _steps(config):
    return [row for row in _rows(config.out) if "loss" in row]


def _all_tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.long
def test_a_run_goes_on_in_another_layout(adapted, cache, ranks, tmp_path):
    whole = dataclasses.replace(adapted, out=tmp_path / "whole")
    _fit(whole, cache)
    mesh = {"tp": 2, "ep": 2, "etp": 2}
    ranks(_fit, 4, dataclasses.replace(adapted, **mesh), cache, {2: [signal.SIGTERM]})
    ranks(_fit, 2, dataclasses.replace(adapted, ep=2, resume=True), cache, {3: [signal.SIGTERM]})
    ranks(_fit, 2, dataclasses.replace(adapted, pp=2, microbatches=2, resume=True), cache, {4: [signal.SIGTERM]})
    _fit(dataclasses.replace(adapted, resume=True), cache)
    for one, other in zip(_steps(whole), _steps(adapted), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"accumulate": 2, "microbatches": 1, "pp_schedule": "gpipe"}),
        # The first stage is a dense layer, and has nothing to train.
        ("deepseek_v3", {"microbatches": 2, "lora_on": "experts", "quantize_experts": "nf4"}),
    ],
    ids=str,
)
def test_stages_train_the_adapters_that_one_process_trains(adapted, cache, ranks, tmp_path, family, changes):
    write_model(tmp_path / "model", family)
    of_stages = {name: changes.pop(name) for name in ("microbatches", "pp_schedule") if name in changes}
    adapted = dataclasses.replace(adapted, **changes)
    alone = dataclasses.replace(adapted, out=tmp_path / "alone")
    _whole_run(alone, cache)
    staged = dataclasses.replace(adapted, pp=2, **of_stages)
    ranks(_whole_run, 2, staged, cache)
    for one, other in zip(_steps(alone), _steps(staged), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    _assert_same_exports(staged, alone)
    resumed = dataclasses.replace(staged, out=tmp_path / "resumed")
    ranks(_fit, 2, resumed, cache, {2: [signal.SIGTERM]})
    ranks(_fit, 2, dataclasses.replace(resumed, resume=True), cache)
    # Without scores, which only the whole program takes.
    assert _rows(resumed.out) == [row for row in _rows(staged.out) if row["step"] and "loss" in row]


@pytest.mark.long
def test_a_resume_on_the_same_ranks_is_exact(adapted, cache, ranks, tmp_path):
    mesh = {"tp": 2, "ep": 2, "etp": 2}
    whole = dataclasses.replace(adapted, out=tmp_path / "whole", **mesh)
    ranks(_fit, 4, whole, cache)
    ranks(_fit, 4, dataclasses.replace(adapted, **mesh), cache, {2: [signal.SIGTERM]})
    ranks(_fit, 4, dataclasses.replace(adapted, resume=True, **mesh), cache)
    assert _rows(adapted.out) == _rows(whole.out)
