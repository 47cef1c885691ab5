"""Files whose experts are MXFP4, as gpt-oss has them, against the model that transformers makes of them."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GptOssConfig

import moesaic
from moesaic.integrations.transformers import export_pretrained, load_pretrained, swap_moe, unswap_moe
from moesaic.integrations.transformers.convert import convert
from moesaic.integrations.transformers.export import to_transformers_state_dict as original
from moesaic.integrations.transformers.files import open_files
from moesaic.integrations.transformers.mxfp4 import Stored, decoded
from moesaic.layers import quantize_
from moesaic.layers.packed import PackedWeight
from moesaic.parallel.split import name_in_whole
from tests.integrations.mxfp4_files import SIZES, write_gpt_oss


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a tiny gpt-oss, and the model that transformers decodes them to."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    return folder, write_gpt_oss(folder)


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


def stages_on_ranks(folder):
    model = load_pretrained(folder, moesaic.build_meshes(pp=2, device_type="cpu"))
    logits = model(torch.arange(12).view(2, 6), everywhere=True)
    return {name_in_whole(n): t for n, t in model.state_dict().items() if n.endswith((".data", ".scales"))}, logits


@pytest.mark.slow
def test_each_rank_reads_its_stage(ranks, files):
    alone = load_pretrained(files[0])
    with torch.no_grad():
        expected = alone(input_ids=torch.arange(12).view(2, 6)).logits
    found = ranks(stages_on_ranks, 2, str(files[0]))
    for layer, (parts, logits) in enumerate(found):
        assert len(parts) == 6
        for name, t in parts.items():
            assert f"layers.{layer}." in name
            assert torch.equal(t.full_tensor() if isinstance(t, DTensor) else t, alone.state_dict()[name]), name
        torch.testing.assert_close(logits, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("to", ["hf", "dcp"])
def test_convert_decodes_them(files, tmp_path, to):
    folder, theirs = files
    convert(folder, tmp_path / "out", to=to, dtype=torch.bfloat16 if to == "hf" else None)
    if to == "dcp":
        convert(tmp_path / "out", tmp_path / "back")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / ("out" if to == "hf" else "back"))
    assert found.dtype == torch.bfloat16
    for name, weight in theirs.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name


def test_parts_of_a_decoded_weight(files):
    name = "model.layers.1.mlp.experts.down_proj"
    with open_files(files[0]) as found:
        w = decoded(Stored(found.tensors[f"{name}_blocks"], found.tensors[f"{name}_scales"]), torch.float32)
        box = (slice(1, 3), slice(30, 65), slice(5, 6))
        assert torch.equal(w.read(box), files[1].get_parameter(name)[box].float())
        # Three of the four blocks, of two experts and one output, with a byte for a scale.
        assert found.bytes_read == 2 * 3 * (16 + 1)


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
