"""`moesaic generate` and `moesaic eval`: in one process as plain transformers computes, and on ranks the same."""

import io
import json
import math
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig

from moesaic.cli import main
from moesaic.parallel import build_meshes
from moesaic.train import loop
from moesaic.train.config import TrainConfig
from moesaic.train.errors import UserError
from moesaic.train.runtime import Runtime
from moesaic.trained import eval_command
from moesaic.trained.generate import chat_prompt, end_of_turn, generate
from moesaic.trained.generate_command import SamplingOptions
from moesaic.trained.on_ranks import tell
from moesaic.trained.routing import describe
from moesaic.trained.source import find, load, load_tokenizer
from tests.train.chats import CHANGING, tiny_tokenizer, write_chats, write_model

pytestmark = pytest.mark.slow

LAYOUTS = ({"tp": 2, "ep": 2}, {"cp": 2})  # on 2 ranks
MORE = (
    *({"tp": 2, "ep": 2, "etp": 2}, {"ep": 4}, {"tp": 2, "ep": 4}, {"etp": 4, "dp_replicate": 2}, {}),
    *({"cp": 2, "tp": 2, "ep": 2}, {"cp": 4, "etp": 2}),
)  # on 4


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus, model_file, cache):
    """The folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    loop.train(
        TrainConfig(
            data=str(corpus), model=str(model_file), steps=3, batch_size=4, seq_len=31, lr=3e-2, out=folder,
            device="cpu", log_every=1, tensorboard=False, eval_bytes=1500, sample_tokens=3, aux_loss_coef=0.0,
        )
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A small model with a chat template, and conversations."""
    folder = tmp_path_factory.mktemp("pretrained")
    return write_model(folder / "model", "mixtral"), write_chats(folder / "chats.jsonl", count=9)


def _plain(folder, prompt, **options):
    """What plain transformers adds to a prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")["input_ids"]
    torch.manual_seed(options.pop("seed", 0))
    found = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=12, **options)
    return tokenizer.decode(found[0, inputs.shape[1] :], skip_special_tokens=True)


def _command(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_it_is_what_transformers_generates(run, capsys):
    export = run / "export"
    greedy = _plain(export, "the big", do_sample=False, pad_token_id=0)
    assert len(greedy) > 5
    common = ("--max-tokens", 12, "--device", "cpu")
    assert _command(capsys, "generate", run, "the big", "--temperature", 0, *common) == greedy + "\n"
    sampled = _plain(export, "the big", seed=7, do_sample=True, temperature=0.9, top_p=0.8, top_k=20, pad_token_id=0)
    flags = ("--temperature", 0.9, "--top-p", 0.8, "--top-k", 20, "--seed", 7, *common)
    assert _command(capsys, "generate", export, "the big", *flags) == sampled + "\n"
    # A checkpoint has the same weights; and what is printed at the end is the same text.
    [checkpoint] = (run / "checkpoints").iterdir()
    assert _command(capsys, "generate", checkpoint, "the big", "--no-stream", *flags) == sampled + "\n"
    assert _command(capsys, "generate", export, "the big", *flags[:-6], "--seed", 8, *common) != sampled + "\n"


def test_the_prompt_can_come_from_the_input(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the big"))
    flags = ("--temperature", 0, "--max-tokens", 3, "--device", "cpu")
    assert _command(capsys, "generate", run, "-", *flags) == _command(capsys, "generate", run, "the big", *flags)


def _on_ranks(run, chats, layouts):
    """Of each layout the tokens that are generated, and the result of eval."""
    torch.set_num_threads(1)
    found = []
    for layout in layouts:
        meshes = build_meshes(**layout, device_type="cpu")
        device = torch.device("cpu")
        trained = find(str(run))
        tokenizer, model = load_tokenizer(trained), load(trained, meshes, device, "fp32")
        prompt = tokenizer("the big", add_special_tokens=False)["input_ids"]
        tokens = generate(model, tokenizer, prompt, SamplingOptions(max_tokens=10, seed=3), meshes)
        runtime = Runtime(device, 0, 0, 1)
        options = eval_command.Options(source=str(run), data=str(chats), seq_len=120, **layout)
        _, measured = eval_command._rows(options, trained, tokenizer_with_template(tokenizer), 256, runtime)
        found.append((tokens, eval_command.measure(model, measured, options, meshes, runtime)))
    return found


def tokenizer_with_template(tokenizer):
    tokenizer.chat_template = tiny_tokenizer().chat_template
    return tokenizer


@pytest.mark.parametrize(("world_size", "layouts"), [(2, LAYOUTS), pytest.param(4, MORE, marks=pytest.mark.long)])
def test_every_layout_gives_the_same(run, pretrained, same_ranks, cache, world_size, layouts):
    chats = pretrained[1]
    [(tokens, result)] = _on_ranks(run, chats, ({},))
    for found in same_ranks(_on_ranks, world_size, run, chats, layouts):
        assert len(found) == len(layouts)
        for theirs, numbers in found:
            assert theirs == tokens
            assert numbers["loss"] == pytest.approx(result["loss"], rel=1e-6)
            assert numbers["layers"] == result["layers"]
            assert numbers["tokens"] == result["tokens"]


def test_the_held_out_score_is_that_of_the_run(run, capsys):
    found = json.loads(_command(capsys, "eval", run, "--json", "--device", "cpu"))
    assert found["bits_per_byte"] == pytest.approx(
        json.loads((run / "result.json").read_text())["bits_per_byte"]["model"], rel=1e-6
    )
    assert (found["step"], found["bytes"] <= 1500) == (3, True)
    assert found["loss"] * found["tokens"] == pytest.approx(found["bits_per_byte"] * math.log(2) * found["bytes"])
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_any_text_is_measured_whole_and_its_routing_is_counted(run, capsys, tmp_path):
    text = "the cat sees a tree.\n" * 30 + "often.\n"
    (tmp_path / "one.txt").write_text(text)
    flags = ("--data", tmp_path / "one.txt", "--seq-len", 64, "--device", "cpu")
    found = json.loads(_command(capsys, "eval", run, "--json", *flags))
    model = AutoModelForCausalLM.from_pretrained(run / "export")
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([tokenizer.eos_token_id, *ids, tokenizer.eos_token_id])
    counts = torch.zeros(2, 4, dtype=torch.int64)
    nats = 0.0
    for start in range(0, len(ids) - 1, 64):
        part, targets = ids[start : start + 64], ids[start + 1 : start + 65]
        out = model(input_ids=part[: len(targets)][None], output_router_logits=True)
        targets = targets.masked_fill(targets == tokenizer.eos_token_id, -100)
        nats += F.cross_entropy(out.logits[0], targets, reduction="sum").item()
        for layer, logits in enumerate(out.router_logits):
            counts[layer] += torch.bincount(logits.topk(2).indices.flatten(), minlength=4)
    assert found["tokens"] == len(ids) - 2
    assert found["bytes"] == len(text.encode())
    assert found["loss"] == pytest.approx(nats / found["tokens"], rel=1e-5)
    # Padding is not counted.
    assert [layer["tokens"] for layer in found["layers"].values()] == counts.tolist()
    shown = _command(capsys, "eval", run, *flags)
    assert f"{found['tokens']:,} tokens, {found['bytes']:,} bytes of 1 documents" in shown
    assert f"bits per byte {found['bits_per_byte']:.4f}" in shown
    assert "model.layers.1.mlp" in shown
    less = json.loads(_command(capsys, "eval", run, "--json", *flags, "--max-bytes", 100))
    assert less["bytes"] == 100


def test_conversations_are_measured_as_in_training(pretrained, capsys):
    model, chats = pretrained
    results = [
        json.loads(_command(capsys, "eval", model, "--data", chats, "--json", "--device", "cpu", *more))
        for more in ((), ("--no-packing",), ("--seq-len", 200, "--batch-size", 3))
    ]
    for found in results:
        assert found["documents"] == 9
        assert found["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)
        assert "bits_per_byte" not in found
    assert (
        json.loads(_command(capsys, "eval", model, "--data", chats, "--json", "--loss-on", "all", "--device", "cpu"))[
            "tokens"
        ]
        > results[0]["tokens"]
    )


def test_chat_asks_by_the_template_and_stops_at_its_end(pretrained, capsys):
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(chat_prompt(tokenizer, "one two", "be loud")) == (
        "<system>be loud</end><user>one two</end><assistant>"
    )
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == ["</end>"]
    assert end_of_turn(tiny_tokenizer(CHANGING.replace("</end>", "."))) == []
    out = _command(capsys, "generate", pretrained[0], "one", "--chat", "--max-tokens", 5, "--device", "cpu")
    assert out.endswith("\n")


def test_of_a_run_folder_the_newest_weights_are_taken(run, tmp_path):
    assert str(find(str(run))) == f"{run / 'export'} (step 3)"
    [checkpoint] = (run / "checkpoints").iterdir()
    assert find(str(checkpoint)).step == 3
    later = tmp_path / "later"
    (later / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "export", "result.json"):
        os.symlink(run / name, later / name)
    os.symlink(checkpoint, later / "checkpoints" / "step-00000005")
    assert find(str(later)).weights == str(later / "checkpoints" / "step-00000005")
    (later / "checkpoints" / "step-00000005").unlink()
    assert find(str(later)).weights == str(later / "export")
    (later / "export").unlink()
    with pytest.raises(UserError, match="neither an export nor a checkpoint yet"):
        find(str(later))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nowhere", "x"], "SOURCE nowhere: there is no such file or folder"),
        (["generate", "qwen3-moe-small", "x"], "SOURCE qwen3-moe-small: there is no such file or folder"),
        (["generate", ".", "x"], "cannot read config.json"),
        (["generate", "RUN", "x", "--temperature", "-1"], "--temperature must be a number, 0 or more"),
        (["generate", "RUN", "x", "--top-p", "0"], "--top-p must be more than 0"),
        (["generate", "RUN", "x", "--top-k", "-1"], "--top-k must be at least 0"),
        (["generate", "RUN", "x", "--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["generate", "RUN", "x", "--system", "be"], "--system is a message of a conversation; add --chat"),
        (["generate", "RUN", "x", "--chat"], "--chat: the tokenizer of this model has no chat template"),
        (["generate", "RUN", "x", "--tp", "2"], "world size 1"),
        (["eval", "RUN/export"], "is not a run folder, so nothing is held out; give --data"),
        (["eval", "RUN", "--loss-on", "all"], "give --data too"),
        (["eval", "RUN", "--seq-len", "1"], "--seq-len must be at least 2"),
        (["eval", "RUN", "--data", "nowhere"], "--data nowhere: there is no such file or folder"),
        (["eval", "RUN", "--batch-size", "0"], "--batch-size must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_in_a_line(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main([argument.replace("RUN", str(run)) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert f"moesaic {arguments[0]}: " in err
    assert "Traceback" not in err


def test_a_damaged_checkpoint_is_told(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=lambda folder, names: {"export", "result.json"} & {*names})
    [file, *_] = (copy / "checkpoints" / "step-00000003").glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert main(["generate", str(copy), "x", "--device", "cpu"]) == 1
    assert f"{file.name} is damaged" in capsys.readouterr().err


def test_numbers_of_a_load():
    assert describe([5, 5, 5, 5]) == {"tokens": [5] * 4, "busiest": 1.0, "entropy": 1.0, "dead": []}
    found = describe([0, 8, 0, 8])
    assert (found["busiest"], found["entropy"], found["dead"]) == (2.0, pytest.approx(0.5), [0, 2])
    assert describe([0, 0])["dead"] == [0, 1]
    assert describe([0, 9])["entropy"] == 0.0


def test_notes_go_beside_the_result(capsys):
    tell(Runtime(torch.device("cpu"), 0, 0, 2), "note")
    tell(Runtime(torch.device("cpu"), 1, 1, 2), "silent")
    assert capsys.readouterr() == ("", "note\n")


def test_models_that_let_conversations_see_each_other_are_refused(pretrained, tmp_path, capsys):
    path, chats = pretrained
    leaky = tmp_path / "leaky"
    shutil.copytree(path, leaky)
    AutoModelForCausalLM.from_config(_leaky()).save_pretrained(leaky)
    flags = ("--data", str(chats), "--json", "--device", "cpu")
    assert main(["eval", str(leaky), *flags, "--seq-len", "250"]) == 2
    assert "conversations that share a row would see one another in gpt_oss" in capsys.readouterr().err
    assert json.loads(_command(capsys, "eval", leaky, *flags, "--no-packing"))["documents"] == 9


def _leaky():
    """The config of a small model whose masks do not follow from positions."""
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}
    return GptOssConfig(**sizes, **heads, num_experts_per_tok=2, initializer_range=0.5, pad_token_id=0)
