"""What users do to a parallelized model: it works, or one error says what to do instead."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel

import moesaic
from moesaic.integrations.transformers import to_transformers_state_dict
from tests.distributed.parity import meshes_of, whole
from tests.distributed.test_qwen3_parity import VOCAB, make_model

CONFIG = moesaic.MoEConfig(dim=8, hidden_dim=6, num_experts=4, top_k=2)


class Around(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner


def check_copies() -> None:
    # With dp 1 torch itself would copy, and with dp 2 it would raise an AssertionError that tells nothing.
    for layout in ({"tp": 2, "ep": 2}, {"ep": 2}):
        moe = moesaic.parallelize(moesaic.MoE(CONFIG), meshes_of(layout))
        lm = moesaic.parallelize(make_model(tied=False), meshes_of(layout))
        for model in (moe, Around(moe), lm, lm.model.layers[0].mlp):
            for copied in (copy.deepcopy, pickle.dumps, AveragedModel):
                with pytest.raises(TypeError, match=r"can be neither copied nor pickled.*load_state_dict"):
                    copied(model)


def test_copies_are_refused(same_ranks):
    same_ranks(check_copies, 2)


def check_loading() -> None:
    source = make_model(tied=False)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(torch.randn_like(p))
    for layout in ({"tp": 2, "ep": 2}, {"etp": 2}):
        for state in (source.state_dict(), to_transformers_state_dict(source)):
            model = moesaic.parallelize(make_model(tied=False), meshes_of(layout))
            model.load_state_dict(state)
            for name, parameter in model.named_parameters():
                assert torch.equal(whole(parameter), source.get_parameter(name)), name
        model.load_state_dict(model.state_dict())
        with pytest.raises(RuntimeError, match=r"size mismatch for lm_head.weight"):
            model.load_state_dict({**source.state_dict(), "lm_head.weight": torch.zeros(3, 32)})
        with pytest.raises(ValueError, match="resize_token_embeddings: .* call it before parallelize"):
            model.resize_token_embeddings(VOCAB + 3)


def test_whole_tensors_are_loaded_and_embeddings_are_not_resized(same_ranks):
    same_ranks(check_loading, 2)


def adapted(lm: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(lm, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))


def check_generation() -> None:
    plain = make_model(tied=False).eval()
    prompts = torch.randint(VOCAB, (2, 5), generator=torch.Generator().manual_seed(2))
    free = plain.generate(prompts, max_new_tokens=6, do_sample=False, use_cache=True, eos_token_id=None)
    # One rank is done after two tokens, and still takes part in the steps of the other.
    end = int(free[0, 6])
    settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "eos_token_id": end, "pad_token_id": end}
    row = dist.get_rank()
    expected = plain.generate(prompts[row : row + 1], **settings)
    for wrap in (lambda lm: lm, adapted):
        model = moesaic.parallelize(wrap(make_model(tied=False)).eval(), meshes_of({"ep": 2}))
        assert torch.equal(model.generate(input_ids=prompts[row : row + 1], **settings), expected)
    model = moesaic.parallelize(make_model(tied=False), meshes_of({"tp": 2}))
    with pytest.raises(ValueError, match=r"generate: with tp > 1 .* use tp=1, or export_pretrained"):
        model.generate(prompts)


def test_ranks_that_are_done_wait_for_the_others(same_ranks):
    same_ranks(check_generation, 2)
