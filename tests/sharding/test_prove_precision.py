"""Rounding is no excuse: what is off by a small term is found in every dtype."""

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Partial

import moesaic
from moesaic.sharding.proof.examples import Example
from moesaic.sharding.proof.precision import precise
from tests.sharding import planted
from tests.sharding.planted import ONE, S1, TWO, P, R, define, random, ruled

pytestmark = pytest.mark.usefixtures("unchecked")  # several times as fast

x, w, term = random(13, 12), random(12, 14), random(13)
HALVES = [torch.bfloat16, torch.float16]


def only(dtype: torch.dtype, function):
    """The function, of one dtype alone."""

    def strict(*tensors: Tensor) -> Tensor:
        torch._check(all(t.dtype == dtype for t in tensors), lambda: f"{dtype} only")
        return function(*tensors)

    return strict


def with_term(x: Tensor, term: Tensor) -> Tensor:
    return x.sum(1) + term


def rounded(x: Tensor, term: Tensor) -> Tensor:
    return with_term(x, term).bfloat16()


@pytest.mark.parametrize("scale", [1, 0.02])
@pytest.mark.parametrize(
    ("dtype", "function"),
    [*((d, only(d, with_term)) for d in HALVES), (torch.float32, rounded)],
    ids=["bfloat16", "float16", "rounded"],
)
def test_a_small_term_of_a_half_type(dtype, function, scale):
    inputs = [x.to(dtype), (scale * term).to(dtype)]
    options = {"axes": (2,), "meshes": [], "backward": False}
    report = moesaic.prove(ruled(TWO, function, "m k, +m -> m", linear=["x"]), *inputs, **options)
    assert report.ok, f"{report}"
    assert report.complete, f"{report}"
    report = moesaic.prove(ruled(TWO, function, "m k, m -> m", linear=["x"]), *inputs, **options)
    assert {(r.inputs, r.outputs) for r in report.wrong} == {(((p,), (R,)), ((P,),)) for p in (S1, P)}, f"{report}"


def test_gradients_of_a_half_type():
    op = ruled(TWO, only(torch.bfloat16, planted.matmul), "m k, k n -> m n", linear=["x", "w"])

    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w.mT, x.mT @ grad

    op.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    report = moesaic.prove(op, x.bfloat16(), w.bfloat16(), axes=(2,), meshes=[])
    assert report.ok, f"{report}"
    note = "the operator does not take float32: compared on small whole numbers, drawn in place of the given values"
    assert report.notes == [note]


def test_the_widest_dtype_that_is_taken():
    for function, dtype, note in (
        (planted.relu, torch.float64, ""),
        (only(torch.float32, planted.relu), torch.float32, "the operator does not take float64: compared in float32"),
    ):
        example, said = precise(Example(define(ONE, function)._opoverload, (x.bfloat16().to(dtype),)))
        assert (example.tensors[0].dtype, said, example.whole) == (dtype, note, False)
        assert torch.equal(example.tensors[0], x.bfloat16().to(dtype))


def test_whole_numbers_are_small_and_never_zero_nor_all_the_same():
    op = define(ONE, only(torch.bfloat16, planted.relu))._opoverload
    for shape in ((2,), (13, 12), (1,), (0, 3), ()):
        example, _ = precise(Example(op, (torch.ones(shape).bfloat16(),)))
        (numbers,) = example.tensors
        assert (numbers.shape, numbers.dtype, example.whole) == (shape, torch.bfloat16, True)
        assert bool(((numbers == numbers.round()) & (numbers != 0) & (numbers.abs() <= 3)).all())
        assert numbers.numel() < 2 or numbers.unique().numel() > 1


def test_values_that_the_operator_needs_are_kept():
    op = ruled(ONE, only(torch.bfloat16, torch.log), "m n -> m n", preserves={"max": ["x"], "min": ["x"]})
    report = moesaic.prove(op, x.abs().bfloat16(), axes=(2,), meshes=[], backward=False)
    assert [n for n in report.notes if "its results for whole numbers are not finite: compared with the tolerance" in n]
    assert not [r for r in report.wrong if not isinstance(r.inputs[0][0], Partial)], f"{report}"


def test_the_report_says_what_was_exact():
    options = {"axes": (2, 3), "meshes": [], "backward": False}
    report = moesaic.prove(ruled(TWO, planted.matmul, "m k, k n -> m n", linear=["x", "w"]), x, w, **options)
    (found,) = report.certainty
    assert found.line == "m k, k n -> m n"
    assert found.exact[0] == "[13, 12], [12, 14] float32"
    assert {"[5, 5], [5, 5] float32", "[33, 33], [33, 33] float32"} < set(found.exact)
    assert found.num_sampled + found.num_exact == report.num_cases
    assert found.num_sampled < found.num_exact / 2, "most sizes are held against one process exactly"
    assert found.num_shapes == 3
    assert dict(found.sizes)["m"] == (1, 2, 3, 5, 8, 12, 13, 17, 33, 65, 129, 257)
    text = f"exact in {found.num_exact} cases: [13, 12], [12, 14] float32; "
    assert text in str(report)
    assert "    sizes: m 1, 2, 3, 5, " in str(report)
    report = moesaic.prove(ruled(ONE, torch.exp, "m n -> m n"), x, **options)
    assert "exact in no case" in str(report)
    report = moesaic.prove(ruled(ONE, torch.clone, "m n -> m n"), torch.arange(156).view(13, 12), **options)
    assert report.certainty[0].num_sampled == 0
    assert report.certainty[0].num_exact == report.num_cases
