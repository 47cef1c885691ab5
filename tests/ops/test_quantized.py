"""grouped_mm and experts_mlp with quantised weights: by the error rule, against fp64 of the decoded weights."""

import pytest
import torch
from hypothesis import given

from moesaic.ops import experts_mlp, grouped_mm
from moesaic.ops.quantized import FORMATS, quantize
from tests.ops.experts_oracle import check, experts
from tests.ops.oracle import assert_accurate
from tests.ops.quantized_problems import any_to_quantize, quantized, run

DTYPES = (torch.float32, torch.bfloat16)
ops = torch.ops.moesaic


@pytest.mark.parametrize("impl", ["reference", "torch", None])
@given(call=any_to_quantize((*DTYPES, torch.float16)))
def test_experts_values_and_gradients(impl, call):
    q = quantized(*call)
    check(q.rounded, run(impl, q), q.exact)


@pytest.mark.parametrize("impl", ["reference", "torch", None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "inputs"), [("int8", 70), ("nf4", 128), ("nf4", 70), ("mxfp4", 96)])
def test_products_and_their_gradients(impl, dtype, format, inputs):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(24, n, generator=generator).to(dtype) for n in (inputs, 12))
    for num_matrices, sizes in ((4, [3, 0, 9, 5]), (6, [[1, 0, 9], [4, 2, 6]]), (3, [[1, 0, 9], [4, 2, 6]])):
        w = quantize(torch.randn(num_matrices, inputs, 12, generator=generator), format)
        sizes = torch.tensor(sizes)
        leaf = x.clone().requires_grad_()
        y = grouped_mm(leaf, w, sizes, impl=impl)
        (gx,) = torch.autograd.grad(y, leaf, grad)
        exact, rounded = w.dequantize().double(), w.dequantize().to(dtype).double()
        acc = torch.float32
        for name, ours, rows, matrices in (("y", y, x, lambda t: t), ("gx", gx, grad, lambda t: t.mT)):
            truth = grouped_mm(rows.double(), matrices(exact), sizes, impl="reference")
            naive = grouped_mm(rows.to(acc), matrices(rounded).to(acc), sizes, impl="reference").to(dtype)
            sums = grouped_mm(rows.double().abs(), matrices(exact).abs(), sizes, impl="reference")
            assert_accurate(ours.detach(), naive, truth, sums, name=name)
        assert torch.equal(grouped_mm(grad, w.mT, sizes, impl=impl), gx)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "inputs"), [("int8", 2115), ("nf4", 4096 + 64), ("mxfp4", 2048 + 32)])
def test_few_rows_meet_long_outputs(dtype, format, inputs):
    # The kernels of few rows go over the summed dim in pieces, of which the last is not whole.
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(10, inputs, generator=generator).to(dtype), torch.randn(4, inputs, 70, generator=generator)
    w, sizes = quantize(w, format), torch.tensor([1, 2, 3, 4])
    exact, rounded = w.dequantize().double(), w.dequantize().to(dtype).float()
    truth = grouped_mm(x.double(), exact, sizes, impl="reference")
    naive = grouped_mm(x.float(), rounded, sizes, impl="reference").to(dtype)
    sums = grouped_mm(x.double().abs(), exact.abs(), sizes, impl="reference")
    assert_accurate(grouped_mm(x, w, sizes), naive, truth, sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7])
def test_scales_at_the_ends_of_their_range(dtype, rows):
    w = quantize(torch.eye(160)[None], "mxfp4")
    w.scales[0, :, 1:4] = torch.tensor([0, 255, 254], dtype=torch.uint8)
    w.scales[0, 100:] = 127
    y = grouped_mm(torch.full((rows, 160), 2.0**60, dtype=dtype), w, torch.tensor([rows]))
    numbers = w.dequantize()[0]
    assert torch.equal(y.isnan(), numbers.isnan().any(0).expand(rows, -1))
    torch.testing.assert_close(y[:, 100:].float(), (numbers[:, 100:].sum(0) * 2.0**60).expand(rows, -1), rtol=0, atol=0)


def test_second_derivatives_of_a_product():
    w, sizes = quantize(torch.randn(3, 7, 5), "nf4"), torch.tensor([2, 0, 3])
    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: grouped_mm(t, w, sizes), (x,))
    assert torch.autograd.gradgradcheck(lambda t: grouped_mm(t, w, sizes), (x,))


def test_wide_results_and_autocast():
    w, sizes = quantize(torch.randn(2, 32, 5), "mxfp4"), torch.tensor([2, 3])
    x = torch.randn(5, 32)
    wide = grouped_mm(x.bfloat16(), w, sizes, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(grouped_mm(x, w, sizes), grouped_mm(x.bfloat16(), w, sizes))
        z = experts_mlp(x, IDS.expand(5, 1), torch.ones(5, 1), *[quantize(torch.randn(1, 32, 32), "int8")] * 3)
    assert z.dtype == torch.bfloat16


@pytest.mark.parametrize("format", FORMATS)
def test_blocks_are_problems_of_their_own(format):
    q = quantized(experts(8, 2, 5, 64, 64, torch.float32, biased=True), format)
    p, w = q.rounded, q.weights
    ids = torch.randint(-1, 4, (2, 4, 2), generator=torch.Generator().manual_seed(1))
    ids = ids.masked_fill(ids > 1, -1)
    x, weights = p.x.view(2, 4, 64), p.weights.view(2, 4, 2)
    ours = experts_mlp(x, ids, weights, w["w1"], w["w3"], w["w2"], b1=p.b1, b3=p.b3, b2=p.b2, impl="torch")
    theirs = experts_mlp(x, ids, weights, p.w1, p.w3, p.w2, b1=p.b1, b3=p.b3, b2=p.b2, impl="torch")
    torch.testing.assert_close(ours, theirs)


def test_opcheck():
    q = quantized(experts(5, 2, 3, 64, 64, torch.float32, biased=True), "nf4")
    p, parts = q.rounded, [t for w in q.weights.values() for t in (w.data, w.scales)]
    x, weights = p.x[None].requires_grad_(), p.weights[None].requires_grad_()
    operands = (x, p.ids[None], weights, torch.empty(1, 3), *parts, p.b1, p.b3, p.b2, "nf4", 64, "silu", "torch")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.quantized_experts_mlp.default, operands, test_utils=tests)
    flat = quantize(torch.randn(3, 20, 7), "nf4")
    rows = torch.randn(5, 20, requires_grad=True)
    call = (rows, flat.data, flat.scales, torch.tensor([2, 0, 2]), "nf4", 7, "torch")
    torch.library.opcheck(ops.quantized_mm.default, call, test_utils=tests)


W = quantize(torch.randn(2, 64, 64), "nf4")
X, IDS, ONES = torch.randn(3, 64), torch.zeros(1, 1, dtype=torch.int64), torch.ones(3, 1)


@pytest.mark.parametrize(
    ("weights", "options", "error", "match"),
    [
        ((W, torch.randn(2, 64, 64), W), {}, TypeError, "w3: w1, w2 are quantised, and this is not"),
        (
            (W, None, quantize(torch.randn(2, 64, 64), "int8")),
            {},
            ValueError,
            "w1 is nf4, w2 is int8; quantise them to one",
        ),
        ((W, None, W.mT), {}, ValueError, "w2: is the .mT of a quantised weight"),
        ((W, W, W), {"main_grads": (None,) * 3}, TypeError, "main_grads: quantised weights are frozen"),
        ((W, W, W), {"impl": "triton"}, TypeError, '"triton" has no kernels for quantised weights; use "torch"'),
        ((W, W, quantize(torch.randn(2, 128, 64), "nf4")), {}, ValueError, r"w2: expected \[2, 64, 64\]"),
    ],
)
def test_what_experts_refuse(weights, options, error, match):
    with pytest.raises(error, match=match):
        experts_mlp(X, IDS.expand(3, 1), ONES, *weights, **options)


def test_what_products_refuse():
    with pytest.raises(ValueError, match=r"w: expected \[E, 32, N\] to match x"):
        grouped_mm(torch.randn(3, 32), W, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="w has 2 matrices|one size for each of the 2 matrices of w"):
        grouped_mm(X, W, torch.tensor([1, 2, 0]))
    with pytest.raises(ValueError, match="quantized_mm: w: expected .* to match the arguments before it"):
        ops.quantized_mm(X[:, :32], W.data, W.scales, torch.tensor([1, 2]), "nf4", 64, None)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_no_more_than_a_matrix_is_decoded_at_a_time(impl, monkeypatch):
    from moesaic.ops.quantized import weight

    most = 0

    def counted(format, data, *others):
        nonlocal most
        most = max(most, data.numel())
        return decode(format, data, *others)

    decode = weight.decode
    monkeypatch.setattr(weight, "decode", counted)
    q = quantized(experts(40, 2, 5, 64, 64, torch.float32), "nf4")
    run(impl, q)
    assert most == q.weights["w1"].data[0].numel()
