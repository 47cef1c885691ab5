"""transformers' own expert parallelism: our exchange of tokens and our kernels under it, or our kernels alone."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from moesaic.integrations.transformers import register
from moesaic.integrations.transformers.expert_parallel import MoesaicEP
from tests.integrations.families import VOCAB, assert_close, make_model, results_of, token_ids
from tests.integrations.trainer_settings import COMPARED

BATCH, LENGTH = 4, 9
LAYOUTS = {
    "fsdp2 ep2": {"fsdp_size": 2, "ep_size": 2},
    "fsdp4 ep4": {"fsdp_size": 4, "ep_size": 4},
    # Two copies of each expert.
    "fsdp4 ep2": {"fsdp_size": 4, "ep_size": 2},
    # Two ranks share their tokens, and have a half of each other's experts.
    "tp2 fsdp2 ep4": {"tp_size": 2, "fsdp_size": 2, "ep_size": 4},
    # All ranks of an expert group share their tokens.
    "tp2 fsdp2 ep2": {"tp_size": 2, "fsdp_size": 2, "ep_size": 2},
}
FAMILIES = ["Qwen3-MoE", "Mixtral", "DeepSeek-V3"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}

    def folder_of(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            make_model(family).save_pretrained(folders[family])
        return folders[family]

    return folder_of


def load(folder: Path, implementation: str, layout: dict[str, int], **options: Any) -> Any:
    """As under torchrun. All that a user writes is here."""
    os.environ |= {key: str(dist.get_rank()) for key in ("RANK", "LOCAL_RANK")}
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    register()
    config = DistributedConfig(**layout, ep_implementation=implementation)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, **options)


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_of(layout: dict[str, int]) -> slice:
    """The sequences of this rank."""
    group, groups = dist.get_rank() // layout.get("tp_size", 1), layout["fsdp_size"]
    return slice(group * BATCH // groups, (group + 1) * BATCH // groups)


def check_equals_one_process(family: str, folder: Path, implementation: str, layout: dict[str, int]) -> None:
    ids = token_ids(BATCH, LENGTH)
    one = make_model(family)
    expected = one(input_ids=ids, labels=ids)
    expected.loss.backward()
    model, rows = load(folder, implementation, layout), rows_of(layout)
    out = model(input_ids=ids[rows], labels=ids[rows])
    assert_close(out.logits.detach(), expected.logits[rows].detach(), "logits")
    out.loss.backward()
    loss = out.loss.detach() / dist.get_world_size()
    dist.all_reduce(loss)
    assert_close(loss, expected.loss.detach(), "loss")
    for (name, mine), theirs in zip(model.named_parameters(), one.parameters(), strict=True):
        assert_close(whole(mine.grad), theirs.grad, name)
    with torch.no_grad():
        assert_close(model(input_ids=ids[rows]).logits, expected.logits[rows].detach(), "logits without gradients")


def check(same_ranks: Any, saved: Any, family: str, implementation: str, name: str) -> None:
    layout = LAYOUTS[name]
    world_size = layout["fsdp_size"] * layout.get("tp_size", 1)
    same_ranks(check_equals_one_process, world_size, family, saved(family), implementation, layout)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "fsdp2 ep2"])
def test_ranks_compute_what_one_process_does(same_ranks, saved, layout):
    check(same_ranks, saved, "Qwen3-MoE", "moesaic", layout)


@pytest.mark.long
@pytest.mark.parametrize("implementation", ["moesaic", "all_to_all"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", [*FAMILIES, "gpt-oss"])
def test_other_families(same_ranks, saved, family, layout, implementation):
    check(same_ranks, saved, family, implementation, layout)


@pytest.mark.parametrize("family", ["Qwen3-MoE", "gpt-oss"])
def test_two_ranks_compute_what_one_does(ranks, tmp_path, family):
    make_model(family).save_pretrained(tmp_path)
    ranks(_check, 2, family, tmp_path)


def _check(family: str, folder: Path) -> None:
    # As torchrun does.
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank()), "WORLD_SIZE": "2"}
    expected = results_of(make_model(family))
    register()
    model = AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="moesaic", distributed_config=DistributedConfig(tp_size=2, ep_size=2)
    )
    experts = next(module for module in model.modules() if hasattr(module, "has_gate"))
    assert (experts.num_experts, experts._is_expert_parallel) == (4, True)
    ids = token_ids(2, 17)
    # Without gradients the ranks share the batch and meet ids of each other's experts; with them, tokens travel.
    with torch.no_grad():
        assert_close(model(input_ids=ids).logits, expected.logits, "logits")
    out = model(input_ids=ids, labels=ids)
    assert_close(out.logits.detach(), expected.logits, "logits")
    out.loss.backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        assert_close(gradient, expected.gradients[name], name)


def train(model: Any, folder: Path, sequences: int) -> list[float]:
    """The loss of three steps of Trainer, each with `BATCH` sequences of all ranks; some ranks have fewer labels."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(3, VOCAB, (3 * BATCH, LENGTH), generator=torch.Generator().manual_seed(3))
    prompts = torch.arange(LENGTH) < torch.arange(3 * BATCH).unsqueeze(1) % 7
    rows = [{"input_ids": row, "labels": row.masked_fill(p, -100)} for row, p in zip(ids, prompts, strict=True)]
    settings = TrainingArguments(
        str(folder),
        per_device_train_batch_size=sequences,
        max_steps=3,
        **COMPARED,
    )
    trainer = Trainer(model, settings, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def check_three_steps(ranks: Any, family: str, folder: Path, layout: dict[str, int]) -> None:
    one = make_model(family)
    expected = train(one, folder / "one", BATCH)
    for losses, weights in ranks(trained, layout["fsdp_size"], folder, layout):
        assert losses == pytest.approx(expected, rel=1e-5)
        for name, parameter in one.named_parameters():
            assert_close(weights[name], parameter.detach(), name)


def trained(folder: Path, layout: dict[str, int]) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = load(folder, "moesaic", layout)
    losses = train(model, folder / "ranks", BATCH // layout["fsdp_size"])
    return losses, {name: whole(parameter).detach() for name, parameter in model.named_parameters()}


# Over tp, accelerate refuses processes on CPU.
@pytest.mark.long
@pytest.mark.parametrize("layout", [LAYOUTS["fsdp2 ep2"], LAYOUTS["fsdp4 ep4"], LAYOUTS["fsdp4 ep2"]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_trainer(ranks, saved, family, layout):
    check_three_steps(ranks, family, saved(family), layout)


def check_refusals() -> None:
    class Plain(torch.nn.Module):
        num_experts = 4

    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("ep", "tp"))
    with pytest.raises(TypeError, match='Plain does not follow .*, or use ep_implementation="all_to_all"'):
        MoesaicEP(Plain(), mesh["ep"], mesh["tp"])


def test_modules_without_the_interface_are_refused(ranks):
    ranks(check_refusals, 1)
