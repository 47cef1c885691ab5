"""Pretrained models: the loss and all gradients are those of plain transformers, one conversation at a time."""

import dataclasses
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moesaic.cli import main
from moesaic.layers import expert_load
from moesaic.train import loop
from moesaic.train.architecture import find_model
from moesaic.train.config import TrainConfig, read_settings
from moesaic.train.errors import UserError
from moesaic.train.metrics import read_jsonl
from moesaic.train.run import set_up
from moesaic.train.runtime import started
from tests.distributed.parity import whole
from tests.train.chats import COMMON, FAMILIES, MARKED, write_chats, write_model
from tests.train.conftest import one_step
from tests.train.test_resume import _fit, _rows

pytestmark = pytest.mark.slow

MESH = {"tp": 2, "ep": 2, "etp": 2}


@pytest.fixture
def tuned(tmp_path, cache):
    """Settings of a run that takes a second; the model is written by the test."""
    return TrainConfig(
        data=str(write_chats(tmp_path / "chats.jsonl", count=12)),
        model=str(tmp_path / "model"),
        steps=6,
        batch_size=4,
        seq_len=95,
        lr=1e-3,
        warmup_steps=2,
        max_grad_norm=0.0,
        out=tmp_path / "run",
        save_every=0,
        log_every=1,
        tensorboard=False,
        device="cpu",
        sample_tokens=5,
    )


def _first_step(config, cache):
    """The loss of the first step, every gradient, and the tokens that the experts of each layer got."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    with started("cpu") as runtime:
        run = set_up(config, runtime, lambda text: None)
        model, optimizer = run.training.model, run.training.optimizer
        grads = {}

        def keep(*_):
            grads.update({name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None})

        optimizer.register_step_pre_hook(keep)
        model.train()
        result = one_step(run)
        loads = [load.sum().item() for load in expert_load(model).values()]
        run.close()
        if dist.is_initialized():
            dist.barrier()
        return result.loss, grads, loads


def _by_hand(config):
    """Tokens and targets of every conversation, by its tokens but the last."""
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    found = {}
    for line in Path(config.data).read_text().splitlines():
        ids, targets = [], []
        for message in json.loads(line)["messages"]:
            head = tokenizer(f"<{message['role']}>")["input_ids"]
            said = tokenizer(f"{message['content']}</end>")["input_ids"]
            ids += head + said
            targets += [-100] * len(head) + (said if message["role"] == "assistant" else [-100] * len(said))
        found[tuple(ids[:-1])] = targets[1:]
    return found


def _reference(config, batch):
    """The same of the conversations in a batch, by plain transformers, each on its own."""
    model = AutoModelForCausalLM.from_pretrained(config.model)
    known = _by_hand(config)
    total = 0.0
    for row, positions in zip(batch.inputs, batch.positions, strict=True):
        for part in torch.tensor_split(row, (positions == 0).nonzero().flatten()[1:]):
            if (targets := known.get(tuple(part.tolist()))) is None:
                assert (part == part[0]).all(), "not padding"
                continue
            logits = model(input_ids=part[None]).logits[0]
            total = total + F.cross_entropy(logits, torch.tensor(targets), ignore_index=-100, reduction="sum")
    loss = total / batch.num_targets
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def _in_our_names(grads):
    found = {}
    for name, grad in grads.items():
        if name.endswith("experts.gate_up_proj"):
            found[name.replace("gate_up_proj", "w1")], found[name.replace("gate_up_proj", "w3")] = grad.mT.chunk(2, 2)
        elif name.endswith("experts.down_proj"):
            found[name.replace("down_proj", "w2")] = grad.mT
        else:
            name = name.replace("mlp.gate.weight", "mlp.router.weight")
            if "shared_experts" in name:
                for theirs, ours in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
                    name = name.replace(f"shared_experts.{theirs}", f"shared.{ours}")
            found[name] = grad
    return found


@pytest.mark.parametrize(
    ("family", "world_size", "changes"),
    [
        ("mixtral", 1, {}),
        ("mixtral", 1, {"packing": False}),
        ("mixtral", 4, MESH),
        pytest.param("qwen3_moe", 4, MESH, marks=pytest.mark.long),  # Mixtral's stands for it
        ("qwen3_moe", 2, {"cp": 2, "ep": 2}),
        ("deepseek_v3", 4, MESH),
        ("deepseek_v3", 4, {"cp": 2, "tp": 2, "ep": 4}),
    ],
    ids=str,
)
def test_gradients_are_those_of_each_conversation_alone(tuned, cache, ranks, tmp_path, family, world_size, changes):
    write_model(tmp_path / "model", family)
    config = dataclasses.replace(tuned, aux_loss_coef=0.0, **changes)
    with started("cpu") as runtime:
        alone = dataclasses.replace(config, tp=1, cp=1, ep=1, etp=1, out=tmp_path / "alone")
        loader = set_up(alone, runtime, lambda text: None).training.loader
    batch = loader.next_batch()
    expected_loss, expected = _reference(config, batch)
    results = [_first_step(config, cache)] if world_size == 1 else ranks(_first_step, world_size, config, cache)
    expected = _in_our_names(expected)
    for loss, grads, loads in results:
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        # Padding goes to no expert.
        assert set(loads) == {int(batch.mask.sum()) * COMMON["num_experts_per_tok"]}
        assert not batch.mask.all()
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            worst = (grad - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-6)
            assert worst < 1e-5, (name, worst)


def test_the_balance_loss_is_that_of_transformers_if_the_config_asks(tuned, cache, ranks, tmp_path):
    """Its gradient, as transformers has it of the same rows, on one process and on four."""
    folder = Path(write_model(tmp_path / "model", "mixtral"))
    values = json.loads((folder / "config.json").read_text())
    config = dataclasses.replace(tuned, out=tmp_path / "run", seq_len=128)
    with started("cpu") as runtime:
        run = set_up(config, runtime, lambda text: None)
        batch = run.training.loader.next_batch()
    # Without being asked, none: as in transformers.
    assert run.config.aux_loss_coef == 0
    (folder / "config.json").write_text(
        json.dumps(values | {"output_router_logits": True, "router_aux_loss_coef": 0.3})
    )
    model = AutoModelForCausalLM.from_pretrained(config.model)
    out = model(input_ids=batch.inputs, position_ids=batch.positions, use_cache=False)
    routings = [logits.detach()[batch.mask.flatten()] for logits in out.router_logits]
    expected = 0.3 * load_balancing_loss_func(tuple(routings), model.num_experts, model.num_experts_per_tok)
    for world_size, changes in ((1, {}), (4, MESH)):
        config = dataclasses.replace(config, out=tmp_path / f"run-{world_size}", steps=1, **changes)
        run_it = _fit if world_size == 1 else lambda *args: ranks(_fit, 4, *args)
        run_it(config, cache)
        [row] = [row for row in read_jsonl(config.out / "metrics.jsonl") if row["step"] == 1]
        assert row["balance_loss"] == pytest.approx(float(expected), rel=1e-5)
    settings = json.loads((config.out / "config.json").read_text())["settings"]
    assert (settings["aux_loss"], settings["aux_loss_coef"]) == ("pooled", 0.3)


def test_a_balance_coefficient_of_another_meaning_is_told_of(tuned, cache, tmp_path):
    write_model(tmp_path / "model", "mixtral")
    config = dataclasses.replace(tuned, aux_loss_coef=0.02, steps=1)
    _fit(config, cache)
    assert "aux-loss" not in "\n".join(_fit(dataclasses.replace(config, resume=True, steps=2), cache)[1])
    changed = dataclasses.replace(config, resume=True, steps=3, aux_loss="sequence")
    told = "\n".join(_fit(changed, cache)[1])
    assert "--aux-loss-coef 0.02 is now for another balance loss: --aux-loss sequence, and it was batch" in told
    _forget_aux_loss(tuned.out)
    old = read_settings(tuned.out / "config.json")
    assert old.aux_loss == "batch"
    told = "\n".join(_fit(dataclasses.replace(old, resume=True, steps=4), cache)[1])
    assert "--aux-loss-coef 0.02 is from an older version of moesaic" in told
    assert "A new run would have 0; --aux-loss-coef 0 turns it off" in told


def _forget_aux_loss(folder):
    """Make a run look like one of a version that had no such setting."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    del values["settings"]["aux_loss"]
    file.write_text(json.dumps(values))


# On ranks, tests/train/test_resume.py has a short one of the same code.
@pytest.mark.parametrize(("world_size", "changes"), [(1, {}), pytest.param(4, MESH, marks=pytest.mark.long)], ids=str)
def test_a_resume_is_exact(tuned, cache, tmp_path, ranks, world_size, changes):
    write_model(tmp_path / "model", "mixtral")
    run = _fit if world_size == 1 else lambda *args: ranks(_fit, world_size, *args)
    whole = dataclasses.replace(tuned, out=tmp_path / "whole", **changes)
    part = dataclasses.replace(tuned, out=tmp_path / "part", **changes)
    run(whole, cache)
    run(part, cache, {2: [signal.SIGTERM]})
    run(dataclasses.replace(part, resume=True), cache)
    assert len(_rows(whole.out)) == 6
    assert _rows(part.out) == _rows(whole.out)


def _arguments(config):
    return [
        *("train", "--model", config.model, "--data", config.data, "--out", str(config.out), "--device", "cpu"),
        *("--seq-len", "64", "--batch-size", "4", "--steps", "40", "--lr", "3e-3", "--sample-tokens", "4"),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_program(tuned, cache, tmp_path, capsys, family):
    write_model(tmp_path / "model", family, template=MARKED)
    assert main(_arguments(tuned)) == 0
    out = capsys.readouterr().out
    assert f"loading {tuned.model} ({family}) to fine-tune it" in out
    assert "learning answers" in out
    result = json.loads((tuned.out / "result.json").read_text())
    assert result["held_out_loss"]["model"] < 0.7 * result["held_out_loss"]["before"]
    assert _rows(tuned.out)[0] == {"step": 0, "held_out_loss": result["held_out_loss"]["before"]}
    # The export is a model like the one that came in, with its tokenizer and template.
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", tuned.out / "export"))
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert AutoTokenizer.from_pretrained(tuned.out / "export").chat_template == MARKED
    settings = json.loads((tuned.out / "config.json").read_text())["settings"]
    assert (settings["lr"], settings["weight_decay"]) == (3e-3, 0.0)
    assert re.search(r"the model continues '.*<assistant>' like this:", out)


def test_half_precision_files_become_fp32_weights(tuned, cache, tmp_path):
    write_model(tmp_path / "model", "mixtral", dtype=torch.bfloat16)
    loop.train(dataclasses.replace(tuned, dtype="bf16", steps=2))
    exported = load_file(tuned.out / "export" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    assert json.loads((tuned.out / "export" / "config.json").read_text())["dtype"] == "float32"


def _refusal(config, cache):
    os.environ["XDG_CACHE_HOME"] = str(cache)
    with started("cpu") as runtime, pytest.raises(UserError) as error:
        set_up(config, runtime, lambda text: None)
    return str(error.value)


def test_a_layout_that_does_not_fit_is_refused_on_every_rank(tuned, cache, tmp_path, ranks):
    write_model(tmp_path / "model", "mixtral")
    messages = ranks(_refusal, 4, dataclasses.replace(tuned, tp=4), cache)
    assert len(set(messages)) == 1
    assert re.search(r"--model .*model \(mixtral\): tp: .*4 does not divide", messages[0])


def test_text_as_well(tuned, cache, tmp_path, corpus, capsys):
    write_model(tmp_path / "model", "qwen3_moe")
    assert main([*_arguments(dataclasses.replace(tuned, data=str(corpus))), "--steps", "2", "--eval-bytes", "500"]) == 0
    assert re.search(r"bigram bytes \d\.\d+   before fine-tuning \d+\.\d+   this model", capsys.readouterr().out)


def test_what_model_names(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model", "mixtral")
    assert find_model(str(folder)).weights == str(folder)
    assert find_model(str(folder / "config.json")).weights is None
    assert find_model("qwen3-moe-small").weights is None
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"weights \(pytorch_model.bin\) are not safetensors.*give its config.json"):
        find_model(str(folder))
    (folder / "pytorch_model.bin").unlink()
    assert find_model(str(folder)).weights is None
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": {"quant_method": "fp8"}}))
    (folder / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"quantized \(fp8\), which cannot be trained"):
        find_model(str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"--model someone/model: there is no such folder, and it cannot be had"):
        find_model("someone/model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("family", r"--model .*model \(gpt2\): .* has no MoE block; moesaic.MoE replaces .*Mixtral"),
        ("broken", r"--model .*model \(mixtral\): .*[Hh]eader"),
        ("no tokenizer", r"--tokenizer .*model: transformers cannot load it"),
        ("vocabulary", r"--model .*: its tokenizer has 304 tokens, but its embedding has only 300 rows; .*resize"),
        ("another tokenizer", r"--tokenizer: it has 304 tokens, but --model .* has only 300; leave it out"),
        ("short", r"--seq-len 4: no conversation has anything to learn"),
    ],
)
def test_mistakes_are_one_line(tuned, cache, tmp_path, capsys, change, message):
    folder = write_model(tmp_path / "model", "mixtral")
    if change == "family":
        from transformers import GPT2Config, GPT2LMHeadModel

        GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)
    elif change == "broken":
        (folder / "model.safetensors").write_bytes(b"123")
    elif change == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif change in ("vocabulary", "another tokenizer"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(300)
        model.save_pretrained(folder)
    more = {"short": ["--seq-len", "4"], "another tokenizer": ["--tokenizer", str(folder)]}
    arguments = [*_arguments(tuned), *more.get(change, [])]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, error.replace("\n", " ")), error
    assert not tuned.out.exists()
