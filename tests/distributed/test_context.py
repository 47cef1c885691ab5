"""Context parallelism of decoders: logits, losses, every gradient, the clipped norm and three steps, as one process."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import DynamicCache

import moesaic
from moesaic.integrations.transformers import swap_moe
from moesaic.layers import expert_load
from moesaic.parallel.recompute import Recompute
from tests.distributed.parity import LocalAdamW, assert_close, assert_gradients_close, assert_weights_close, meshes_of
from tests.distributed.test_families import PLANNED, labels_of, run
from tests.distributed.test_plan import fake_meshes
from tests.distributed.test_qwen3_parity import name_of
from tests.integrations.families import VOCAB, make_model
from tests.integrations.folders import make
from tests.integrations.test_folders import SWAPPED as FOLDERS

BATCH, STEPS, MAX_NORM = 4, 3, 0.5


def batches(length: int, kind: str) -> list[dict[str, Tensor]]:
    """One batch a step."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        ids = torch.randint(3, VOCAB, (BATCH, length), generator=generator)
        batch = {"input_ids": ids, "labels": labels_of(ids)}
        position = torch.arange(length)
        if kind == "padded":
            first, last = torch.tensor([[0, length], [length // 2, length], [0, 2], [3, length]]).mT
            mask = ((position >= first.unsqueeze(1)) & (position < last.unsqueeze(1))).long()
            batch |= {"attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}
        elif kind == "packed":
            # Documents that begin inside of chunks, other ones in each row.
            starts = torch.tensor([[0, 3, 7], [0, 1, 2], [0, length - 1, length], [0, 5, 6]])
            which = (position.unsqueeze(1) >= starts.unsqueeze(1)).sum(2)
            batch |= {"position_ids": position - starts.gather(1, which - 1), "use_cache": False}
        found.append(batch)
    return found


def check(
    family: str,
    layouts: list[dict[str, int]],
    length: int,
    kind: str = "whole",
    recompute: Recompute = "none",
    **changes: Any,
) -> None:
    plain = swap_moe(make_model(family, **{**PLANNED[family], **changes}), aux_loss_coef=0.5, z_loss_coef=0.1).train()
    given = batches(length, kind)
    reference, expected = copy.deepcopy(plain), []
    optimizer = LocalAdamW(reference.parameters(), lr=1e-2, eps=1e-3)
    for batch in given:
        out, losses = run(reference, **batch)
        gradients = {name: p.grad.clone() for name, p in reference.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((out.logits.detach(), losses, gradients, norm, load_of(reference)))
    for layout in layouts:
        meshes = meshes_of(layout)
        model = moesaic.parallelize(copy.deepcopy(plain), meshes, recompute=recompute)
        optimizer = LocalAdamW(model.parameters(), lr=1e-2, eps=1e-3)
        rows = slice(meshes.dp_rank * BATCH // meshes.dp_size, (meshes.dp_rank + 1) * BATCH // meshes.dp_size)
        for step, (batch, (logits, losses, gradients, norm, load)) in enumerate(zip(given, expected, strict=True)):
            mine = {name: t[rows] if isinstance(t, Tensor) else t for name, t in batch.items()}
            out, parts = run(model, **mine)
            dist.all_reduce(parts)
            when = f", {name_of(layout)}, step {step}"
            here = logits[rows][:, meshes.sequence_positions(length)]
            assert_close(f"logits{when}", out.logits.detach(), here)
            assert_close(f"losses{when}", parts, losses)
            assert all(torch.equal(theirs, load[name]) for name, theirs in expert_load(model).items()), when
            assert_gradients_close(model, gradients, when)
            assert_close(f"norm{when}", moesaic.clip_grad_norm_(model.parameters(), MAX_NORM), norm)
            optimizer.step()
            optimizer.zero_grad()
        assert_weights_close(model, dict(reference.named_parameters()))


def load_of(model: Any) -> dict[str, Tensor]:
    return {name: load.clone() for name, load in expert_load(model).items()}


# Lengths that nothing divides, and one with which ranks have no token.
IN_CI = [
    ("Qwen3-MoE", {"cp": 2, "tp": 2, "ep": 2, "etp": 2}, 11, "packed", "none"),
    ("DeepSeek-V3", {"cp": 2, "ep": 2}, 11, "padded", "experts"),
    ("gpt-oss", {"cp": 4, "ep": 2}, 11, "packed", "selective"),
    ("DeepSeek-V3", {"cp": 4, "etp": 2}, 3, "whole", "full"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout", "length", "kind", "recompute"), IN_CI, ids=str)
def test_decoders(same_ranks, family, layout, length, kind, recompute):
    same_ranks(check, 4, family, [layout], length, kind, recompute)


EIGHT = [
    {"cp": 2, "tp": 2, "ep": 8},
    {"cp": 2, "tp": 4, "ep": 2, "etp": 2},
    {"cp": 4, "dp_replicate": 2, "ep": 4},
    {"cp": 8, "ep": 2, "etp": 4},
]


@pytest.mark.long
@pytest.mark.parametrize("length", [2, 11, 16])
@pytest.mark.parametrize("kind", ["whole", "packed", "padded"])
@pytest.mark.parametrize("family", ["Qwen3-MoE", "DeepSeek-V3", "gpt-oss"])
def test_decoders_on_eight_ranks(same_ranks, family, kind, length):
    same_ranks(check, 8, family, EIGHT, length, kind)


@pytest.mark.long
@pytest.mark.parametrize("family", sorted(PLANNED.keys() - {"Llama-4"}))
def test_every_family(same_ranks, family):
    layouts = [{"cp": 2}, {"cp": 2, "ep": 2}, {"cp": 2, "etp": 2}]
    same_ranks(check, 2, family, layouts, 11, "packed")
    same_ranks(check, 2, family, layouts[:1], 11, "padded", attn_implementation="eager")


REFUSED = {
    "Qwen3-Next": r"cp: layer 0's linear_attn \(Qwen3NextGatedDeltaNet\) is not known to the plan. .*; use cp=1",
    "MiniMax": r"cp: layer 1's attention, MiniMaxLightningAttention, does not let transformers choose .*; use cp=1",
    "Llama-4": r"cp: layer 1's attention, Llama4TextAttention, counts positions itself \(attn_temp.*; use cp=1",
}


@pytest.mark.parametrize("family", REFUSED)
def test_attention_that_cannot_compute_with_a_part_is_refused_by_name(family):
    with pytest.raises(ValueError, match=REFUSED[family]):
        moesaic.parallelize(swap_moe(make_model(family, **PLANNED.get(family, {}))), fake_meshes(2, cp=2))


REFUSED_FOLDERS = {
    "beam": r"BeamAttention, is given 'attention_scaling' beside hidden states, which may be of whole seq.*; use cp=1",
    "deepseek_v32": r"DeepseekV32Attention, has a part, 'indexer' \(DeepseekV32Indexer\), that may look at other tok",
    "nemotron_h": r"cp: the layers of NemotronHModel have no self_attn.*; use cp=1",
}


@pytest.mark.parametrize("folder", REFUSED_FOLDERS)
def test_attention_with_more_in_it_is_refused_by_name(folder):
    with pytest.raises(ValueError, match=REFUSED_FOLDERS[folder]):
        moesaic.parallelize(swap_moe(make(folder)), fake_meshes(2, cp=2))


def check_folder(folder: str) -> None:
    """Logits are those of one process, or the model is refused: nothing is wrong and says nothing."""
    plain, meshes = swap_moe(make(folder)).eval(), meshes_of({"cp": 2})
    model = copy.deepcopy(plain)
    refusal = ""
    try:
        moesaic.parallelize(model, meshes)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert refusal.endswith("use cp=1"), refusal
        return
    ids = torch.randint(3, 50, (2, 11), generator=torch.Generator().manual_seed(0))
    for positions in (torch.arange(11), torch.cat([torch.arange(5), torch.arange(6)])):
        given = {"input_ids": ids, "position_ids": positions.expand(2, 11), "use_cache": False}
        found, whole = (m(**given)[0].detach() for m in (model, plain))
        assert_close(folder, found, whole[:, meshes.sequence_positions(11)])


@pytest.mark.long
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_is_right_or_refused(same_ranks, folder):
    same_ranks(check_folder, 2, folder)


def test_attention_of_others_is_refused_by_name():
    model = swap_moe(make_model("Qwen3-MoE"))
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"by 'flex_attention', .*; call model.set_attn_implementation\('sdpa"):
        moesaic.parallelize(model, fake_meshes(2, cp=2))
    del model.model.attention_of_parts
    with pytest.raises(ValueError, match=r"cp: it is not known how the attention of Qwen3MoeModel .* call .*swap_moe"):
        moesaic.parallelize(model, fake_meshes(2, cp=2))


def check_misuse() -> None:
    meshes = meshes_of({"cp": 2})
    model = moesaic.parallelize(swap_moe(make_model("Qwen3-MoE")), meshes)
    ids = torch.randint(3, VOCAB, (2, 6))
    refused = [
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, r"attention_mask: with cp > 1 expected \[B, S\].*position_ids"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask: .* whole sequences of 6 tokens .*, got \[2, 3\]"),
        ({"position_ids": torch.arange(3).unsqueeze(0)}, r"position_ids: .* whole sequences of 6 tokens"),
        ({"output_attentions": True}, "output_attentions: with cp > 1 .* set it to False"),
        ({"past_key_values": DynamicCache()}, "past_key_values: with cp > 1 .* leave it out"),
        ({"logits_to_keep": 1}, r"logits_to_keep: with cp > 1 .*meshes.sequence_positions"),
    ]
    for given, message in refused:
        with pytest.raises(ValueError, match=message):
            model(input_ids=ids, **given)
    with pytest.raises(ValueError, match="generate: with cp > 1 .* use cp=1, or export_pretrained"):
        model.generate(ids)
    layer, hidden = model.model.layers[0], torch.zeros(2, len(meshes.sequence_positions(6)), 32)
    with pytest.raises(ValueError, match="Qwen3MoeAttention was given no mask .* call the whole decoder"):
        layer(hidden, position_embeddings=(torch.zeros(1, 6, 8),) * 2, attention_mask=None)
    # Another model of the same config is none of ours.
    plain = type(model)(model.config)
    assert plain(input_ids=ids).logits.shape == (2, 6, VOCAB)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation: it became 'sdpa' after parallelize"):
        model(input_ids=ids)


def test_misuse_is_told(same_ranks):
    same_ranks(check_misuse, 2)


def check_brought() -> None:
    plain = swap_moe(make_model("Qwen3-MoE"))
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    reference = copy.deepcopy(plain)
    reference(input_ids=ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    for sizes in ({"tp": 2}, {"cp": 2, "tp": 1}, {"pp": 1, "cp": 2, "tp": 1}):
        axes = {"pp": 1} if "pp" in sizes else {}
        axes |= {"dp_replicate": 1, "dp_shard": 2, **sizes}
        mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
        meshes = moesaic.build_meshes(mesh=mesh, ep=2)
        model = moesaic.parallelize(copy.deepcopy(plain), meshes)
        mine = ids[meshes.dp_rank : meshes.dp_rank + 1]
        model(input_ids=mine, labels=mine).loss.backward()
        assert_gradients_close(model, expected, str(sizes))


@pytest.mark.slow
def test_a_mesh_that_is_brought_may_have_cp_or_not(same_ranks):
    same_ranks(check_brought, 4)
