"""Misuse that used to give wrong numbers, or to keep ranks waiting, is refused; what is unusual but right works."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moesaic
from moesaic.integrations.transformers import export_pretrained
from tests.distributed.parity import assert_close, assert_gradients_close
from tests.distributed.test_qwen3_parity import BATCH, VOCAB, make_model

CONFIG = moesaic.MoEConfig(dim=8, hidden_dim=6, num_experts=4, top_k=2, aux_loss_coef=0.1, bias_update_speed=0.1)
FOUR = {"tp": 4, "ep": 2, "etp": 2}


def check_gradient_penalty() -> None:
    moe = moesaic.parallelize(moesaic.MoE(CONFIG), moesaic.build_meshes(**FOUR, device_type="cpu"))
    x = torch.randn(5, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(moe(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_gradients_of_gradients_are_refused(same_ranks):
    same_ranks(check_gradient_penalty, 4)


def check_nan_norm() -> None:
    p = torch.nn.Parameter(torch.zeros(8))
    mesh = dist.init_device_mesh("cpu", (4,))
    placed = torch.distributed.tensor.distribute_tensor(p.detach(), mesh, [torch.distributed.tensor.Shard(0)])
    for rank in range(4):
        parameter = torch.nn.Parameter(placed.clone())
        parameter.grad = placed.clone()
        if dist.get_rank() == rank:
            parameter.grad.to_local(grad_placements=placed.placements)[0] = float("nan")
        with pytest.raises(RuntimeError, match="not finite"):
            moesaic.clip_grad_norm_([parameter], 1.0, norm_type=float("inf"), error_if_nonfinite=True)


def test_a_nan_on_any_rank_is_seen_by_every_norm(same_ranks):
    same_ranks(check_nan_norm, 4)


def test_the_balance_bias_stays_in_fp32():
    moe = moesaic.MoE(CONFIG)
    moe.router.bias.fill_(0.123456789)
    exact = moe.router.bias.clone()
    moe.to(torch.bfloat16)
    assert moe.router.weight.dtype == torch.bfloat16
    assert torch.equal(moe.router.bias, exact)
    assert moesaic.MoE(CONFIG, device="meta").to_empty(device="cpu").router.bias.dtype == torch.float32


def check_meshes_come_after_the_group() -> None:
    early = moesaic.parallel.Meshes(moesaic.parallel.resolve_layout(1))
    with pytest.raises(ValueError, match="built before the process group of 2 ranks"):
        moesaic.parallelize(moesaic.MoE(CONFIG), early)


def test_meshes_need_the_process_group(ranks, monkeypatch):
    ranks(check_meshes_come_after_the_group, 2)
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"one of 4 processes.*init_process_group\(\) before build_meshes"):
        moesaic.build_meshes()


def check_frozen() -> None:
    torch.manual_seed(0)
    plain = moesaic.MoE(CONFIG)
    plain.router.requires_grad_(False)
    meshes = moesaic.build_meshes(**FOUR, device_type="cpu")
    moe = moesaic.parallelize(copy.deepcopy(plain), meshes)
    x = torch.randn(8, 8)
    plain(x).square().sum().backward()
    moe(x[meshes.sequence_slice(8)]).square().sum().backward()
    assert moe.router.weight.grad is None
    assert_gradients_close(moe.experts, {n: p.grad for n, p in plain.experts.named_parameters()})


def test_frozen_parameters_stay_frozen(same_ranks):
    same_ranks(check_frozen, 4)


def loss_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.logsumexp(-1).sum()


def check_two_lengths() -> None:
    reference = make_model(tied=False).train()
    model = moesaic.parallelize(copy.deepcopy(reference), moesaic.build_meshes(tp=2, ep=2, device_type="cpu"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    long, short = torch.randint(VOCAB, (BATCH, 10)), torch.randint(VOCAB, (BATCH, 5))
    for m in (reference, model):
        (loss_of(m, long) + loss_of(m, short)).backward()
    assert_gradients_close(model, {n: p.grad for n, p in reference.named_parameters()})


def test_recomputation_after_a_forward_of_another_length(same_ranks):
    same_ranks(check_two_lengths, 2)


def check_language_model_arguments(folder: str) -> None:
    model = moesaic.parallelize(make_model(tied=False), moesaic.build_meshes(tp=2, device_type="cpu"))
    ids = torch.randint(VOCAB, (2, 6))
    with pytest.raises(ValueError, match="logits_to_keep: with tp > 1 a rank has the logits of its own part"):
        model(input_ids=ids, logits_to_keep=2)
    # A path that cannot be a folder: rank 0 fails, and the others must not wait for it.
    expected = "File exists|could not export|Not a directory|is a file; give a folder"
    with pytest.raises((RuntimeError, OSError, ValueError), match=expected):
        export_pretrained(model, folder)


def test_a_failed_export_fails_everywhere(same_ranks, tmp_path):
    (tmp_path / "file").write_text("")
    same_ranks(check_language_model_arguments, 2, str(tmp_path / "file"))


def test_assert_close_sees_a_difference():
    with pytest.raises(AssertionError, match="x: error"):
        assert_close("x", torch.ones(3), torch.ones(3) * 1.001)
