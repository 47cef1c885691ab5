"""The pool of large results: it is used again, has a limit, can be off, and outlives nothing that it lent."""

import gc
import threading

import pytest
import torch

from moesaic.ops import grouped_mm, pool
from tests.ops.cpu_isa import needs_kernels

pytestmark = needs_kernels

MB = 1 << 20


@pytest.fixture(autouse=True)
def drained():
    """Nothing idle from before, and nothing lent after."""
    gc.collect()
    pool.kernels().library.moesaic_pool_limit(0)
    pool.limit.cache_clear()
    before = pool.state().lent
    yield
    pool.limit.cache_clear()
    assert pool.state().lent == before


def lent() -> int:
    return pool.state().lent


def test_memory_is_used_again():
    before = lent()
    a = pool.empty((5 * MB,), torch.bfloat16)
    assert lent() - before == 10 * MB
    address = a.data_ptr()
    assert address % (2 * MB) == 0
    del a
    assert pool.state().idle == 10 * MB
    b = pool.empty((5, MB // 2 - 1, 1), torch.float32)
    assert b.data_ptr() == address
    assert (b.shape, b.stride(), b.dtype) == ((5, MB // 2 - 1, 1), (MB // 2 - 1, 1, 1), torch.float32)
    assert b.is_contiguous()
    b.fill_(7)
    assert b.sum() == 7 * b.numel()


def test_small_results_and_other_dtypes_are_torchs():
    before = pool.state()
    pool.empty((pool.SMALLEST // 4 - 1,), torch.float32)
    pool.empty((2 * MB,), torch.float64)
    assert pool.state() == before


def test_much_larger_memory_is_kept_for_larger_results():
    a = pool.empty((10 * MB,), torch.float32)
    address = a.data_ptr()
    del a
    small = pool.empty((2 * MB,), torch.float32)
    assert small.data_ptr() != address
    assert pool.empty((9 * MB,), torch.float32).data_ptr() == address


def test_limit(monkeypatch):
    monkeypatch.setenv("MOESAIC_CPU_POOL_MB", "16")
    pool.limit.cache_clear()
    tensors = [pool.empty((2 * MB,), torch.float32) for _ in range(3)]
    assert pool.state()[1:] == (0, 16 * MB)
    del tensors
    assert pool.state().idle == 16 * MB


def test_off(monkeypatch):
    monkeypatch.setenv("MOESAIC_CPU_POOL_MB", "0")
    pool.limit.cache_clear()
    before = lent()
    kept = pool.empty((2 * MB,), torch.float32)
    assert lent() == before
    assert pool.state().limit == 0
    del kept


@pytest.mark.parametrize("bad", ["-1", "1.5", "many", ""])
def test_bad_limit(bad, monkeypatch):
    monkeypatch.setenv("MOESAIC_CPU_POOL_MB", bad)
    pool.limit.cache_clear()
    with pytest.raises(ValueError, match=f"MOESAIC_CPU_POOL_MB: got '{bad}'; give a number of megabytes"):
        pool.empty((2 * MB,), torch.float32)


def test_tensors_die_on_any_thread():
    tensors = [pool.empty((2 * MB,), torch.float32) for _ in range(3)]
    before = lent()
    thread = threading.Thread(target=tensors.clear)
    thread.start()
    thread.join()
    assert before - lent() == 24 * MB


def test_views_keep_the_memory():
    before = lent()
    view = pool.empty((2 * MB,), torch.float32)[5:9]
    assert lent() - before == 8 * MB
    del view
    assert lent() == before


def test_gradients_are_handed_over_without_a_copy():
    w = torch.ones(2, 1024, 1024).requires_grad_()
    x = torch.ones(4, 1024)
    before = lent()
    grouped_mm(x, w, torch.tensor([1, 3]), impl="cpu").sum().backward()
    assert lent() - before == 8 * MB
    assert torch.equal(w.grad[:, 0, 0], torch.tensor([1.0, 3.0]))
    w.grad = None
    assert lent() == before


def test_uninitialised_memory_is_filled_on_demand():
    # As torch does, so that a result that depends on it is seen.
    torch.use_deterministic_algorithms(True)
    try:
        assert pool.empty((2 * MB,), torch.float32).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)
