"""Muon on DTensors: the numbers of one process in every layout, each matrix at one rank, and checkpoints."""

import functools
from collections.abc import Mapping
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moesaic
from moesaic import checkpoint
from moesaic.integrations.transformers import swap_moe
from moesaic.optim import Muon, muon, param_groups
from moesaic.optim.newton_schulz import orthogonalize
from moesaic.parallel.collectives import sent_bytes
from moesaic.sharding.parts import local_part, with_part
from moesaic.testing import Layout
from tests.distributed.parity import assert_close, assert_weights_close, legal_layouts, meshes_of, whole
from tests.distributed.test_qwen3_parity import Run, clip, inputs, loss_of

STEPS = 2
OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
# Experts and matrices whole, cut, copied, both; five experts over ranks of which some then have none.
LAYOUTS: dict[int, list[dict[str, int]]] = {
    2: [{}, {"tp": 2, "ep": 2}, {"dp_replicate": 2, "etp": 2}, {"cp": 2}],
    3: [{"ep": 3}, {"etp": 3}],
    4: [{"ep": 2}, {"tp": 4, "ep": 4}, {"dp_replicate": 2, "tp": 2}],
    8: [
        {"tp": 2, "dp_replicate": 2, "ep": 2, "etp": 2},
        {"tp": 4, "ep": 4, "etp": 2},
        {"ep": 2},
        {"dp_replicate": 4, "etp": 4},
    ],
}


def make_model(experts: int = 5) -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        mlp_only_layers=[1],
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        num_experts=experts,
        num_experts_per_tok=2,
        attention_bias=True,
        initializer_range=0.2,
        use_cache=False,
    )
    return swap_moe(Qwen3MoeForCausalLM(config))


def give_gradients(model: nn.Module, step: int) -> None:
    """The same numbers in every layout, in the order of names; of one expert zeros."""
    generator = torch.Generator().manual_seed(step)
    for _, parameter in sorted(model.named_parameters()):
        gradient = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 3:
            gradient[1] = 0
        parameter.grad = placed_as(parameter, gradient)


def placed_as(parameter: Tensor, value: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return value
    return with_part(value[local_part(parameter)[1]].contiguous(), parameter)


@functools.cache
def expected(steps: int = STEPS) -> dict[str, Tensor]:
    model = make_model()
    take_steps(model, Muon(param_groups(model), **OPTIONS), range(steps))
    return {name: p.detach() for name, p in model.named_parameters()}


def take_steps(model: nn.Module, optimizer: Muon, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        optimizer.step()


def check_layouts(layouts: list[dict[str, int]]) -> None:
    for layout in layouts:
        model = moesaic.parallelize(make_model(), meshes_of(layout))
        optimizer = Muon(param_groups(model), **OPTIONS)
        done: list[int] = []
        with mock.patch.object(muon, "orthogonalize", functools.partial(counted, done)):
            take_steps(model, optimizer, range(STEPS))
        assert_weights_close(model, expected())
        check_work(optimizer.param_groups[0]["params"], done)


def counted(done: list[int], x: Tensor, **options: object) -> Tensor:
    done.append(len(x))
    return orthogonalize(x, **options)


def check_work(parameters: list[Tensor], done: list[int]) -> None:
    """No two ranks have done the same matrix."""
    total = torch.tensor(sum(done))
    dist.all_reduce(total)
    matrices = sum(p.shape[0] if p.ndim == 3 else 1 for p in parameters if isinstance(p, DTensor))
    assert total == STEPS * matrices


def test_a_layout_has_the_numbers_of_one_process(same_ranks):
    same_ranks(check_layouts, 4, [{"tp": 2, "ep": 2, "etp": 2}])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [pytest.param(n, marks=[pytest.mark.long] if n > 4 else []) for n in LAYOUTS])
def test_layouts_that_differ_in_kind(same_ranks, world_size):
    same_ranks(check_layouts, world_size, LAYOUTS[world_size])


@pytest.mark.long
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_layout(ranks, world_size):
    ranks(check_layouts, world_size, [one for one in legal_layouts(world_size) if one["tp"] <= 4 and one["ep"] <= 2])


def optimizer_of(parameters: list[nn.Parameter]) -> Muon:
    """As `param_groups` would have it, of parameters alone."""
    matrices = [p for p in parameters if p.ndim == 3 or (p.ndim == 2 and p.shape[0] not in (61, 8))]
    others = [p for p in parameters if all(p is not m for m in matrices)]
    meshes = {p.device_mesh if isinstance(p, DTensor) else None for p in others}
    groups = [
        {"params": [p for p in others if getattr(p, "device_mesh", None) == mesh], "algorithm": "adamw"}
        for mesh in meshes
    ]
    # Rounded to bf16, rounding errors would become larger.
    return Muon([{"params": matrices}, *groups], lr=1e-3, ns_dtype=torch.float32)


@pytest.mark.slow
def test_training_equals_that_of_one_process(equal_gradients):
    equal_gradients(
        functools.partial(make_model, 8),
        inputs,
        Run().parallelize,
        [Layout({"tp": 2, "ep": 2, "etp": 2}, 4), Layout({"ep": 2}, 4)],
        loss=loss_of,
        clip=clip,
        optimizer=optimizer_of,
        steps=3,
    )


def check_equal_work() -> None:
    """Sixteen equal matrices over four ranks: four each, however they lie, and nothing travels that need not."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    matrix = 4 * 6 * 2  # bytes in bf16
    cases = {
        # Copies on two ranks: to the other goes the result of four matrices.
        (Shard(0), Replicate()): 4 * matrix,
        # A quarter of each on every rank: those of twelve matrices go to their owners, and four results to three ranks.
        (Shard(1), Shard(2)): 2 * 12 * matrix // 4,
        (Replicate(), Replicate()): 3 * 4 * matrix,
        # Halves of eight matrices on two ranks.
        (Shard(2), Shard(0)): 2 * 4 * matrix // 2,
    }
    for placements, sent in cases.items():
        value = torch.randn(16, 4, 6)
        parameter = nn.Parameter(distribute_tensor(value, mesh, placements))
        parameter.grad = distribute_tensor(value, mesh, placements)
        done: list[int] = []
        before = sent_bytes()
        with mock.patch.object(muon, "orthogonalize", functools.partial(counted, done)):
            Muon([parameter]).step()
        assert done == [4]
        assert sent_bytes() - before == sent, placements


def check_refusals() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    rank = dist.get_rank()
    partial = DTensor.from_local(torch.ones(4, 6), mesh, [Partial(), Replicate()])
    with pytest.raises(ValueError, match="parameter 0 of group 0, of shape .4, 6., is P"):
        Muon([partial])
    parameters = [nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(0), Replicate()])) for _ in range(3)]
    for number, parameter in enumerate(parameters):
        if number != 1 or rank != 2:
            parameter.grad = parameter.detach().clone()
    with pytest.raises(ValueError, match=r"group 0: ranks 0 and 2 of its meshes have different gradients .*\[1\] and"):
        Muon(parameters).step()
    assert all(bool((parameter.to_local() == 1).all()) for parameter in parameters)
    with pytest.raises(ValueError, match="ranks 0 and 3 of its meshes have different ns_steps 5 and 4; call step"):
        Muon([parameters[0]], ns_steps=4 if rank == 3 else 5).step()


def check_gradients_of_other_placements() -> None:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("a",))
    value = torch.randn(6, 10)
    parameter, plain = nn.Parameter(distribute_tensor(value, mesh, [Shard(1)])), nn.Parameter(value.clone())
    gradient = torch.randn(6, 10)
    parameter.grad = None
    with mock.patch.object(DTensor, "grad", DTensor.from_local(gradient / 4, mesh, [Partial()])):
        Muon([parameter]).step()
    plain.grad = gradient
    Muon([plain]).step()
    assert_close("weight", whole(parameter), plain.detach())


@pytest.mark.parametrize("check", [check_equal_work, check_refusals, check_gradients_of_other_placements])
def test_four_ranks(same_ranks, check):
    same_ranks(check, 4)


def save(folder: str, layout: Mapping[str, int]) -> None:
    model = moesaic.parallelize(make_model(), meshes_of(layout))
    optimizer = Muon(param_groups(model), **OPTIONS)
    take_steps(model, optimizer, range(1))
    checkpoint.save(folder, 1, checkpoint.training_state(model, optimizer), {})


def go_on(folder: str, layout: Mapping[str, int], exact: bool) -> None:
    model = moesaic.parallelize(make_model(), meshes_of(layout))
    optimizer = Muon(param_groups(model), **OPTIONS)
    state = checkpoint.training_state(model, optimizer)
    checkpoint.load(folder, state)
    checkpoint.restore(model, optimizer, state)
    take_steps(model, optimizer, range(1, STEPS))
    assert_weights_close(model, expected())
    if exact:
        uninterrupted = moesaic.parallelize(make_model(), meshes_of(layout))
        take_steps(uninterrupted, Muon(param_groups(uninterrupted), **OPTIONS), range(STEPS))
        of_other = dict(uninterrupted.named_parameters())
        assert all(torch.equal(whole(p), whole(of_other[name])) for name, p in model.named_parameters())


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_any_layout(same_ranks, tmp_path):
    same_ranks(save, 4, str(tmp_path), {"tp": 2, "etp": 2})
    same_ranks(go_on, 4, str(tmp_path), {"tp": 2, "etp": 2}, True)
    same_ranks(go_on, 2, str(tmp_path), {"ep": 2}, False)
    same_ranks(go_on, 3, str(tmp_path), {"ep": 3}, False)
