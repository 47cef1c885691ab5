"""grouped_mm by the CPU kernels: values on every instruction set, determinism, threads, forks, special values."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.ops import grouped_mm, native
from moesaic.ops.grouped_mm.impl import cpu
from tests.ops.cpu_isa import each_isa, each_isa_and_dtype, needs_kernels, same_for_all_examples, use
from tests.ops.oracle import check, exact, run
from tests.ops.strategies import FORMS, STRIDES, layout, problem, problems

pytestmark = needs_kernels

DTYPES = (torch.float32, torch.bfloat16)
BF16 = torch.bfloat16

# Around the sizes at which the kernels change their ways: rows of a tile of vectors and of AMX, groups that are few
# rows, small or large; columns of a vector, a panel, several panels; words of a block of the summed dim, in both types.
ROWS = (0, 1, 2, 4, 5, 6, 7, 12, 13, 16, 17, 33, 191, 192, 193, 260)
COLUMNS = (1, 15, 16, 17, 31, 64, 65, 127, 200, 257, 513)
INNER = (1, 2, 7, 16, 95, 96, 97, 191, 192, 193, 289, 513, 1025)


@each_isa
@same_for_all_examples
@given(data=st.data())
def test_exact_values(isa, data, monkeypatch):
    use(monkeypatch, isa)
    p = data.draw(problems(exact=True).filter(lambda p: p.x.dtype in DTYPES))
    check(p, run("cpu", p))


def check_large(p):
    """As ``check`` does, with exact values, without an oracle that holds every product."""
    for ours, true in zip(run("cpu", p), run("reference", p), strict=True):
        assert torch.equal(ours, true)


@each_isa_and_dtype
@settings(same_for_all_examples, max_examples=25)
@given(data=st.data())
def test_exact_values_where_the_kernels_change(isa, dtype, data, monkeypatch):
    use(monkeypatch, isa)
    form = data.draw(st.sampled_from(FORMS))
    block = st.lists(st.sampled_from(ROWS), min_size=2, max_size=2)
    groups = layout(form, data.draw(st.lists(block, min_size=2, max_size=2)), slack=data.draw(st.integers(0, 2)))
    K, N = data.draw(st.sampled_from(INNER)), data.draw(st.sampled_from(COLUMNS))
    strides = data.draw(st.tuples(*[st.sampled_from(STRIDES)] * 3))
    check_large(problem(groups, K, N, dtype, strides=strides, seed=data.draw(st.integers(0, 99))))


@each_isa_and_dtype
@pytest.mark.parametrize("form", FORMS)
def test_accuracy_of_long_sums(isa, form, dtype, monkeypatch):
    use(monkeypatch, isa)
    p = problem(layout(form, [[300, 0, 257], [3, 400, 70]], slack=3), 1100, 20, dtype, exact=False)
    check(p, run("cpu", p), margin=1.5)


@each_isa
def test_a_thousand_experts(isa, monkeypatch):
    use(monkeypatch, isa)
    sizes = [[(7 * e) % 5 for e in range(1000)]]
    check_large(problem(layout("flat", sizes, slack=2), 40, 33, BF16))


@each_isa_and_dtype
@pytest.mark.parametrize("orientation", ["contiguous", "transposed"])
def test_few_rows_meet_long_rows_of_weights(isa, dtype, orientation, threads, monkeypatch):
    # Their tasks are pieces of up to 4,096 columns, and of fewer with more threads.
    use(monkeypatch, isa)
    p = problem(layout("flat", [[1, 0, 3, 6, 5]]), 75, 4300, dtype, strides=("contiguous", orientation, "contiguous"))
    for count in (1, 3):
        threads(count)
        check_large(p)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_longer_than_a_page_in_both_directions(dtype):
    p = problem(layout("flat", [[70, 3, 1]]), 2100, 1300, dtype, strides=("contiguous", "transposed", "contiguous"))
    check_large(p)


@each_isa_and_dtype
def test_same_bits_with_any_number_of_threads(isa, dtype, threads, monkeypatch):
    # Tasks are cut smaller where there are more threads, down to a panel and a few rows.
    use(monkeypatch, isa)
    for form in FORMS:
        for orientation in ("contiguous", "transposed"):
            sizes = [[500, 0, 190], [0, 90, 2]]
            p = problem(
                layout(form, sizes, slack=3), 700, 300, dtype, exact=False, strides=("contiguous", orientation) * 2
            )
            expected = None
            for count in (1, 2, 3, 16):
                threads(count)
                results = run("cpu", p)
                expected = expected or results
                for a, b in zip(expected, results, strict=True):
                    assert torch.equal(a, b), count


def test_calls_from_several_threads_that_use_several_threads(threads):
    p = problem(layout("shared", [[90, 0, 300], [30, 3, 3]], slack=1), 160, 80, torch.float32)
    truth = exact(p)

    def call(_):
        threads(2)
        return run("cpu", p)

    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(call, range(32)):
            for ours, true in zip(results, truth, strict=True):
                assert torch.equal(ours.double(), true)


def test_fork_after_use(threads):
    # OpenMP's threads do not come along into a forked process, where data-loader workers for one compute.
    threads(2)
    p = problem(layout("flat", [[90, 30]]), 64, 200, torch.float32)
    expected = run("cpu", p).y
    child = os.fork()
    if child == 0:
        y = cpu.forward(p.x, p.w, p.group_sizes[None], torch.float32)
        os._exit(0 if torch.equal(y, expected) else 1)
    killer = threading.Timer(60, os.kill, (child, 9))
    killer.start()
    _, status = os.waitpid(child, 0)
    killer.cancel()
    assert os.waitstatus_to_exitcode(status) == 0


@each_isa_and_dtype
@pytest.mark.parametrize("orientation", ["contiguous", "transposed"])
@pytest.mark.parametrize("rows", [3, 70])
def test_nan_and_inf_propagate_as_in_torch(isa, dtype, orientation, rows, monkeypatch):
    use(monkeypatch, isa)
    p = problem(layout("flat", [[rows, rows]]), 70, 90, dtype, strides=("contiguous", orientation, "contiguous"))
    p.x[1, 3], p.x[2, 5], p.x[rows, 69] = torch.nan, torch.inf, -torch.inf
    p.w[1, 7, 11], p.w[0, 69, 89], p.grad[0, 2] = torch.nan, torch.inf, -torch.inf
    for ours, theirs in zip(run("cpu", p), run("reference", p), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(0.0, 7.0, 9.0), theirs.nan_to_num(0.0, 7.0, 9.0))


@each_isa
@pytest.mark.parametrize("orientation", ["contiguous", "transposed"])
def test_rounding_to_bf16(isa, orientation, monkeypatch):
    # Ties go to even, and what is too large to infinity. In fp32 each sum is exact.
    use(monkeypatch, isa)
    largest = torch.finfo(BF16).max
    w = torch.tensor([[1, 1 + 2**-7, 1 + 2**-7, largest, -largest], [2**-8, 2**-8, 2**-9, 2.0**119, -(2.0**119)]])
    expected = w.sum(0).to(BF16)
    w = w.to(BF16)[None]
    w = w.mT.contiguous().mT if orientation == "transposed" else w
    y = grouped_mm(torch.ones(1, 2, dtype=BF16), w, torch.tensor([1]), impl="cpu")
    assert torch.equal(y[0], expected)
    assert expected.tolist() == [1, 1 + 2**-6, 1 + 2**-7, torch.inf, -torch.inf]


def test_what_it_refuses(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    sizes = torch.tensor([2])
    for dtype in (torch.float64, torch.float16):
        x, w = torch.ones(2, 3, dtype=dtype), torch.ones(1, 3, 4, dtype=dtype)
        with pytest.raises(TypeError, match=rf'impl: "cpu" has no kernels for {dtype}.*; use "torch" or None'):
            grouped_mm(x, w, sizes, impl="cpu")
    x, w = torch.ones(2, 3), torch.ones(1, 3, 4)
    monkeypatch.setattr(native, "kernels", lambda: "they were not built")
    with pytest.raises(RuntimeError, match='impl: "cpu" has no kernels here, they were not built; or use "torch"'):
        grouped_mm(x, w, sizes, impl="cpu")


def test_no_memory():
    # More columns than any machine has memory for, all in the same element.
    w = torch.ones(1, 1, 1).expand(1, 1, 2**50)
    with pytest.raises(RuntimeError, match="memory"):
        grouped_mm(torch.ones(1, 1), w, torch.tensor([1]), impl="cpu")
