"""Padding in a model with swapped layers: losses, gradients and loads are those of the batch without it."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import moesaic
from moesaic.integrations.transformers import swap_moe, unswap_moe
from moesaic.layers import expert_load, reset_expert_load
from tests.integrations.families import assert_close, make_model, token_ids
from tests.integrations.test_swap import SWAPPED

# Sequences of equal length: all of the padding can be left out.
LENGTH, PADDING = 7, 5


def labels_of(ids: Tensor) -> Tensor:
    """Of a first token none: with padding before it there is a prediction of it, without there is not."""
    return torch.cat([torch.full_like(ids[:, :1], -100), ids[:, 1:]], dim=1)


def padded(ids: Tensor, side: str) -> dict[str, Tensor]:
    """What a tokenizer makes of sequences; pad_token_id is 0."""
    sides = (0, PADDING) if side == "right" else (PADDING, 0)
    mask = F.pad(torch.ones_like(ids), sides)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": F.pad(ids, sides),
        "attention_mask": mask,
        "labels": F.pad(labels_of(ids), sides, value=-100),
        "position_ids": positions,
    }


def swapped(family: str, **changes: Any) -> Any:
    model = make_model(family, attention_dropout=0.0, **changes)
    return swap_moe(model, aux_loss_coef=0.5, z_loss_coef=0.1).train()


def step(model: Any, **batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The losses and all gradients by name, and the loads."""
    model.zero_grad()
    reset_expert_load(model)
    with moesaic.balance_losses() as losses:
        loss = model(**batch).loss
    (loss + sum(losses)).backward()
    numbers = {"loss": loss.detach(), "balance": sum(losses).detach()}
    numbers |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return numbers, {name: load.clone() for name, load in expert_load(model).items()}


def check_equal(actual: tuple[dict[str, Tensor], dict[str, Tensor]], expected: Any) -> None:
    assert actual[0].keys() == expected[0].keys()
    for name, number in actual[0].items():
        # Linear attention adds up in other chunks where there is padding.
        assert_close(number, expected[0][name], name, rtol=5e-5)
    for name, load in actual[1].items():
        assert torch.equal(load, expected[1][name]), name


@pytest.mark.parametrize("family", SWAPPED)
def test_losses_with_padding(family):
    model, ids = swapped(family), token_ids(2, LENGTH)
    expected = step(model, input_ids=ids, labels=labels_of(ids))
    assert all(load.sum() > 0 for load in expected[1].values())
    for side in ("right", "left"):
        check_equal(step(model, **padded(ids, side)), expected)


def test_where_the_mask_comes_from():
    model, ids = swapped("Mixtral"), token_ids(2, LENGTH)
    expected = step(model, input_ids=ids, labels=labels_of(ids))
    batch = padded(ids, "right")
    mask = batch.pop("attention_mask")
    # The end of a row that is pad_token_id and has no label; a mask by its name; masks of who sees whom are no padding.
    check_equal(step(model, **batch), expected)
    batch["labels"][0, -1] = 5
    assert not torch.equal(
        step(model, **batch)[1]["model.layers.0.mlp.router"], expected[1]["model.layers.0.mlp.router"]
    )
    batch["labels"][0, -1] = -100
    check_equal(step(model, **batch, token_mask=mask.bool()), expected)
    causal = torch.ones(ids.shape[1] + PADDING, ids.shape[1] + PADDING, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    loads = step(model, **batch | {"input_ids": batch["input_ids"] + 3}, attention_mask=causal)[1]
    assert all(load.sum() == mask.numel() * 3 for load in loads.values())


def test_prompts_are_not_padding():
    """They have no label, and may hold the pad token, which is the end of the text in many models."""
    model, ids = swapped("Mixtral"), token_ids(2, LENGTH)
    ids[:, :3] = 0
    labels = ids.clone()
    labels[:, :4] = -100
    loads = step(model, input_ids=ids, labels=labels)[1]
    assert all(load.sum() == ids.numel() * 3 for load in loads.values())


def checkpoint_by_transformers(model: Any) -> None:
    model.activation_checkpointing_enable()


def checkpoint_layers(model: Any) -> None:
    layer = type(model.model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, layer))


def checkpoint_moes(model: Any) -> None:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, moesaic.MoE))


@pytest.mark.parametrize("checkpoint", [checkpoint_by_transformers, checkpoint_layers, checkpoint_moes])
def test_with_activation_checkpointing(checkpoint):
    model, ids = swapped("gpt-oss", use_cache=False), token_ids(2, LENGTH)
    expected = step(model, input_ids=ids, labels=labels_of(ids))
    checkpoint(model)
    actual = step(model, **padded(ids, "left"))
    names = {name: name.replace("_checkpoint_wrapped_module.", "") for name in [*actual[0], *actual[1]]}
    check_equal(tuple({names[name]: t for name, t in part.items()} for part in actual), expected)


def test_generation_of_padded_prompts():
    model, ids = make_model("Qwen3-MoE"), token_ids(1, 5)
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **arguments)[:, 5:]
    model = swap_moe(model)
    mask = F.pad(torch.ones_like(ids), (4, 0))
    found = model.generate(F.pad(ids, (4, 0)).repeat(2, 1), attention_mask=mask.repeat(2, 1), **arguments)[:, 9:]
    assert torch.equal(found, expected.repeat(2, 1))


def test_a_layer_goes_through_pickle():
    layer = swap_moe(make_model("DeepSeek-V3")).model.layers[0]
    assert type(pickle.loads(pickle.dumps(layer))) is type(layer)


def test_the_way_back_takes_the_masks_out():
    model = make_model("Qwen2-MoE")
    types = [type(module) for module in model.modules()]
    other = unswap_moe(copy.deepcopy(swap_moe(model)))
    assert [type(module) for module in other.modules()] == types
    assert not any(module._forward_pre_hooks for module in other.modules())
