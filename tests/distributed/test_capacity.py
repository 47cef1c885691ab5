"""An exchange of bounded size: the same numbers where it fits, and no weight changes where it does not."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.checkpoint import checkpoint

import moesaic
from moesaic.parallel import Meshes, most_copies, skip_overflowed_steps
from tests.distributed.parity import assert_close, meshes_of, whole

T, D = 6, 8
CONFIG = moesaic.MoEConfig(dim=D, hidden_dim=10, num_experts=5, top_k=3, shared_hidden_dim=4)
LAYOUTS = [{"tp": 4, "ep": 4}, {"tp": 4, "ep": 2, "etp": 2}, {"ep": 2}, {"tp": 4, "etp": 4}]
WAYS = ("dtensor", "local")


def layer(meshes: Meshes, way: str, capacity: int | None) -> moesaic.MoE:
    torch.manual_seed(0)
    moe = moesaic.MoE(CONFIG)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moesaic.parallelize(moe, meshes, compute=way, capacity=capacity)


def tokens(rank: int) -> torch.Tensor:
    # A rank has none, and the others have different numbers of them.
    return torch.randn(T * rank // 2, D, generator=torch.Generator().manual_seed(rank), requires_grad=True)


def same_as_unbounded(way: str, layout: dict[str, int]) -> dict[str, int]:
    meshes = meshes_of(layout)
    results, most = [], 0
    for capacity in (None, 3 * T * 3 // 2):
        moe, x = layer(meshes, way, capacity), tokens(dist.get_rank())
        mask = torch.arange(len(x)) != 1
        with CommDebugMode() as mode:
            y = moe(x, mask)
        y.square().sum().backward()
        results.append({"y": y, "x": x.grad, **{name: p.grad for name, p in moe.named_parameters()}})
        most = most_copies(moe, meshes)
        assert most_copies(moe, meshes) == 0
    unbounded, bounded = results
    for name, t in unbounded.items():
        assert_close(name, whole(bounded[name]), whole(t))
    return {"most": most} | {str(op).rpartition(".")[2]: n for op, n in mode.get_comm_counts().items() if n}


@pytest.mark.parametrize(
    ("layout", "way"),
    [
        # The ways take turns; the others are long.
        pytest.param(layout, way, marks=[] if (i + j) % 2 == 0 else [pytest.mark.long], id=f"{layout} {way}")
        for i, layout in enumerate(LAYOUTS)
        for j, way in enumerate(WAYS)
    ],
)
def test_the_same_numbers_and_no_counts_exchanged(same_ranks, layout, way):
    for found in same_ranks(same_as_unbounded, 4, way, layout):
        # Sizes are known, and equal. Of two ranks a gather is an all-to-all, too.
        gathers = 2 * (layout.get("etp", 1) > 2)
        assert found.get("all_gather_into_tensor", 0) == gathers
        assert found["all_to_all_single"] == 3 * sum(layout.get(axis, 1) > 1 for axis in ("ep", "etp")) - gathers
        assert 0 < found["most"] <= 3 * T * 3 // 2


def overflows(way: str) -> None:
    meshes = meshes_of({"tp": 4, "ep": 4})
    # A rank routes up to 5 tokens, 3 copies each, to 4 ranks: more than 4 to some.
    moe = layer(meshes, way, 4)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=0.1)
    handle = skip_overflowed_steps(optimizer, moe, meshes)
    before = {name: whole(p).clone() for name, p in moe.named_parameters()}
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(dist.get_rank()))
    ours = x if dist.get_rank() == 3 else x[:1]  # one rank alone has too many
    y = moe(ours)
    assert bool(y.isnan().all()) == (dist.get_rank() == 3)
    y.sum().backward()
    with pytest.warns(UserWarning, match=r"capacity: \d+ copies were routed to one rank and there is room for 4"):
        optimizer.step()
    assert all(torch.equal(whole(p), before[name]) for name, p in moe.named_parameters())
    # The next step fits, and nothing of the last is left.
    moe(x[:1]).square().sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert all(bool(whole(p).isfinite().all()) for p in moe.parameters())
    assert not torch.equal(whole(moe.experts.w1), before["experts.w1"])
    handle.remove()


@pytest.mark.parametrize("way", WAYS)
def test_an_overflow_changes_no_weight(same_ranks, way):
    same_ranks(overflows, 4, way)


def refuses_closures() -> None:
    meshes = meshes_of({"tp": 2, "ep": 2})
    moe = layer(meshes, "local", 3 * T)
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    handle = skip_overflowed_steps(optimizer, moe, meshes)
    for give in ({"closure": lambda: 0.0}, (lambda: 0.0,)):
        with pytest.raises(ValueError, match="closure: makes gradients after .* call backward before"):
            optimizer.step(**give) if isinstance(give, dict) else optimizer.step(*give)
    optimizer.step(closure=None)
    handle.remove()


def test_a_closure_is_refused(same_ranks):
    same_ranks(refuses_closures, 2)


def another_way(way: str, how: str) -> None:
    """Recomputed in the backward pass, or compiled: the gradients of the plain call, and NaN where there is no room."""
    meshes = meshes_of({"tp": 2, "ep": 2})
    results = []
    for called in ("plain", how):
        moe, x = layer(meshes, way, 3 * T * 3 // 2), tokens(dist.get_rank())
        call = torch.compile(moe, backend="aot_eager", fullgraph=True) if called == "compiled" else moe
        y = checkpoint(moe, x, use_reentrant=False) if called == "recomputed" else call(x)
        y.square().sum().backward()
        results.append({"y": y, "x": x.grad, **{name: p.grad for name, p in moe.named_parameters()}})
        assert 0 < most_copies(moe, meshes) <= 3 * T * 3 // 2
        moe.dispatcher.capacity = 1
        assert (checkpoint(moe, x, use_reentrant=False) if called == "recomputed" else call(x)).isnan().all()
        assert most_copies(moe, meshes) > 1
    for name, t in results[0].items():
        assert_close(name, whole(results[1][name]), whole(t))


@pytest.mark.parametrize(
    ("way", "how"),
    [
        ("local", "recomputed"),
        pytest.param("dtensor", "recomputed", marks=pytest.mark.long),
        pytest.param("local", "compiled", marks=pytest.mark.long),
        pytest.param("dtensor", "compiled", marks=pytest.mark.long),
    ],
)
def test_recomputed_and_compiled(same_ranks, way, how):
    same_ranks(another_way, 2, way, how)


def refuses() -> None:
    meshes = meshes_of({"tp": 2, "ep": 2})
    for capacity, error, said in ((0, ValueError, "at least 1 copy"), (1.5, TypeError, "expected an int")):
        with pytest.raises(error, match=f"capacity: .*{said}"):
            moesaic.parallelize(moesaic.MoE(CONFIG), meshes, capacity=capacity)
    with pytest.raises(ValueError, match=r"capacity: ranks ask for different ones, \[1, 2\]"):
        moesaic.parallelize(moesaic.MoE(CONFIG), meshes, capacity=1 + dist.get_rank())


def test_wrong_capacities_are_refused_on_all_ranks(same_ranks):
    same_ranks(refuses, 2)
