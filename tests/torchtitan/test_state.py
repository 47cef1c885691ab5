"""Checkpoints and Hugging Face names: stock's are ours, bit for bit, at another layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.parity import whole
from tests.torchtitan import case as runs
from tests.torchtitan.case import MODELS, Case, parameters, set_weights, trainer_of

SAVED = 2
CHECKPOINT = ("--checkpoint.enable", "--checkpoint.interval", str(SAVED))


def train(case: Case, folder: Path) -> dict[str, Tensor]:
    """Train and save, from a checkpoint if there is one."""
    with runs.fresh(case), trainer_of(case, str(folder)) as trainer:
        set_weights(trainer)
        trainer.train()
        return state(trainer)


def load(case: Case, folder: Path) -> dict[str, Tensor]:
    with runs.fresh(case), trainer_of(case, str(folder)) as trainer:
        assert trainer.checkpointer.load(step=-1)
        return state(trainer)


def state(trainer: Any) -> dict[str, Tensor]:
    """Weights, buffers and all that the optimizer keeps, of all ranks."""
    found = {f"weight {name}": whole(p).clone() for name, p in parameters(trainer)}
    for part in trainer.model_parts:
        found |= {f"buffer {runs.bare(n)}": whole(b).clone() for n, b in part.named_buffers() if "expert_bias" in n}
    for name, value in trainer.optimizers.state_dict().items():
        if isinstance(value, Tensor):
            found[f"optimizer {runs.bare(name)}"] = whole(value).clone()
    return found


@pytest.mark.parametrize(
    ("model", "override"),
    [(model, override) for model in MODELS for override in ("experts", "routed_experts")],
)
def test_checkpoints_go_from_stock_to_override_and_back(same_ranks, tmp_path, model, override):
    etp = 1 if override == "experts" else 2
    stock = Case(model, tp=2, steps=SAVED, more=CHECKPOINT)
    ours = Case(model, override, ep=4, etp=etp, steps=2 * SAVED, more=CHECKPOINT)
    saved = same_ranks(train, 2, stock, tmp_path)[0]
    assert_same(same_ranks(load, 4, ours, tmp_path)[0], saved)
    saved = same_ranks(train, 4, ours, tmp_path)[0]
    assert_same(same_ranks(load, 2, Case(model, ep=2, more=CHECKPOINT), tmp_path)[0], saved)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert any("exp_avg_sq" in name for name in got)
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def exported(case: Case) -> tuple[dict[str, Tensor], list[str]]:
    """What `to_hf` makes of the weights, and what `from_hf` does not give back, such as the biases of routing."""
    with runs.fresh(case), trainer_of(case) as trainer:
        set_weights(trainer)
        config = trainer.config
        adapter = config.model_spec.state_dict_adapter(trainer.model_config, config.hf_assets_path)
        weights = {runs.bare(name): t for part in trainer.model_parts for name, t in part.state_dict().items()}
        there = adapter.to_hf(dict(weights))
        back = adapter.from_hf(dict(there))
        lost = [name for name, w in weights.items() if name not in back or not torch.equal(whole(back[name]), whole(w))]
        return {name: whole(tensor).clone() for name, tensor in there.items()}, lost


@pytest.mark.parametrize("model", MODELS)
def test_hugging_face_names_and_values_are_those_of_stock(same_ranks, model):
    [(stock, lost)] = same_ranks(exported, 1, Case(model))
    seen: dict[str, Tensor] = {}
    for there, lost_here in same_ranks(exported, 4, Case(model, "routed_experts", ep=4, etp=2)):
        assert lost_here == lost
        seen |= there  # a rank has the keys of its own experts
    assert seen.keys() == stock.keys()
    assert [name for name in stock if not torch.equal(seen[name], stock[name])] == []
