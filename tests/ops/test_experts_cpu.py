"""experts_mlp by the CPU kernels: every instruction set, their limits, determinism, threads, special values."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jaxtyping
import pytest
import torch
from hypothesis import given, settings

from moesaic.ops import ACTIVATIONS, experts_mlp, gated, implementations, native, pool
from moesaic.ops.experts_mlp.activation import GATED_ONLY
from moesaic.ops.experts_mlp.impl import cpu
from moesaic.ops.experts_mlp.impl import torch as torch_impl
from moesaic.ops.experts_mlp.implementations import module_for
from moesaic.ops.experts_mlp.problem import Problem, Projection
from moesaic.ops.processor import Processor
from tests.ops.cpu_isa import each_isa, each_isa_and_dtype, each_isa_in_fp32, needs_kernels, same_for_all_examples, use
from tests.ops.experts_oracle import any_experts, cast, check, experts, run

pytestmark = needs_kernels

DTYPES = (torch.float32, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@each_isa
@settings(same_for_all_examples, max_examples=60)
@given(p=any_experts(DTYPES))
def test_values_and_gradients(isa, p, monkeypatch):
    use(monkeypatch, isa)
    check(p, run("cpu", p))


# (T, K, E, D, F) at which the kernels change their ways: copies of one expert that are few, fill a tile, are small or
# large; several panels, tasks and blocks of the summed dim; and sizes that are none of these.
SIZES = (
    (1, 4, 6, 40, 600),
    (2, 2, 2, 40, 2100),
    (9, 4, 3, 130, 300),
    (100, 3, 2, 65, 257),
    (250, 4, 1, 40, 70),
    (12, 2, 2, 1100, 33),
    (30, 2, 2, 33, 1100),
)


@each_isa_and_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("strides", ["contiguous", "transposed"])
def test_where_the_kernels_change(isa, dtype, size, strides, monkeypatch):
    use(monkeypatch, isa)
    p = experts(*size, dtype, biased=True, strides=strides)
    check(p, run("cpu", p))


@each_isa_in_fp32
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_from_one_end_to_the_other(isa, activation, monkeypatch):
    # Products with 1 alone: what is left is the error of the activation, and of its derivative.
    use(monkeypatch, isa)
    p = experts(1, 1, 1, 1, 4001, torch.float32, gated=activation in GATED_ONLY, activation=activation)
    spread = torch.linspace(-30, 30, 4001)
    ends = torch.tensor([-1e4, -100.0, -90.0, -88.0, -1e-20, 0.0, 1e-20, 88.0, 90.0, 100.0, 1e4])
    w1 = torch.cat([spread, ends, torch.zeros(4001 - len(ends))])[:4001].view(1, 1, -1)
    w1[0, 0, : len(ends)] = ends
    one = torch.ones(1, 1)
    ids, w2 = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 4001, 1)
    w3 = None if p.w3 is None else torch.linspace(7.5, -7.5, 4001).view(1, 1, -1)
    p = replace(p, x=one, ids=ids, weights=one, w1=w1, w3=w3, w2=w2, grad=one)
    ours = run("cpu", p)
    (value, slope), (true_value, true_slope) = (
        by_torch(activation, w1.flatten().to(t), None if w3 is None else w3.flatten().to(t))
        for t in (torch.float32, torch.float64)
    )
    for name, t, theirs, truth in (("w2", "value", value, true_value), ("w1", "slope", slope, true_slope)):
        size = truth.abs().clamp(min=0.05)  # a slope passes through zero
        error, allowed = (((v.double() - truth) / size).abs().max() for v in (ours[name].flatten(), theirs))
        assert error <= 1.5 * max(allowed, torch.finfo(torch.float32).eps), t


def by_torch(activation, h1, h3):
    h1 = h1.requires_grad_()
    value = gated(activation, h1, h3)
    return value.detach(), torch.autograd.grad(value.sum(), h1)[0]


@each_dtype
@pytest.mark.parametrize("strides", ["contiguous", "transposed"])
@pytest.mark.parametrize("size", [(3, 2, 4, 70, 200), (400, 2, 2, 70, 130), (90, 4, 3, 64, 640)], ids=str)
def test_same_bits_at_any_number_of_threads(dtype, strides, size, threads):
    p = replace(experts(*size, dtype, biased=True, strides=strides), b2=None)  # b2 is torch's
    threads(1)
    alone = run("cpu", p)
    for number in (2, 3, 5):
        threads(number)
        assert all(torch.equal(t, alone[name]) for name, t in run("cpu", p).items()), number


def test_same_bits_where_a_thread_takes_several_tasks_at_a_time(threads):
    p = experts(300, 4, 1100, 8, 8, torch.float32)
    threads(1)
    alone = run("cpu", p)
    threads(16)
    assert all(torch.equal(t, alone[name]) for name, t in run("cpu", p).items())


@each_dtype
def test_strides_of_the_tokens(dtype):
    p = experts(20, 2, 3, 33, 40, dtype)
    expected = run("cpu", p)
    x, grad = p.x.mT.contiguous().mT, p.grad.new_full((40, 66), torch.nan)[::2, ::2]
    grad.copy_(p.grad)
    ids, weights = p.ids.to(torch.int32).mT.contiguous().mT, p.weights.mT.contiguous().mT
    strided = run("cpu", replace(p, x=x, grad=grad, ids=ids, weights=weights))
    assert all(torch.equal(t, expected[name]) for name, t in strided.items())


def test_concurrent_calls():
    problems = [experts(60 + i, 2, 3, 32, 48, torch.float32, seed=i) for i in range(8)]
    expected = [run("cpu", p) for p in problems]
    with ThreadPoolExecutor(4) as executor:
        for _ in range(3):
            for ours, alone in zip(executor.map(lambda p: run("cpu", p), problems), expected, strict=True):
                assert all(torch.equal(t, alone[name]) for name, t in ours.items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_after_threads(threads):
    threads(2)
    p = experts(60, 2, 3, 32, 48, torch.float32)
    operands = (p.x, p.ids, p.weights, p.w1, p.w3, p.w2)
    expected = experts_mlp(*operands, impl="cpu")
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(experts_mlp(*operands, impl="cpu"), expected) else 1)
    killer = threading.Timer(60, os.kill, (child, 9))
    killer.start()
    _, status = os.waitpid(child, 0)
    killer.cancel()
    assert os.waitstatus_to_exitcode(status) == 0


@each_isa_and_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [3, 60])
def test_nan_and_inf_propagate_as_in_torch(isa, dtype, activation, tokens, monkeypatch):
    use(monkeypatch, isa)
    p = experts(tokens, 1, 2, 20, 70, dtype, activation=activation)
    p = replace(p, ids=torch.arange(tokens)[:, None] % 2)
    p.x[0, 3], p.x[1, 5], p.w3[0, 7, 11], p.grad[2, 1] = torch.nan, torch.inf, -torch.inf, torch.inf
    # In fp32: where a CPU has AMX, torch's bf16 product spreads a NaN to the row before.
    theirs = run("torch", cast(p, torch.float32))
    for name, t in run("cpu", p).items():
        assert torch.equal(t.isfinite(), theirs[name].isfinite()), name


@each_dtype
def test_memory_comes_back_to_the_pool(dtype):

    p = experts(600, 4, 4, 512, 512, dtype)
    run("cpu", p)
    lent = pool.state().lent
    run("cpu", p)
    assert pool.state().lent == lent


def test_the_default_depends_on_the_rows_of_an_expert(monkeypatch):
    monkeypatch.setattr(implementations, "processor", lambda: Processor("Intel", True, "avx512_bf16", "avx512_bf16"))

    def fastest(dtype, tokens=2):
        p = experts(tokens, 1, 1, 3, 4, dtype)
        problem = Problem(p.x, p.ids, p.weights, (Projection(p.w1), Projection(p.w3)), Projection(p.w2), "silu")
        return module_for("experts_mlp", None, problem)

    assert fastest(torch.float32, 17) is fastest(torch.bfloat16, 16) is cpu
    assert fastest(torch.bfloat16, 17) is fastest(torch.float64) is torch_impl


def test_what_it_refuses(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for dtype in (torch.float64, torch.float16):
        p = experts(2, 1, 1, 3, 4, dtype)
        with pytest.raises(TypeError, match=rf'impl: "cpu" has no kernels for {dtype}; use "torch" or None'):
            run("cpu", p)
    monkeypatch.setattr(native, "kernels", lambda: "they were not built")
    with pytest.raises(RuntimeError, match='impl: "cpu" has no kernels here, they were not built; or use "torch"'):
        run("cpu", experts(2, 1, 1, 3, 4, torch.float32))
