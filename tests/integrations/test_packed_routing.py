"""Routing that was recorded of sequences alone is played in a row of packed ones, as trainers lay them out."""

import torch

import moesaic
from moesaic.integrations.transformers import swap_moe
from tests.integrations.families import assert_close, make_model, original_gradients, token_ids

LENGTHS = (5, 9, 3)


def test_packed_sequences_go_where_they_went_alone():
    # Other weights, as an engine's or an older model's: so other experts than by score.
    older = swap_moe(make_model("Qwen3-MoE"))
    with torch.no_grad():
        for layer in older.modules():
            if isinstance(layer, moesaic.MoE):
                layer.router.weight.neg_()
    model = swap_moe(make_model("Qwen3-MoE"))
    sequences = [row[:, :length] for row, length in zip(token_ids(3, 1, 9), LENGTHS, strict=True)]
    packed = torch.cat(sequences, 1)
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    routed, logits = [], []
    for ids in sequences:
        with moesaic.routing.record() as r, torch.no_grad():
            older(input_ids=ids)
        routed.append(r.routed_experts())
        with moesaic.routing.replay(moesaic.routing.Record.from_routed_experts(routed[-1])):
            logits.append(model(input_ids=ids).logits)
    torch.cat(logits, 1).square().sum().backward()
    expected = original_gradients(model)
    model.zero_grad()

    played = torch.cat(routed)
    with (
        moesaic.routing.replay(moesaic.routing.Record.from_routed_experts(played)),
        moesaic.routing.record() as again,
    ):
        # Positions that begin anew are how transformers knows where a sequence does.
        actual = model(input_ids=packed, position_ids=positions, use_cache=False).logits
    actual.square().sum().backward()
    assert torch.equal(again.routed_experts(), played)
    with moesaic.routing.record() as by_score, torch.no_grad():
        model(input_ids=packed, position_ids=positions, use_cache=False)
    assert not torch.equal(by_score.routed_experts(), played)
    assert_close(actual.detach(), torch.cat(logits, 1).detach(), "logits")
    for name, gradient in original_gradients(model).items():
        assert_close(gradient, expected[name], name)
