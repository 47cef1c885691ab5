"""Files whose experts are MXFP4, as gpt-oss has them, against the model that transformers makes of them."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import moesaic
from moesaic.integrations.transformers import export_pretrained, load_pretrained, swap_moe, unswap_moe
from moesaic.integrations.transformers.export import to_transformers_state_dict as original
from moesaic.layers import quantize_
from moesaic.layers.packed import PackedWeight

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "pad_token_id": 0,
    "dtype": torch.bfloat16,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a tiny gpt-oss, and the model that transformers decodes them to."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt-oss")
    model = AutoModelForCausalLM.from_config(GptOssConfig(**SIZES))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    state = dict(model.state_dict())
    for name in [n for n in state if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        E, I, O = state[name].shape  # noqa: E741
        blocks = torch.randint(256, (E, O, I // 32, 16), dtype=torch.uint8)
        scales = torch.randint(119, 124, (E, O, I // 32), dtype=torch.uint8)
        model.get_parameter(name).data = convert_moe_packed_tensors(blocks, scales)
        del state[name]
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    said = model.config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(said))
    return folder, model.eval()


def changed(files, folder, **changes):
    """Files with other tensors, or without those that are None."""
    state = load_file(files[0] / "model.safetensors") | changes
    save_file({n: t for n, t in state.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((files[0] / "config.json").read_text())
    return folder


def test_experts_stay_as_they_are_stored(files):
    folder, theirs = files
    ours = load_pretrained(folder)
    packed = [m for m in ours.modules() if isinstance(m, PackedWeight)]
    assert len(packed) == 6
    for name, weight in theirs.state_dict().items():
        if name.endswith("experts.down_proj"):
            w2 = ours.get_submodule(name.replace("down_proj", "w2")).weight
            assert torch.equal(w2.dequantize(), weight.float())
        if name.endswith("experts.gate_up_proj"):
            w1, w3 = (ours.get_submodule(name.replace("gate_up_proj", w)).weight for w in ("w1", "w3"))
            assert torch.equal(torch.stack([w1.dequantize(), w3.dequantize()], 3).flatten(2), weight.float())
    ids = torch.randint(64, (2, 7))
    with torch.no_grad():
        exact = swap_moe(copy.deepcopy(theirs).double())(input_ids=ids).logits
        naive = theirs(input_ids=ids).logits
        mine = ours(input_ids=ids).logits
    assert (mine.double() - exact).abs().max() <= 1.25 * (naive.double() - exact).abs().max()


def loaded_on_ranks(folder, layout):
    model = load_pretrained(folder, moesaic.build_meshes(**layout, device_type="cpu"))
    parts = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model.state_dict().items()}
    with torch.no_grad():
        logits = model(input_ids=torch.arange(12).view(2, 6)).logits
    return {n: t for n, t in parts.items() if n.endswith((".data", ".scales"))}, logits


@pytest.mark.long
@pytest.mark.parametrize("layout", [{"ep": 2, "tp": 2}, {"ep": 2, "etp": 1}, {"ep": 1, "etp": 2, "tp": 2}])
def test_each_rank_reads_its_part(ranks, files, layout):
    alone = load_pretrained(files[0])
    with torch.no_grad():
        expected = alone(input_ids=torch.arange(12).view(2, 6)).logits
    for rank, (parts, logits) in enumerate(ranks(loaded_on_ranks, 2, str(files[0]), layout)):
        assert parts
        for name, t in parts.items():
            assert torch.equal(t, alone.state_dict()[name]), name
        # With tp a rank has the logits of its part of the sequence.
        of_rank = expected.chunk(2, 1)[rank] if "tp" in layout else expected
        torch.testing.assert_close(logits, of_rank, rtol=2e-2, atol=2e-2)


def test_adapters_go_on_top(files):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model = load_pretrained(files[0], adapter=adapter)
    model(input_ids=torch.arange(6)[None]).logits.float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("gate_up_proj_scales", None, "gate_up_proj_blocks' is there, and .*_scales' is not"),
        ("down_proj_blocks", lambda t: t[:, :, :2], r"blocks \[4, 64, 2, 16\] and scales \[4, 64, 4\]; mxfp4 has"),
        ("down_proj_scales", lambda t: t.float(), "is torch.float32, and mxfp4 has torch.uint8"),
        ("down_proj_blocks", None, "missing: model.layers.0.mlp.experts.down_proj"),
    ],
)
def test_files_that_do_not_fit(files, tmp_path, name, change, match):
    name = f"model.layers.0.mlp.experts.{name}"
    value = None if change is None else change(load_file(files[0] / "model.safetensors")[name]).contiguous()
    with pytest.raises(ValueError, match=match):
        load_pretrained(changed(files, tmp_path, **{name: value}))


def test_what_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match="quantize: got 'nf4', but .* is mxfp4 already; leave it out"):
        load_pretrained(files[0], quantize="nf4")
    said = json.loads((files[0] / "config.json").read_text())
    changed(files, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(said | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="is quantized"):
        load_pretrained(tmp_path)


def test_a_quantised_model_has_no_layout_of_transformers(files, tmp_path):
    model = quantize_(swap_moe(AutoModelForCausalLM.from_config(GptOssConfig(**SIZES))), "mxfp4")
    for call in (
        lambda m: export_pretrained(m, tmp_path / "out"),
        unswap_moe,
        original,
    ):
        with pytest.raises(ValueError, match="experts.w1' is quantised to mxfp4, and cannot be written"):
            call(model)
    assert not (tmp_path / "out").exists()
    assert model(input_ids=torch.arange(6)[None]).logits.isfinite().all()
