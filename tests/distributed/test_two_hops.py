"""Rows that cross between nodes once a node: what arrives, what comes back, and every gradient."""

import copy
import dataclasses
import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import moesaic
from moesaic.layers import update_expert_bias
from moesaic.layers.router import Routing
from moesaic.parallel.dispatch import MeshDispatcher
from moesaic.testing import Layout
from tests.distributed.parity import LocalAdamW, assert_close, assert_gradients_close, clip
from tests.distributed.test_collectives_count import BACKWARD_PER_AXIS, FORWARD_PER_AXIS, named
from tests.distributed.test_moe_parity import ALL_RUNS, EVEN, Run, Sizes, make_moe
from tests.policies import recomputed

UNEVEN = Sizes(experts=13, hidden=7)

# Ranks, their layout, how many are on a node, and the sizes of a layer.
LAYOUTS = {
    "tp2 ep4, 2 on a node": (4, {"tp": 2, "ep": 4}, 2, EVEN),
    "tp8 ep8, 4 on a node": (8, {"tp": 8, "ep": 8}, 4, UNEVEN),
    "tp2 ep8, 2 on a node": (8, {"tp": 2, "ep": 8}, 2, EVEN),
    "tp4 ep4 etp2, 4 on a node": (8, {"tp": 4, "ep": 4, "etp": 2}, 4, EVEN),
    "ep4, 2 on a node": (8, {"ep": 4}, 2, EVEN),
}
SLOW = ("tp2 ep8, 2 on a node", "ep4, 2 on a node")


@functools.cache
def meshes_on_nodes(per_node: int, **layout: int) -> moesaic.parallel.Meshes:
    return moesaic.build_meshes(**layout, device_type="cpu", ranks_per_node=per_node)


def dispatcher_of(per_node: int, **layout: int) -> MeshDispatcher:
    meshes = meshes_on_nodes(per_node, **layout)
    assert meshes.nodes.groups is not None
    return MeshDispatcher(meshes.expert["ep", "etp"], local=True, nodes=meshes.nodes.groups)


def routing_of(rank: int, case: dict[str, int]) -> tuple[Tensor, Routing]:
    """Tokens of a rank, whose number differs from rank to rank and may be 0; a copy in five is of padding."""
    generator = torch.Generator().manual_seed(100 * case["seed"] + rank)
    T, E, K = int(torch.randint(0, case["tokens"] + 1, (), generator=generator)), case["experts"], case["top_k"]
    x = torch.randn(T, 4, dtype=torch.float64, generator=generator)
    ids = torch.rand(T, E, generator=generator).topk(K).indices
    ids = ids.masked_fill(torch.rand(T, 1, generator=generator) < 0.2, -1)
    if case["to_one"]:  # of all ranks, and all experts but one idle
        ids = torch.where(ids < 0, ids, case["seed"] % E)
        ids[:, 1:] = -1
    weights = torch.rand(T, K, dtype=torch.float64, generator=generator)
    keys = torch.randint(-(1 << 62), 1 << 62, (T, K), generator=generator)
    return x, Routing(ids, weights, keys=keys)


def in_place(x: Tensor, ids: Tensor, weights: Tensor, keys: Tensor, first: int = 0) -> Tensor:
    """Stands for experts: a sum over a token's copies in which each has a factor of its expert and its key."""
    factor = (ids + first + 1) + (keys % 1013)
    return x * (weights * torch.where(ids < 0, 0, factor)).sum(-1, keepdim=True)


def check_what_arrives(layout: dict[str, int], per_node: int, cases: list[dict[str, int]]) -> None:
    dispatcher = dispatcher_of(per_node, **layout)
    P = dispatcher.ep.size()
    for case in cases:
        x, routing = routing_of(dist.get_rank(), case)
        results = []
        for dispatched in (True, True, False):
            x, weights = (t.detach().clone().requires_grad_() for t in (x, routing.weights))
            if dispatched:
                sent = dispatcher.dispatch(x, routing._replace(weights=weights), case["experts"])
                first = dispatcher.ep.rank() * -(-case["experts"] // P)
                rows, ids, at, keys = (t[0] for t in (sent.x, sent.topk_ids, sent.topk_weights, sent.keys))
                here = ids.flatten() >= 0
                assert torch.equal(sent.copies[0][: here.sum()], here.nonzero().squeeze(1))
                z = in_place(rows, ids, at, keys, first)
                # Ranks of etp have terms of a sum.
                y = dispatcher.combine((z / dispatcher.etp.size()).unsqueeze(0), sent)
            else:
                y = in_place(x, routing.ids, weights, routing.keys)
            y.square().sum().backward()
            results.append({"y": y.detach(), "x": x.grad, "weights": weights.grad})
        first, again, expected = results
        for name, t in expected.items():
            assert torch.equal(first[name], again[name]), f"{case}: {name} has other bits the second time"
            assert_close(f"{case}: {name}", first[name], t, 1e-12)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAYOUTS]
)
def test_rows_and_gradients_arrive(same_ranks, name):
    ranks, layout, per_node, _ = LAYOUTS[name]
    cases = [
        # Experts that ranks do not divide; up to as many ranks without one as there are.
        {"experts": 8 + 5 * i % 9, "top_k": 1 + i % 8, "tokens": 1 + i // 2, "to_one": int(i in (5, 9)), "seed": i}
        for i in range(16)
    ]
    same_ranks(check_what_arrives, ranks, layout, per_node, cases)


def parallel(per_node: int, way: str, moe: moesaic.MoE, layout: Layout) -> moesaic.MoE:
    moe = moesaic.parallelize(moe, meshes_on_nodes(per_node, **layout), compute=way)
    assert moe.dispatcher.nodes is not None
    return moe


# The others are slow, and take turns.
@pytest.mark.parametrize(
    ("name", "runs"),
    [
        pytest.param(
            name, ALL_RUNS[::3] if not i else [ALL_RUNS[i % 4]], marks=[pytest.mark.slow] if i else [], id=name
        )
        for i, name in enumerate(LAYOUTS)
    ],
)
def test_every_gradient_is_that_of_one_process(equal_gradients, name, runs):
    ranks, layout, per_node, sizes = LAYOUTS[name]
    for way, routing in runs:
        run = Run(routing, way, 5, sizes)
        equal_gradients(
            functools.partial(make_moe, routing, run.sizes),
            run.inputs,
            functools.partial(parallel, per_node, way),
            [layout],
            world=ranks,
            loss=run.loss,
            clip=clip,
            optimizer=functools.partial(LocalAdamW, lr=1e-2),
            after_step=update_expert_bias,
            steps=3,
        )


CONFIG = moesaic.MoEConfig(
    dim=8, hidden_dim=6, num_experts=7, top_k=3, shared_hidden_dim=4, expert_biases=True, score_bias=True
)


def layers(way: str) -> tuple[moesaic.MoE, moesaic.MoE]:
    """A layer, and the same on 4 ranks, two of them on a node."""
    torch.manual_seed(0)
    plain = moesaic.MoE(CONFIG)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return plain, parallel(2, way, copy.deepcopy(plain), Layout({"tp": 4, "ep": 4}))


def check_called(way: str, call: str) -> None:
    plain, layer = layers(way)
    # The fewest give a rank none.
    for length in (9, 14, 3):
        torch.manual_seed(length)
        inputs = torch.randn(length, 8, requires_grad=True)
        plain.zero_grad()
        layer.zero_grad()
        plain(inputs).square().sum().backward()
        mine = torch.arange(length).tensor_split(4)[dist.get_rank()]
        x = inputs.detach()[mine].requires_grad_()
        if call == "compiled":
            y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        else:
            y = recomputed(call, layer, x)
        y.square().sum().backward()
        assert_gradients_close(layer, {n: p.grad for n, p in plain.named_parameters()}, f", {length} tokens")
        assert_close(f"input gradient, {length} tokens", x.grad, inputs.grad[mine])
        with torch.no_grad():
            assert torch.equal(layer(x), y)


@pytest.mark.parametrize(
    ("call", "way"),
    [
        *itertools.product(["plain", "torchtitan"], ["dtensor", "local"]),
        pytest.param("reentrant", "dtensor", marks=pytest.mark.slow),
        *(pytest.param("compiled", way, marks=pytest.mark.long) for way in ("dtensor", "local")),
    ],
)
def test_recomputed_and_compiled(same_ranks, call, way):
    same_ranks(check_called, 4, way, call)


def check_half(impl: str) -> None:
    """Half types: as far from the exact result as one hop is, and not twice as far."""
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, num_experts=8, dim=64)
    exact = moesaic.MoE(config, dtype=torch.float64)
    inputs = torch.randn(40, 64, dtype=torch.float64).bfloat16().double()
    expected = exact(inputs)[dist.get_rank() :: 4]
    errors = []
    for per_node in (2, 1):
        half = moesaic.MoE(config, impl=impl, dtype=torch.bfloat16)
        half.load_state_dict(exact.state_dict())
        layer = moesaic.parallelize(half, meshes_on_nodes(per_node, tp=4, ep=4), compute="local")
        assert (layer.dispatcher.nodes is None) == (per_node == 1)
        errors.append((layer(inputs[dist.get_rank() :: 4].bfloat16()).double() - expected).norm() / expected.norm())
    assert errors[0] <= 2 * errors[1] < 0.05


@pytest.mark.parametrize("impl", ["reference", "torch", "cpu"])
def test_half_types(same_ranks, impl):
    same_ranks(check_half, 4, impl)


def count_collectives(layout: dict[str, int], per_node: int) -> tuple[dict[str, int], dict[str, int]]:
    config = dataclasses.replace(CONFIG, shared_hidden_dim=0)
    moe = moesaic.parallelize(moesaic.MoE(config), meshes_on_nodes(per_node, **layout))
    with CommDebugMode() as forward:
        y = moe(torch.randn(3, 8, requires_grad=True))
    with CommDebugMode() as backward:
        y.sum().backward()
    return named(forward), named(backward)


def test_another_hop_is_three_more_all_to_alls_and_no_more_counts(same_ranks):
    for forward, backward in same_ranks(count_collectives, 4, {"tp": 4, "ep": 4}, 2):
        assert forward == {"all_gather_into_tensor": 1, "all_to_all_single": 2 * FORWARD_PER_AXIS}
        assert backward == {"all_to_all_single": 2 * BACKWARD_PER_AXIS, "all_reduce": 1}
