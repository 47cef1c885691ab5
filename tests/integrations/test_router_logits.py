"""Router logits of swapped layers, and the loss over all layers that transformers makes of them: as in transformers."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic.integrations.transformers import swap_moe, unswap_moe
from moesaic.layers import attach_balance_losses
from tests.integrations.families import assert_close, make_model, original_gradients, token_ids
from tests.integrations.test_swap import SWAPPED

COEFFICIENT = 0.7
# Those whose causal language model adds a balance loss to the loss of labels.
POOLED = [
    *("Mixtral", "Qwen2-MoE", "Qwen3-MoE", "OLMoE", "gpt-oss", "Granite-MoE"),
    *("Qwen3-Next", "MiniMax", "MiniMax-M2", "Ernie-4.5-MoE"),
]


def plain_model(family: str, **changes: Any) -> Any:
    changes = {"router_aux_loss_coef": COEFFICIENT, "use_cache": False} | changes
    return make_model(family, attention_dropout=0.0, **changes).train()


def batch() -> dict[str, Tensor]:
    """Padded left and right. A first token has no label: with padding before it, it would be predicted from that."""
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]])
    ids = token_ids(2, 9)
    labels = ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def check_gradients(swapped: Any, plain: Any) -> None:
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    ours = original_gradients(swapped)
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, name)


@pytest.mark.parametrize("way", ["argument", "config"])
@pytest.mark.parametrize("family", SWAPPED)
def test_output_router_logits(family, way):
    plain = plain_model(family)
    swapped = swap_moe(copy.deepcopy(plain))
    for model in (plain, swapped):
        model.config.output_router_logits = way == "config"
    asked = {"output_router_logits": True} if way == "argument" else {}
    expected, actual = (model(**batch(), **asked) for model in (plain, swapped))
    assert_close(actual.loss, expected.loss, "loss", rtol=1e-6)
    expected.loss.backward()
    actual.loss.backward()
    check_gradients(swapped, plain)
    assert len(actual.router_logits) == len(expected.router_logits) > 0
    here = batch()["attention_mask"].flatten() == 1
    for mine, theirs in zip(actual.router_logits, expected.router_logits, strict=True):
        assert_close(mine[here], theirs[here], "router_logits")
    assert (getattr(expected, "aux_loss", None) is not None) == (family in POOLED)
    if family in POOLED:
        assert_close(actual.aux_loss, expected.aux_loss, "aux_loss")
        assert list(actual) == list(expected)
    # The decoder alone.
    ids = token_ids(2, 5)
    inner = [next(model.children())(input_ids=ids, **asked).router_logits for model in (swapped, plain)]
    assert len(inner[0]) == len(inner[1]) > 0
    for mine, theirs in zip(*inner, strict=True):
        assert_close(mine, theirs, "router_logits of the decoder")


def test_a_config_that_asks_for_them_from_the_start():
    plain = plain_model("Mixtral", output_router_logits=True)
    swapped = swap_moe(copy.deepcopy(plain))
    with moesaic.balance_losses() as losses:
        loss = swapped(**batch()).loss
    assert losses == []
    assert_close(loss, plain(**batch()).loss, "loss", rtol=1e-6)
    given = batch()
    arguments = (given["input_ids"], given["attention_mask"])
    tuples = [model(*arguments, labels=given["labels"], return_dict=False) for model in (swapped, plain)]
    assert [type(part) for part in tuples[0]] == [type(part) for part in tuples[1]]
    assert_close(tuples[0][1], tuples[1][1], "aux_loss in a tuple")
    assert swapped(**batch(), output_router_logits=False).aux_loss is None


@pytest.mark.parametrize("family", POOLED)
def test_the_loss_over_all_layers_as_a_balance_loss(family):
    plain = plain_model(family)
    swapped = swap_moe(copy.deepcopy(plain), aux_loss_coef=COEFFICIENT, aux_loss="pooled")
    with moesaic.balance_losses() as losses:
        out = swapped(**batch())
    assert len(losses) == 1
    expected = plain(**batch(), output_router_logits=True)
    assert_close(out.loss + losses[0], expected.loss, "loss", rtol=1e-6)
    expected.loss.backward()
    (out.loss + losses[0]).backward()
    check_gradients(swapped, plain)


def test_the_loss_over_all_layers_attached():
    plain = plain_model("Mixtral")
    swapped = swap_moe(copy.deepcopy(plain), aux_loss_coef=COEFFICIENT, aux_loss="pooled")
    attach_balance_losses(swapped, 2.0)
    with moesaic.balance_losses() as losses:
        swapped(**batch()).loss.backward()
    out = plain(**batch(), output_router_logits=True)
    assert_close(losses[0], COEFFICIENT * out.aux_loss, "balance loss")
    (out.loss + COEFFICIENT * out.aux_loss).backward()
    check_gradients(swapped, plain)


def test_a_coefficient_takes_the_place_of_the_configs():
    plain = plain_model("Mixtral", output_router_logits=True)
    cross_entropy = plain(**batch(), output_router_logits=False).loss
    swapped = swap_moe(copy.deepcopy(plain), aux_loss_coef=0.1, aux_loss="pooled")
    with moesaic.balance_losses() as losses:
        out = swapped(**batch())
    assert_close(out.loss, cross_entropy, "loss", rtol=1e-6)
    assert_close(losses[0], 0.1 * out.aux_loss, "balance loss")
    other = unswap_moe(copy.deepcopy(swapped))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.modules())
    assert_close(other(**batch()).loss, plain(**batch()).loss, "loss after unswap_moe", rtol=1e-6)
    swapped.eval()
    with moesaic.balance_losses() as losses:
        swapped(**batch())
    assert losses == []


def test_with_activation_checkpointing():
    plain = plain_model("Mixtral", output_router_logits=True)
    swapped = swap_moe(copy.deepcopy(plain))
    swapped.activation_checkpointing_enable({"use_reentrant": False})
    for model in (plain, swapped):
        model(**batch()).loss.backward()
    check_gradients(swapped, plain)
    swapped.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="over all layers has no gradient through reentrant .*use_reentrant=False"):
        swapped(**batch())
    # The one that failed has left nothing behind.
    swapped.activation_checkpointing_disable()
    assert_close(swapped(**batch()).loss, plain(**batch()).loss, "loss", rtol=1e-6)


def test_an_unknown_choice(unchecked):
    with pytest.raises(ValueError, match=r"aux_loss: got 'global'; choose one of \('batch', 'sequence', 'pooled'\)"):
        swap_moe(plain_model("Mixtral"), aux_loss_coef=0.1, aux_loss="global")
