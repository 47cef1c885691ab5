"""Depth 1 under transformers' own expert parallelism, which marks experts of other ranks by ids past its own."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from moesaic.integrations.transformers import register
from tests.integrations.families import assert_close, make_model, results_of, token_ids


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
