"""Routing played from a record on four ranks: loss and every gradient are those of one process with the same record."""

import pytest
import torch

import moesaic
from moesaic.integrations.transformers import swap_moe
from moesaic.routing import Record, record, replay
from tests.distributed.parity import assert_close, assert_gradients_close, meshes_of
from tests.distributed.test_families import BATCH, LENGTH, PLANNED, labels_of
from tests.distributed.test_qwen3_parity import name_of
from tests.integrations.families import VOCAB, make_model

LAYOUTS = [{"tp": 2, "ep": 2, "etp": 2}, {"ep": 4}, {"tp": 4, "ep": 2, "etp": 2}]


def check_replay(family: str, layout: dict[str, int], recompute: bool) -> None:
    def make() -> torch.nn.Module:
        return swap_moe(make_model(family, **PLANNED[family], use_cache=False)).train()

    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = labels_of(ids)
    one = make()
    with record() as theirs, torch.no_grad():
        one(input_ids=ids)
    by_score = theirs.routed_experts()
    # Other experts than by score, as of an older model or another engine; one sequence was not recorded.
    played = (by_score + 1) % 8
    played[:LENGTH] = -1
    with replay(whole := Record.from_routed_experts(played)):
        expected = one(input_ids=ids, labels=labels).loss
        expected.backward()

    model, meshes = make(), meshes_of(layout)
    moesaic.parallelize(model, meshes)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = slice(meshes.dp_rank * BATCH // meshes.dp_size, (meshes.dp_rank + 1) * BATCH // meshes.dp_size)
    mine = played.unflatten(0, (BATCH, LENGTH))[rows, meshes.sequence_slice(LENGTH)]
    with replay(r := Record.from_routed_experts(mine)), record() as again:
        loss = model(input_ids=ids[rows], labels=labels[rows]).loss
    loss.backward()
    assert (r.routed_experts() < 0).any() or meshes.dp_rank > 0
    recorded = torch.where(r.routed_experts() < 0, again.routed_experts(), r.routed_experts())
    assert torch.equal(again.routed_experts(), recorded)
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    assert_close("loss", total, expected.detach())
    assert_gradients_close(model, {n: p.grad for n, p in one.named_parameters()})
    assert len(whole.layers) == len(r.layers)


def test_replay_on_ranks(same_ranks):
    same_ranks(check_replay, 4, "DeepSeek-V3", LAYOUTS[0], recompute=True)


@pytest.mark.long
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("family", ["DeepSeek-V3", "Qwen3-MoE"])
def test_replay_in_other_layouts(same_ranks, family, layout, recompute):
    same_ranks(check_replay, 4, family, layout, recompute)
