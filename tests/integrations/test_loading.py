"""Weights read slice by slice, against `from_pretrained`, `swap_moe`, `parallelize`."""

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.integrations.transformers import load_pretrained, swap_moe
from moesaic.integrations.transformers.loading import Source, load_and_count
from moesaic.parallel import PipelineConfig, split_into_stages
from tests.integrations.families import make_model, token_ids

ON_RANKS = ("Mixtral", "Qwen2-MoE", "Qwen3-MoE", "OLMoE", "DeepSeek-V3", "gpt-oss")


def saved(family, folder, *, shard="40KB", **changes):
    model = make_model(family, **changes)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def assert_same(mine, theirs):
    ours, expected = ({**m.state_dict(), **dict(m.named_buffers())} for m in (mine, theirs))
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert type(ours[name]) is type(tensor), name
        assert ours[name].dtype == tensor.dtype, name
        if isinstance(tensor, DTensor):
            assert ours[name].placements == tensor.placements, name
            assert torch.equal(ours[name].to_local(), tensor.to_local()), name
        else:
            assert torch.equal(ours[name], tensor), name
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def run(model):
    """Logits, and gradients by name, of this rank."""
    model.zero_grad()
    logits = model(input_ids=token_ids(2, 9)).logits
    logits.logsumexp(-1).sum().backward()
    whole = {n: p.grad for n, p in model.named_parameters()}
    return logits.detach(), {n: g.to_local() if isinstance(g, DTensor) else g for n, g in whole.items()}


def load_and_compare(folders, layout, dtype, options):
    meshes = moesaic.build_meshes(**layout, device_type="cpu")
    for family, folder in folders.items():
        mine, num_bytes = load_and_count(Source(folder, dtype), meshes, compute=options)
        theirs = swap_moe(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
        moesaic.parallelize(theirs, meshes, compute=options)
        assert_same(mine, theirs)
        shares = sum(
            4 * (p.to_local() if isinstance(p, DTensor) else p).numel()
            for p in {id(t): t for t in mine.state_dict().values()}.values()
        )
        # Its gate and up projections lie in turn: to read the one is to read the other.
        assert shares < num_bytes < 2 * shares if family == "gpt-oss" else num_bytes == shares, family
        (logits, grads), (expected_logits, expected_grads) = run(mine), run(theirs)
        assert torch.equal(logits, expected_logits), family
        for name, expected in expected_grads.items():
            torch.testing.assert_close(grads[name], expected, rtol=1e-4, atol=1e-5, msg=f"{family} {name}")


LAYOUTS = {
    "tp 2, dp 2, ep 2, etp 2": ({"tp": 2, "ep": 2, "etp": 2}, None, "dtensor"),
    "tp 2, dp_replicate 2, ep 4": ({"tp": 2, "dp_replicate": 2, "ep": 4}, torch.bfloat16, "local"),
    "dp 4, edp 2, ep 2": ({"ep": 2}, None, "local"),
    "edp 4": ({"tp": 2}, torch.bfloat16, "dtensor"),
}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] if "dp_replicate" in name else []) for name in LAYOUTS]
)
@pytest.mark.parametrize("families", ["some", pytest.param("all", marks=pytest.mark.long)])
def test_each_rank_reads_its_slices(ranks, tmp_path, layout, families):
    # The first layout has all families in any case; in the others they take turns.
    turn = list(LAYOUTS).index(layout)
    chosen = ON_RANKS[turn :: len(LAYOUTS) - 1] if turn and families == "some" else ON_RANKS
    folders = {family: str(saved(family, tmp_path / family)) for family in chosen}
    ranks(load_and_compare, 4, folders, *LAYOUTS[layout])


def load_stages(folder, layout, how):
    meshes = moesaic.build_meshes(**layout, device_type="cpu")
    mine, num_bytes = load_and_count(Source(folder), meshes, pipeline=how)
    whole = swap_moe(AutoModelForCausalLM.from_pretrained(folder))
    with torch.no_grad():
        expected = whole(input_ids=token_ids(2, 9)).logits
    theirs = moesaic.parallelize(split_into_stages(whole, meshes, how), meshes)
    assert_same(mine, theirs)
    # What this rank has, and nothing of other stages.
    own = [t.to_local() if isinstance(t, DTensor) else t for t in mine.state_dict().values()]
    assert num_bytes == sum(4 * t.numel() for t in own)
    logits = mine(token_ids(2, 9), everywhere=True)
    torch.testing.assert_close(logits, expected[:, meshes.sequence_positions(9)], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes", "layout", "how"),
    [
        ("DeepSeek-V3", {"num_hidden_layers": 3}, {"pp": 2}, PipelineConfig(layers=[1, 2])),
        (
            *("Qwen3-MoE", {"num_hidden_layers": 4, "tie_word_embeddings": True}, {"pp": 2, "tp": 2, "ep": 2}),
            PipelineConfig(schedule="interleaved"),
        ),
    ],
    ids=["pp2 dense first", "pp2 tp2 ep2 tied"],
)
def test_each_rank_reads_its_stages(ranks, tmp_path, family, sizes, layout, how):
    ranks(load_stages, 2 * layout.get("tp", 1), str(saved(family, tmp_path / "m", **sizes)), layout, how)


def load_uneven(folder, layout):
    meshes = moesaic.build_meshes(**layout, device_type="cpu")
    mine = load_pretrained(folder, meshes)
    theirs = moesaic.parallelize(swap_moe(AutoModelForCausalLM.from_pretrained(folder)), meshes)
    assert_same(mine, theirs)
    assert mine.lm_head.weight is mine.model.embed_tokens.weight
    assert torch.equal(run(mine)[0], run(theirs)[0])


@pytest.mark.parametrize(
    "layout", [{"ep": 4}, {"ep": 4, "tp": 2}, {"etp": 4, "tp": 2}, {"ep": 2, "tp": 1}], ids=lambda value: str(value)
)
def test_uneven_and_empty_shards_and_tied_weights(ranks, tmp_path, layout):
    sizes = {"num_experts": 5, "moe_intermediate_size": 9, "tie_word_embeddings": True, "vocab_size": 67}
    ranks(load_uneven, 4, str(saved("Qwen3-MoE", tmp_path / "m", **sizes)), layout)
