"""Layouts: what is legal, and what an illegal one is told. No process group."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moesaic
from moesaic.parallel.mesh import Meshes, resolve_layout
from moesaic.parallel.sequence import sequence_slices

size = st.integers(1, 8)


def test_both_products_are_the_world_size():
    layout = resolve_layout(16, tp=2, ep=4, etp=2, dp_replicate=2)
    assert (layout.dp_shard, layout.edp) == (4, 2)
    assert layout.world_size == 16
    assert str(layout) == "dp_replicate 2 x dp_shard 4 x tp 2, experts edp 2 x ep 4 x etp 2"


@given(world=size, tp=size, cp=size, ep=size, etp=size, replicate=size, shard=st.none() | size)
def test_a_layout_is_legal_or_an_error_suggests_legal_ones(world, tp, cp, ep, etp, replicate, shard):
    sizes = {"tp": tp, "cp": cp, "ep": ep, "etp": etp, "dp_replicate": replicate, "dp_shard": shard}
    given = replicate * cp * tp
    dense_fits = given * shard == world if shard else world % given == 0
    if dense_fits and world % (ep * etp) == 0:
        layout = resolve_layout(world, **sizes)
        assert layout.dp_replicate * layout.dp_shard * layout.cp * layout.tp == world
        assert layout.edp * layout.ep * layout.etp == world
        return
    with pytest.raises(ValueError, match=f"world size {world}") as error:
        resolve_layout(world, **sizes)
    suggestion = str(error.value).rpartition("choices: ")[2].rstrip(".").split("; ")[0]
    better = {name: int(value) for name, value in (pair.split("=") for pair in suggestion.split(", "))}
    # What is suggested mends the product that was wrong; dp_shard was said to be best left out.
    dense_is_mended = "tp" in better
    rest = {"ep": 1, "etp": 1} if dense_is_mended else {"tp": 1, "cp": 1, "dp_replicate": 1}
    resolve_layout(world, **(sizes | {"dp_shard": None} | rest | better))


def test_stages_share_the_ranks_out_before_the_other_axes():
    layout = resolve_layout(16, pp=2, tp=2, ep=4)
    assert (layout.stage_size, layout.world_size, layout.dp_shard, layout.edp) == (8, 16, 4, 2)
    assert str(layout).startswith("pp 2, each dp_replicate 1 x dp_shard 4 x tp 2, experts edp 2 x ep 4")
    with pytest.raises(ValueError, match="pp = 3 must divide the world size 8. Nearest legal choices: pp=4; pp=2; pp"):
        resolve_layout(8, pp=3)
    # ep fits the world and no stage of it.
    with pytest.raises(ValueError, match=r"= 8 must divide the size of a stage 4 \(.* = world size / pp\)"):
        resolve_layout(8, pp=2, ep=8)


@pytest.mark.parametrize("name", ["pp", "tp", "cp", "ep", "etp", "dp_replicate", "dp_shard"])
def test_sizes_below_one_are_named(name):
    with pytest.raises(ValueError, match=f"{name}: must be at least 1, got 0"):
        resolve_layout(4, **{name: 0})


def test_the_message_names_the_product():
    with pytest.raises(ValueError, match=r"ep \* etp = 3 \* 2 = 6 must divide the world size 4") as error:
        resolve_layout(4, ep=3, etp=2)
    assert "Nearest legal choices: ep=2, etp=2; " in str(error.value)


@given(length=st.integers(0, 50), shards=size)
def test_sequence_slices_are_dtensor_chunks(length, shards):
    pieces = [list(range(length))[s] for s in sequence_slices(length, shards)]
    assert [i for piece in pieces for i in piece] == list(range(length))
    full = -(-length // shards)
    assert all(len(piece) == full for piece in pieces[: length // full if full else 0])


@given(length=st.integers(0, 50), cp=size, tp=size)
def test_ranks_of_cp_and_tp_have_every_position_once_and_equally_much_to_attend_to(length, cp, tp):
    layout = resolve_layout(cp * tp, cp=cp, tp=tp)
    everyone = [FakeMeshes(layout, c, t).sequence_positions(length).tolist() for c in range(cp) for t in range(tp)]
    assert sorted(position for mine in everyone for position in mine) == list(range(length))
    assert all(mine == sorted(mine) for mine in everyone)
    if length % (2 * cp) == 0:
        work = [sum(i + 1 for mine in everyone[c * tp : (c + 1) * tp] for i in mine) for c in range(cp)]
        assert len(set(work)) == 1
    if cp == 1:
        assert everyone == [list(range(length))[s] for s in sequence_slices(length, tp)]


class FakeMeshes(Meshes):
    def __init__(self, layout, cp_rank, tp_rank):
        super().__init__(layout)
        vars(self)["places"] = cp_rank, tp_rank

    cp_rank = property(lambda self: self.places[0])
    tp_rank = property(lambda self: self.places[1])


def test_under_cp_a_part_is_no_slice():
    assert FakeMeshes(resolve_layout(2, cp=2), 0, 0).sequence_positions(7).tolist() == [0, 1, 6]
    assert FakeMeshes(resolve_layout(2, cp=2), 1, 0).sequence_positions(7).tolist() == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="with cp 2 a rank has two pieces .*use meshes.sequence_positions"):
        FakeMeshes(resolve_layout(2, cp=2), 0, 0).sequence_slice(7)


def test_one_process_needs_no_process_group():
    meshes = moesaic.build_meshes()
    assert not meshes.is_distributed
    assert meshes.device_type is None
    for view in ("dense", "expert"):
        with pytest.raises(ValueError, match=rf"meshes\.{view}: one process .* has no meshes; .*torchrun"):
            getattr(meshes, view)
    assert (meshes.dp_rank, meshes.dp_size, meshes.tp_rank, meshes.tp_size) == (0, 1, 0, 1)
    assert meshes.sequence_slice(7) == slice(0, 7)
    with pytest.raises(ValueError, match="must divide the world size 1"):
        moesaic.build_meshes(ep=2)
