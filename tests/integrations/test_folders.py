"""Every folder of transformers whose experts use its interface, at depth 1 and 2: a sample here, the rest is long."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeExperts,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)

import moesaic
from moesaic.integrations.transformers import register, swap_moe, unswap_moe
from moesaic.integrations.transformers.families import FAMILIES, WHY_NOT, family_of
from tests.integrations.families import make_model, original_gradients, token_ids
from tests.integrations.folders import NAMED, OTHERS, folders_of_transformers, make, outcome

INSTALLED = folders_of_transformers()
FOLDERS = sorted(folder for folder in [*NAMED, *OTHERS] if folder in INSTALLED)
SWAPPED = [folder for folder in FOLDERS if folder not in WHY_NOT]
# One of a table's entry, one found by its code, and one whose block is built in another way.
_QUICK = ["dots1", "lfm2_moe", "mistral4"]
# In its router and its experts it mixes numbers of its own dtype with fp32.
_FP32_ONLY = ["inkling2", "inkling2_loop"]


def some_now(folders: list[str]) -> Any:
    return pytest.mark.parametrize(
        "folder", [folder if folder in _QUICK else pytest.param(folder, marks=pytest.mark.long) for folder in folders]
    )


def make_exact(folder: str) -> Any:
    model = make(folder)
    return model if folder in _FP32_ONLY else model.double()


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], model: Any) -> None:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # A gradient that is a difference of equal numbers, as where a token's experts do not depend on its scores.
    floor = 1e-12 * max(float(value.abs().max()) for value in expected.values())
    for name in ["output", *sorted(trained)]:
        atol = max(1e-5 * float(expected[name].abs().max()), floor)
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=atol, msg=f"{name}: {{}}".format)


def test_every_folder_has_a_model_here():
    assert sorted(set(INSTALLED) - set(FOLDERS)) == [], "give them a row in tests/integrations/folders.py"
    assert set(WHY_NOT) <= {*NAMED, *OTHERS}


@some_now(FOLDERS)
def test_depth_1(folder):
    register()
    model = make_exact(folder)
    expected = outcome(model)
    model.set_experts_implementation("moesaic")
    assert_same(outcome(model), expected, model)


@some_now(SWAPPED)
def test_depth_2(folder):
    plain = make_exact(folder)
    expected, before = outcome(plain), {n: t.clone() for n, t in plain.state_dict().items()}
    model = swap_moe(make_exact(folder))
    actual = {"output": outcome(model)["output"]} | original_gradients(model)
    assert_same(actual, expected, plain)
    unswap_moe(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@some_now(SWAPPED)
def test_files_and_padding(tmp_path, folder):
    model = make(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    swap_moe(model).train()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    model(input_ids=token_ids(2, 5), attention_mask=mask, use_cache=False)
    layers = [module for module in model.modules() if isinstance(module, moesaic.MoE)]
    assert all(layer.router.load.sum() == mask.sum() * layer.config.top_k for layer in layers)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param(folder, marks=() if folder == "axk1" else pytest.mark.long)
        for folder in WHY_NOT
        if folder in FOLDERS
    ],
)
def test_what_does_not_fit_is_named_with_its_reason(folder):
    with pytest.raises(ValueError, match=f"moesaic.MoE cannot replace .*: {WHY_NOT[folder]}; use register"):
        swap_moe(make(folder))


def test_a_class_of_the_same_code_is_of_the_same_family():
    model = make_model("Qwen3-MoE")
    mine, other = model.model.layers[1].mlp, make_model("OLMoE").model.layers[0].mlp

    class Renamed(Qwen3MoeSparseMoeBlock):
        """Mine."""

    class Louder(Qwen3MoeSparseMoeBlock):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden_states)

    class Router(Qwen3MoeTopKRouter):
        def forward(self, hidden_states):
            logits, scores, ids = super().forward(hidden_states)
            return logits, scores.square(), ids

    class Experts(Qwen3MoeExperts):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    mine.__class__ = Renamed
    assert family_of(mine) is family_of(Qwen3MoeSparseMoeBlock(model.config))
    assert family_of(other) is not None
    mine.__class__ = Louder
    assert family_of(mine) is None
    mine.__class__ = Renamed
    for part, cls in (("gate", Router), ("experts", Experts)):
        plain = getattr(mine, part).__class__
        getattr(mine, part).__class__ = cls
        assert family_of(mine) is None, part
        getattr(mine, part).__class__ = plain
    swap_moe(model)
    assert isinstance(model.model.layers[1].mlp, moesaic.MoE)


def test_blocks_that_look_alike_are_told_apart():
    """The tensors of DeepSeek-V3's block; of other groups it leaves out the scores, and not all of these do."""
    names = {"axk2": FAMILIES["axk2.modeling_axk2:AXK2MoE"]}
    for folder in ("axk2", "dots1", "deepseek_v3"):
        block = next(m for m in make(folder).modules() if hasattr(m, "experts") and isinstance(m.experts, nn.Module))
        assert family_of(block) is names.get(folder, FAMILIES["deepseek_v3.modeling_deepseek_v3:DeepseekV3MoE"])
