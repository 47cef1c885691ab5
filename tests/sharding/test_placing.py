"""What the proof takes placements to mean is what DTensor takes them to mean."""

from itertools import product

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from moesaic.sharding.proof.deciders import is_local
from moesaic.sharding.proof.noise import Tolerance
from moesaic.sharding.proof.placing import is_even, join, mesh_placements, same, shard_sizes, split
from moesaic.sharding.simulated import parts_of
from tests.sharding.planted import AVG, MAX, MIN, S0, S1, P, R, random
from tests.sharding.simulated import simulated_ranks

MESHES = [(2,), (4,), (2, 2), (2, 3)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (1, 4), (0, 2)], ids=str)
def test_parts_make_up_the_value(mesh, shape):
    numbers = torch.arange(5 * 3).view(5, 3)[: shape[0]]
    masked = random(*shape).double().masked_fill(random(*shape, seed=1) > 0, -1e30)
    values = random(*shape).double(), masked, torch.complex(*random(2, *shape)), numbers, numbers % 3 == 1
    for value in (*values, (numbers * 50).to(torch.uint8)):
        allowed = Tolerance(1e-6, 1e-5) if value.is_complex() else Tolerance(1e-12, 1e-12)
        for placements in mesh_placements(2, value.dtype, len(mesh)):
            joined = join(split(value, placements, mesh), placements, mesh, allowed)
            assert joined is not None, placements
            assert same(joined, value, allowed), placements


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_parts_are_those_of_dtensor(mesh):
    value = random(5, 3).double()
    with simulated_ranks(*mesh) as ranks:
        for placements in product([R, S0, S1, P, AVG], repeat=len(mesh)):
            t = ranks.place(value, placements).redistribute(placements=[R] * len(mesh))
            for part in parts_of(t):
                torch.testing.assert_close(part, value, rtol=1e-12, atol=1e-12)
    with simulated_ranks(2) as ranks:
        for placement in (MAX, MIN):
            assert torch.equal(ranks.place(value, [placement]).full_tensor().reconcile(), value)


def test_terms_are_unrelated():
    value = random(40, 30).double()
    for placement in (P, AVG, MAX, MIN):
        a, b = (torch.stack([*split(value, (placement,), (2,), seed=s), value]).flatten(1) for s in (0, 1))
        for x, y in ((a[0], a[1]), (a[0], value.flatten())):
            assert not torch.equal(x, y)
        # No rank holds all, nor do two tensors have their terms in the same places.
        held = [(part == value.flatten()).double().mean() for part in (a[0], b[0])]
        assert all(h < 0.6 for h in held)
        if placement in (MAX, MIN):
            assert ((a[0] == value.flatten()) == (b[0] == value.flatten())).double().mean() < 0.6
            assert all(h > 0.4 for h in held)


def test_whole_numbers_stay_so():
    value = torch.arange(-6.0, 6.0).view(3, 4)
    for placement in (P, MAX, MIN):
        assert all(torch.equal(part, part.round()) for part in split(value, (placement,), (3,)))


def test_what_is_no_value():
    value = random(5, 3).double()
    parts = split(value, (S0,), (2,))
    assert join(parts, (S1,), (2,)) is None
    assert join(parts, (R,), (2,)) is None
    assert join(parts, (P,), (2,)) is None
    assert join(parts[::-1], (S0,), (2,)) is None, "two rows and three, where shards are three and two"
    assert join([value, value + 1], (R,), (2,)) is None
    assert join([value, value + 1e-14], (R,), (2,), Tolerance(atol=1e-12)) is not None


@pytest.mark.parametrize(("size", "n"), [(0, 2), (1, 4), (5, 2), (5, 4), (12, 4), (9, 4)])
def test_sizes_of_shards(size, n):
    ours = shard_sizes(size, n)
    theirs = [len(chunk) for chunk in torch.zeros(size).chunk(n)]
    assert [s for s in ours if s] == [s for s in theirs if s]
    assert len(ours) == n


def test_even():
    assert is_even((12, 5), (S0, S0), (2, 3))
    assert not is_even((9, 5), (S0, S0), (3, 2))
    assert is_even((9, 5), (S0, R), (3, 2))
    assert not is_even((9, 5), (R, S1), (3, 2))


def test_what_needs_no_communication():
    value = random(8, 4).double()
    with simulated_ranks(2, 2) as ranks:
        for given, wanted in product(product([R, S0, S1, P], repeat=2), repeat=2):
            t = ranks.place(value, given)
            if any(a != b == P for a, b in zip(given, wanted, strict=True)):
                continue  # which DTensor does not do
            with CommDebugMode() as counter:
                moved = t.redistribute(placements=wanted)
            assert isinstance(moved, DTensor)
            if is_local([given], [wanted]):
                assert counter.get_total_counts() == 0, (given, wanted)
            elif P not in given:
                assert counter.get_total_counts() > 0, (given, wanted)
