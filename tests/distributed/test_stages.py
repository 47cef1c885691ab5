"""Transformers decoders cut into stages: losses, every gradient, their norm and the logits are those of one process."""

import copy
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import moesaic
from moesaic.integrations.transformers import swap_moe
from moesaic.layers import expert_load
from moesaic.parallel import Pipeline, PipelineConfig, build_meshes, resolve_layout, split_into_stages
from moesaic.parallel.schedules import check_schedule
from moesaic.parallel.split import layers_of_stages, name_in_whole
from tests.distributed.parity import assert_close, whole
from tests.integrations.families import VOCAB, make_model

BATCH, LENGTH = 8, 11


def model_of(family: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = make_model(family, use_cache=False, **changes)
    return swap_moe(model, aux_loss_coef=0.5, aux_loss="sequence", z_loss_coef=0.1).train()


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum") / (BATCH * LENGTH)


def padding() -> Tensor:
    """As much in each sequence: balance losses are means over the tokens of a microbatch."""
    return (torch.arange(LENGTH) >= 2).long().repeat(BATCH, 1)


def check_stages(family: str, changes: dict[str, Any], runs: list[tuple[dict[str, int], PipelineConfig, int]]) -> None:
    plain = model_of(family, **changes)
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    targets, mask = ids.roll(-1, 1), padding()
    reference = copy.deepcopy(plain)
    with moesaic.balance_losses() as losses:
        logits = reference(input_ids=ids, attention_mask=mask).logits
    expected = loss_of(logits, targets)
    (expected + sum(losses)).backward()
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    load = expert_load(reference)
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    for layout, config, microbatches in runs:
        when = f", {layout}, {config}"
        meshes = build_meshes(**layout, device_type="cpu")
        stages = moesaic.parallelize(split_into_stages(copy.deepcopy(plain), meshes, config), meshes)
        pipeline = Pipeline(stages, microbatches)
        mine = slice(meshes.dp_rank * BATCH // meshes.dp_size, (meshes.dp_rank + 1) * BATCH // meshes.dp_size)
        part = meshes.sequence_positions(LENGTH)
        # Gradients are added to what is there, and those of tied weights, too.
        for times in (1, 2) if stages.shared else (1,):
            loss = pipeline.step(ids[mine], targets[mine][:, part], loss_of, attention_mask=mask[mine])
            dist.all_reduce(loss)
            assert_close(f"loss{when}", loss, expected.detach())
            total = moesaic.clip_grad_norm_(
                stages.parameters(), float("inf"), group=meshes.stages, counted_elsewhere=pipeline.copies()
            )
            assert_close(f"norm{when}", total, times * norm)
            for name, parameter in stages.named_parameters():
                name = name_in_whole(name)
                wanted = gradients["model.embed_tokens.weight" if name not in gradients else name]
                assert_close(f"gradient of {name}{when}", whole(parameter.grad), times * wanted)
        if not stages.shared:
            for name, counts in expert_load(stages).items():
                assert torch.equal(counts, load[name_in_whole(name)]), name
        stages.eval()
        assert_close(
            f"logits{when}",
            stages(ids[mine], everywhere=True, attention_mask=mask[mine]),
            logits[mine][:, part].detach(),
        )


def check_autocast() -> None:
    """It ends with the step that it was given for, and its dtype is on no wire."""
    plain = model_of("Qwen3-MoE", num_hidden_layers=2)
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = copy.deepcopy(plain).eval()(input_ids=ids).logits.detach()
    meshes = build_meshes(pp=2, device_type="cpu")
    stages = moesaic.parallelize(split_into_stages(plain, meshes), meshes)
    in_bf16 = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    Pipeline(stages, 2).step(ids, ids, loss_of, computing=in_bf16)
    assert_close("logits", stages.eval()(ids, everywhere=True), expected)
    with in_bf16():
        logits = stages(ids, everywhere=True)
    assert logits.dtype == expected.dtype
    # Some tokens go to other experts.
    assert (logits - expected).norm() < 0.2 * expected.norm()


def test_autocast_stays_in_its_step(same_ranks):
    same_ranks(check_autocast, 2)


def schedule(name: str, **options: Any) -> PipelineConfig:
    return PipelineConfig(schedule=name, **options)


QWEN = [
    ({"pp": 2, "ep": 2}, schedule("1f1b"), 2),
    ({"pp": 2, "tp": 2, "ep": 2}, schedule("interleaved"), 4),
    ({"pp": 2, "dp_replicate": 2}, schedule("gpipe", layers=[1, 3]), 4),
    ({"pp": 2, "tp": 2, "etp": 2}, schedule("zero-bubble"), 4),
    ({"pp": 2, "cp": 2, "ep": 2}, schedule("1f1b"), 2),
    ({"pp": 4}, schedule("1f1b"), 4),
]


@pytest.mark.slow
def test_stages_of_qwen3_equal_one_process(same_ranks):
    same_ranks(check_stages, 4, "Qwen3-MoE", {"num_hidden_layers": 4}, QWEN)


@pytest.mark.slow
def test_a_stage_may_have_dense_layers_only(same_ranks):
    runs = [({"pp": 2}, schedule("1f1b", layers=[1, 2]), 2), ({"pp": 2}, schedule("gpipe", layers=[2, 1]), 1)]
    same_ranks(check_stages, 2, "DeepSeek-V3", {"num_hidden_layers": 3, "first_k_dense_replace": 1}, runs)


def test_a_tied_head_is_one_weight(same_ranks):
    changes = {"num_hidden_layers": 2, "tie_word_embeddings": True}
    same_ranks(check_stages, 2, "Qwen3-MoE", changes, [({"pp": 2}, schedule("1f1b"), 2)])


@pytest.mark.slow
def test_other_weights_that_are_scaled_and_masks_that_differ(same_ranks):
    """Granite scales embeddings and logits; gpt-oss has windows in every other layer."""
    multipliers = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}
    run = [({"pp": 2}, schedule("zbv"), 4)]
    same_ranks(
        check_stages, 2, "Granite-MoE", {"num_hidden_layers": 4, "tie_word_embeddings": False, **multipliers}, run
    )
    windows = {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 4}
    same_ranks(check_stages, 2, "gpt-oss", {"num_hidden_layers": 4, **windows}, run)


def test_layers_are_shared_out_evenly_and_the_ends_get_less():
    assert [len(r) for r in layers_of_stages(10, 4)] == [2, 3, 3, 2]
    assert [len(r) for r in layers_of_stages(11, 4)] == [3, 3, 3, 2]
    assert layers_of_stages(5, 2) == [range(3), range(3, 5)]
    assert layers_of_stages(5, 2, [1, 4]) == [range(1), range(1, 5)]
    with pytest.raises(ValueError, match="pp: 6 stages are more than the 5 layers of the model; .* up to 5"):
        layers_of_stages(5, 6)
    for wrong in ([5], [3, 3], [0, 5]):
        with pytest.raises(ValueError, match="layers: expected 2 numbers of at least 1, .* to the 5 layers of the mod"):
            layers_of_stages(5, 2, wrong)


REFUSED = {
    "schedule: got '2f2b'; choose one of 'gpipe', '1f1b', ": {"name": "2f2b"},
    "schedule: 'zbv' makes gradients of weights apart, and torch then loses .* FSDP .* for dp_shard 2, edp 2; choose": {
        "name": "zbv"
    },
    "stages_per_rank: '1f1b' has 1 on each rank, got 2; leave it out, or choose the schedule 'interleaved'": {
        "name": "1f1b",
        "stages_per_rank": 2,
    },
    "stages_per_rank: 'interleaved' has 2 or more on each rank, got 1": {"name": "interleaved", "stages_per_rank": 1},
    "microbatches: '1f1b' needs at least as many as stages, 4, got 3; give more, .* 'gpipe'": {
        "name": "1f1b",
        "microbatches": 3,
    },
    "microbatches: 'interleaved' over 4 ranks takes them in rounds .* 9 do not make; choose 8 or 10": {
        "name": "interleaved",
        "microbatches": 9,
    },
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_a_schedule_cannot_do_is_refused_by_name(text):
    with pytest.raises(ValueError, match=text):
        check_schedule(layout=resolve_layout(8, pp=4), **REFUSED[text])


def check_refusals() -> None:
    meshes = build_meshes(pp=2, device_type="cpu")
    plain = model_of("Qwen3-MoE")
    with pytest.raises(ValueError, match="meshes has pp 2, and this Qwen3MoeForCausalLM is whole; .*split_into_"):
        moesaic.parallelize(plain, meshes)
    pooled = swap_moe(make_model("Qwen3-MoE"), aux_loss_coef=0.1, aux_loss="pooled")
    with pytest.raises(ValueError, match="balance loss is over all layers together"):
        split_into_stages(pooled, meshes)
    with pytest.raises(ValueError, match="MoE is no causal language model of one decoder"):
        split_into_stages(moesaic.MoE(moesaic.MoEConfig(dim=8, hidden_dim=8, num_experts=2, top_k=1)), meshes)
    layers = model_of("Qwen3-MoE").config.num_hidden_layers
    with pytest.raises(ValueError, match=f"stages are more than the {layers} layers of the model"):
        split_into_stages(plain, meshes, PipelineConfig(schedule="interleaved", stages_per_rank=layers))
    other = model_of("Qwen3-MoE", num_hidden_layers=4 + dist.get_rank())
    with pytest.raises(ValueError, match="bring different models"):
        split_into_stages(other, meshes)
    tied = model_of("Qwen3-MoE", num_hidden_layers=4, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="first and the last stage are on one rank, .*; choose another schedule"):
        split_into_stages(tied, meshes, PipelineConfig(schedule="zbv"))
    stages = moesaic.parallelize(split_into_stages(plain, meshes), meshes)
    ids = torch.zeros(3, LENGTH, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"microbatches: 2 does not divide the 3 sequences of this rank; .* \[1, 3\]"):
        Pipeline(stages, 2).step(ids, ids, loss_of)


def test_what_cannot_be_cut_is_refused_on_all_ranks(same_ranks):
    same_ranks(check_refusals, 2)


def test_meshes_without_stages_are_refused():
    with pytest.raises(ValueError, match=r"meshes: they have no axis pp; build them with build_meshes\(pp=...\)"):
        split_into_stages(model_of("Qwen3-MoE"), build_meshes())
