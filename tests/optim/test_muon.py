"""Muon in one process: the numbers of torch's, for experts too, and what it refuses."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import moesaic
from moesaic.layers import quantize_
from moesaic.layers.lora import ExpertsAdapter, Rank
from moesaic.optim import Muon, param_groups
from tests.distributed.parity import assert_close

STEPS = 3


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    options=st.fixed_dictionaries(
        {
            "nesterov": st.booleans(),
            "adjust_lr_fn": st.sampled_from([None, "original", "match_rms_adamw"]),
            "ns_steps": st.integers(0, 6),
            "momentum": st.sampled_from([0.0, 0.5, 0.95]),
            "weight_decay": st.sampled_from([0.0, 0.3]),
        }
    ),
)
def test_matrices_have_the_numbers_of_torch(shape, options):
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(w) for w in torch.randn(shape).repeat(2, 1, 1))
    optimizers = Muon([ours], lr=0.02, **options), torch.optim.Muon([theirs], lr=0.02, **options)
    for _ in range(STEPS):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert_close("weights", ours.detach(), theirs.detach())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
def test_each_expert_is_a_matrix_by_itself(shape, adjust_lr_fn):
    """Of `[in, out]`, where torch's are `[out, in]`. One expert never gets a token."""
    torch.manual_seed(0)
    experts = nn.Parameter(torch.randn(5, *shape))
    matrices = [nn.Parameter(w.mT.contiguous()) for w in experts.detach()]
    optimizers = (
        Muon([experts], lr=0.02, adjust_lr_fn=adjust_lr_fn),
        torch.optim.Muon(matrices, lr=0.02, adjust_lr_fn=adjust_lr_fn),
    )
    for _ in range(STEPS):
        experts.grad = torch.randn(5, *shape) * torch.tensor([1.0, 1e-3, 0, 1e3, 1]).view(5, 1, 1)
        for matrix, gradient in zip(matrices, experts.grad, strict=True):
            matrix.grad = gradient.mT.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    assert_close("experts", experts.detach(), torch.stack([matrix.detach().mT for matrix in matrices]))


def test_updates_are_orthogonal_in_the_dtype_asked_for():
    weight = nn.Parameter(torch.zeros(3, 12, 20))
    weight.grad = torch.randn(3, 12, 20)
    exact = {"ns_steps": 30, "ns_coefficients": (1.5, -0.5, 0.0), "ns_dtype": torch.float64}
    Muon([weight], lr=1.0, weight_decay=0.0, **exact).step()
    scaled = weight.detach().double() / (20 / 12) ** 0.5
    torch.testing.assert_close(scaled @ scaled.mT, torch.eye(12).double().expand(3, -1, -1), atol=1e-5, rtol=0)


def names_of(model: nn.Module, groups: list[dict]) -> dict[str, str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: g["algorithm"] + (", no decay" if g.get("weight_decay") == 0 else "")
        for g in groups
        for p in g["params"]
    }


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = moesaic.MoEConfig(
            dim=8, hidden_dim=16, num_experts=4, top_k=2, shared_hidden_dim=12, shared_gate=True, expert_biases=True
        )
        self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.mixer, self.norm, self.conv = nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv1d(8, 8, 3)
        self.moe, self.frozen = moesaic.MoE(config), nn.Linear(8, 8, bias=False).requires_grad_(False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def test_groups_say_what_is_for_muon():
    model = Model()
    groups = names_of(model, param_groups(model))
    assert {name for name, kind in groups.items() if kind == "muon"} == {
        "mixer.weight",
        *(f"moe.experts.{w}" for w in ("w1", "w3", "w2")),
        *(f"moe.shared.{w}.weight" for w in ("w1", "w3", "w2")),
    }
    decayed = {"embedding.weight", "head.weight", "conv.weight", "moe.router.weight", "moe.shared.gate.weight"}
    assert {name for name, kind in groups.items() if kind == "adamw"} == decayed
    assert groups.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert names_of(model, param_groups(model, adamw=[model.mixer]))["mixer.weight"] == "adamw"
    with pytest.raises(ValueError, match="model: none of its parameters requires a gradient"):
        param_groups(model.frozen)


def test_factors_of_adapters_are_matrices_and_quantised_weights_are_none():
    model = Model().requires_grad_(False)
    quantize_(model.moe, "int8")
    ranks = {weight: Rank(2, 1.0) for weight in ("w1", "w3", "w2")}
    model.moe.experts.adapters = nn.ModuleDict({"default": ExpertsAdapter(model.moe.experts, ranks)})
    groups = names_of(model, param_groups(model))
    factors = {f"moe.experts.adapters.default.{w}_{ab}" for w in ("w1", "w3", "w2") for ab in "ab"}
    assert groups == dict.fromkeys(factors, "muon")


def test_other_parameters_have_the_numbers_of_adamw():
    torch.manual_seed(0)
    model = Model()
    twin = copy.deepcopy(model)
    optimizer = Muon(param_groups(model), lr=0.01, weight_decay=0.2, betas=(0.8, 0.9))
    of_twin = dict(twin.named_parameters())
    kinds = names_of(model, optimizer.param_groups[1:])
    decay = {"adamw": 0.2, "adamw, no decay": 0.0}
    adamw = torch.optim.AdamW(
        [{"params": [of_twin[n]], "weight_decay": decay[kind]} for n, kind in kinds.items()], lr=0.01, betas=(0.8, 0.9)
    )
    for _ in range(STEPS):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
                of_twin[name].grad = parameter.grad.clone()
        optimizer.step()
        adamw.step()
    for name, parameter in model.named_parameters():
        if name in kinds:
            torch.testing.assert_close(parameter, of_twin[name], msg=name)
    # Copies go on as the original does.
    other = Muon(param_groups(twin), lr=0.01, weight_decay=0.2, betas=(0.8, 0.9))
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, parameter in model.named_parameters():
        of_twin[name].grad = parameter.grad
    optimizer.step()
    other.step()
    assert all(torch.equal(p, of_twin[name]) for name, p in model.named_parameters())


W = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Muon([nn.Parameter(torch.zeros(3))]), r"params: parameter 0 of group 0, of shape \[3\], is no matrix"),
        (lambda: Muon([W, torch.zeros(2, 2, 2, 2)]), r"parameter 1 of group 0, of shape \[2, 2, 2, 2\], is no matrix"),
        (lambda: Muon([W.to(torch.complex64)]), "is torch.complex64, not of real numbers"),
        (lambda: Muon([W], lr=-1), "lr: must be a number, 0 or more, got -1"),
        (lambda: Muon([{"params": [W], "momentum": float("nan")}]), "momentum of group 0: must be a number"),
        (lambda: Muon([W], ns_steps=100), "ns_steps: must be 0 or more and below 100, got 100"),
        (lambda: Muon([W], ns_coefficients=(1.0, 2.0)), "ns_coefficients: expected three numbers"),
        (lambda: Muon([W], adjust_lr_fn="rms"), "adjust_lr_fn: got 'rms'; choose one of .*match_rms_adamw"),
        (lambda: Muon([W], ns_dtype=torch.float16), "ns_dtype: got torch.float16; choose one of"),
        (lambda: Muon([{"params": [W], "algorithm": "sgd"}]), "algorithm: a group has 'sgd'; choose 'muon' or 'adamw'"),
    ],
)
def test_what_cannot_be_is_refused(unchecked, make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_sparse_gradients_are_refused():
    weight = nn.Parameter(torch.zeros(4, 6))
    weight.grad = torch.ones(4, 6).to_sparse()
    with pytest.raises(RuntimeError, match="Muon takes no sparse gradients"):
        Muon([weight]).step()
