import os
import time

import pytest
import torch
import torch.distributed as dist

from moesaic.testing import pool
from moesaic.testing.pool import RankError


def _rank_and_sum(scale, offset=0):
    total = torch.tensor([dist.get_rank() * scale + offset])
    dist.all_reduce(total)
    return dist.get_rank(), os.getpid(), total


def _threads_and_environment():
    return torch.get_num_threads(), os.environ["RANK"], os.environ["LOCAL_WORLD_SIZE"], dist.get_backend()


def _awkward_tensors():
    base = torch.arange(12.0).view(3, 4)
    return {
        "bf16": base.bfloat16(),
        "transposed": base.mT,
        "parameter": torch.nn.Parameter(base),
        "non-leaf": base.requires_grad_() * 2,
        "empty": torch.empty(0, 3),
    }


def _add_one(tensor):
    return tensor + 1


def _pid_and_random():
    return os.getpid(), torch.rand(()).item()


def _raise_on(bad_ranks):
    if dist.get_rank() in bad_ranks:
        raise KeyError(f"planted on {dist.get_rank()}")
    return dist.get_rank()


def _raise_while_others_wait(bad_rank):
    if dist.get_rank() == bad_rank:
        raise KeyError("planted")
    dist.barrier()


def _sleep_while_other_raises():
    if dist.get_rank() == 0:
        raise KeyError("planted")
    time.sleep(3600)


def _die(bad_rank):
    if dist.get_rank() == bad_rank:
        os._exit(7)
    dist.barrier()


def _return_lambda():
    return lambda: None


def _meshes(ranks):
    # Equal meshes, whose process groups were made in another order: the second call must not see the first's.
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    for _ in range(ranks):
        dist.new_group([0])
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("a", "b"))
    x = DTensor.from_local(torch.ones(2), mesh, [Partial(), Partial()])
    return (x + x).redistribute(placements=[Replicate(), Replicate()]).to_local()


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_results_come_in_rank_order(ranks, world_size):
    results = ranks(_rank_and_sum, world_size, 10, offset=1)
    assert [rank for rank, _, _ in results] == list(range(world_size))
    assert len({pid for _, pid, _ in results} | {os.getpid()}) == world_size + 1
    expected = sum(rank * 10 + 1 for rank in range(world_size))
    assert all(total.item() == expected for _, _, total in results)


def test_a_rank_looks_like_one_of_a_launcher(ranks):
    assert ranks(_threads_and_environment, 2) == [(1, "0", "2", "gloo"), (1, "1", "2", "gloo")]


def test_tensors_travel_by_value(ranks):
    base = torch.arange(12.0).view(3, 4)
    [result] = ranks(_awkward_tensors, 1)
    assert result["bf16"].dtype == torch.bfloat16
    torch.testing.assert_close(result["transposed"], base.mT)
    assert isinstance(result["parameter"], torch.nn.Parameter)
    torch.testing.assert_close(result["non-leaf"].detach(), base * 2)
    assert result["empty"].shape == (0, 3)
    [plus_one] = ranks(_add_one, 1, base)
    torch.testing.assert_close(plus_one, base + 1)
    assert base[0, 0] == 0


def test_calls_share_no_state(ranks):
    for groups_before in (0, 3):
        assert all(torch.equal(y, torch.full((2,), 8.0)) for y in ranks(_meshes, 4, groups_before))


def test_one_set_of_ranks_runs_many_functions():
    with pool.Ranks(4) as ranks:
        # Equal meshes, both with process groups that are alive.
        for groups_before in (0, 3):
            assert all(torch.equal(y, torch.full((2,), 8.0)) for y in ranks(_meshes, groups_before))
        first, again = ranks(_pid_and_random), ranks(_pid_and_random)
        assert first == again
        assert len({random for _, random in first}) == 1
        with pytest.raises(RankError, match="failed on rank 2"):
            ranks(_raise_while_others_wait, 2)
        assert {pid for pid, _ in ranks(_pid_and_random)}.isdisjoint(pid for pid, _ in first)


def test_an_exception_surfaces_and_the_next_call_works(ranks):
    with pytest.raises(RankError, match=r"failed on rank 1\b(.|\n)*in _raise_on(.|\n)*planted on 1") as caught:
        ranks(_raise_on, 3, [1])
    assert list(caught.value.failures) == [1]
    assert ranks(_raise_on, 3, []) == [0, 1, 2]


def test_every_distinct_traceback_is_shown(ranks):
    with pytest.raises(RankError) as caught:
        ranks(_raise_on, 3, [0, 2])
    assert set(caught.value.failures) == {0, 2}
    assert "planted on 0" in str(caught.value)
    assert "planted on 2" in str(caught.value)


def test_ranks_in_a_collective_with_a_failed_one_do_not_hang(ranks):
    start = time.monotonic()
    with pytest.raises(RankError, match="planted") as caught:
        ranks(_raise_while_others_wait, 4, 2)
    assert next(iter(caught.value.failures)) == 2
    assert time.monotonic() - start < pool.TIMEOUT_S / 4


def test_a_rank_that_never_ends_is_killed_and_says_where_it_was(ranks, monkeypatch):
    monkeypatch.setattr(pool, "GRACE_S", 3.0)
    with pytest.raises(RankError, match="planted(.|\n)*still running 3 s after(.|\n)*in _sleep_while_other"):
        ranks(_sleep_while_other_raises, 2)


def test_the_time_limit_ends_a_call(ranks, monkeypatch):
    monkeypatch.setattr(pool, "TIMEOUT_S", 6.0)
    with pytest.raises(RankError, match="still running after 6 s(.|\n)*in sleep_long"):
        ranks(sleep_long, 2)


def sleep_long():
    time.sleep(3600)


def test_a_dead_rank_is_reported(ranks):
    with pytest.raises(RankError, match="exit code 7") as caught:
        ranks(_die, 2, 1)
    assert 1 in caught.value.failures
    assert len(ranks(_rank_and_sum, 2, 1)) == 2


def test_a_result_that_cannot_travel_is_an_error(ranks):
    with pytest.raises(RankError, match="_return_lambda"):
        ranks(_return_lambda, 1)


def test_what_cannot_be_run_is_refused(ranks):
    with pytest.raises(ValueError, match="module-level"):
        ranks(lambda: None, 1)
    with pytest.raises(ValueError, match=r"1\.\.8"):
        ranks(_add_one, 9)
