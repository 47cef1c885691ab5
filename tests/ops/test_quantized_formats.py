"""The formats of quantised weights: bytes as others write them, and numbers as near as the format has them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.ops.quantized import FORMATS, QuantizedWeight, quantize
from moesaic.ops.quantized.formats import E2M1, NF4


def matrix(*rows: list[float]) -> torch.Tensor:
    """One expert, from its outputs."""
    return torch.tensor([rows]).mT


def test_int8_has_a_scale_for_each_output():
    w = quantize(matrix([1.0, -2.0, 0.49, 0.0], [0.0, 0.0, 0.0, 0.0], [127.0, 63.5, -1.5, 0.5]), "int8")
    assert w.data.tolist() == [[[64, -127, 31, 0], [0, 0, 0, 0], [127, 64, -2, 0]]]  # to nearest, half to even
    torch.testing.assert_close(w.scales, torch.tensor([[2 / 127, 0.0, 1.0]]))


def test_nf4_has_the_first_code_in_the_high_half():
    codes = [15, 0, 7, 8, 3, 12] + [7] * 58
    w = quantize(matrix([2.0 * NF4[code] for code in codes]), "nf4")
    assert w.data[0, 0, 0, :4].tolist() == [0xF0, 0x78, 0x3C, 0x77]
    assert w.scales.tolist() == [[[2.0]]]
    assert w[0].flatten().tolist() == [2 * torch.tensor(NF4[code]).item() for code in codes]


def test_mxfp4_has_the_first_code_in_the_low_half():
    # The largest number is 6 * 2 ** -3; 0.75 and 5 lie between two numbers, and go to the even code; 7.5 is beyond 6.
    values = [6.0, -0.5, 0.75, 1.5, -2.5, 5.0, 7.5, -0.0] + [0.0] * 24
    w = quantize(matrix([value / 8 for value in values]), "mxfp4")
    assert w.data[0, 0, 0, :4].tolist() == [0x97, 0x32, 0x6C, 0x87]
    assert w.scales.tolist() == [[[127 - 3]]]
    assert w[0].flatten()[:8].mul(8).tolist() == [6.0, -0.5, 1.0, 1.5, -2.0, 4.0, 6.0, -0.0]


def test_mxfp4_is_what_transformers_reads():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 5, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 5, 4), generator=generator, dtype=torch.uint8)
    ours = QuantizedWeight(blocks, scales, "mxfp4").dequantize()
    assert torch.equal(ours, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))


def test_scales_of_mxfp4_at_the_ends():
    data = torch.full((1, 1, 3, 16), 0x22, dtype=torch.uint8)  # ones
    w = QuantizedWeight(data, torch.tensor([[[0, 254, 255]]], dtype=torch.uint8), "mxfp4")
    assert w[0].flatten()[::32].tolist()[:2] == [2.0**-127, 2.0**127]
    assert w[0].flatten()[64:].isnan().all()
    tiny = quantize(torch.full((1, 32, 1), 2.0**-140), "mxfp4")
    assert tiny.dequantize().eq(0).all()
    large = quantize(torch.full((1, 32, 1), torch.finfo(torch.float32).max), "mxfp4")
    assert large.dequantize().isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
@given(seed=st.integers(0, 2**31), inputs=st.sampled_from((32, 64, 128)), scale=st.sampled_from((1e-20, 0.1, 1e20)))
def test_the_nearest_number(format, seed, inputs, scale):
    w = torch.randn(2, inputs, 3, generator=torch.Generator().manual_seed(seed)) * scale
    w[:, :, 1] = 0
    q = quantize(w, format)
    again = q.dequantize()
    assert again[:, :, 1].eq(0).all()
    codes = {"int8": torch.arange(-127.0, 128), "nf4": torch.tensor(NF4), "mxfp4": torch.tensor(E2M1)}[format]
    scales = q.scales.view(torch.float8_e8m0fnu).float() if format == "mxfp4" else q.scales
    block = FORMATS[format].block or inputs
    if block > inputs:
        return  # blocks that run over the ends of rows: below
    wide = scales.double().view(2, 3, -1).repeat_interleave(block, 2)[:, :, :inputs].mT
    allowed = (codes.double()[:, None, None, None] * wide - w.double()).abs().amin(0)
    error = (again.double() - w.double()).abs()
    assert (error <= allowed + 1e-5 * wide).all()  # a product of fp32 is rounded


@pytest.mark.parametrize(("inputs", "outputs"), [(48, 20), (5, 7), (96, 10), (1, 64)])
def test_nf4_blocks_run_over_the_ends_of_rows(inputs, outputs):
    w = torch.randn(2, inputs, outputs)
    q = quantize(w, "nf4")
    assert q.data.shape == (2, -(-inputs * outputs // 64), 32)
    # The same as a matrix of one row, filled up with zeros.
    flat = torch.nn.functional.pad(w.mT.flatten(1), (0, -inputs * outputs % 64))
    one = quantize(flat.unsqueeze(2), "nf4")
    assert torch.equal(q.data.flatten(), one.data.flatten())
    assert torch.equal(q.scales.flatten(), one.scales.flatten())
    assert torch.equal(q.dequantize().mT.flatten(1), one.dequantize().flatten(1)[:, : inputs * outputs])


@pytest.mark.parametrize(("format", "bits"), [("int8", 8 + 32 / 128), ("nf4", 4.5), ("mxfp4", 4.25)])
def test_bytes(format, bits):
    assert quantize(torch.randn(2, 128, 6), format).nbytes == 2 * 128 * 6 * bits / 8


def test_empty():
    for format in FORMATS:
        for shape in ((0, 64, 3), (2, 0, 3), (2, 64, 0)):
            assert quantize(torch.randn(shape), format).dequantize().shape == shape


def test_on_the_meta_device():
    w = quantize(torch.empty(2, 64, 3, device="meta"), "nf4")
    assert w.data.is_meta
    assert w.shape == (2, 64, 3)


data, scales = torch.zeros(2, 3, 2, 32, dtype=torch.uint8), torch.zeros(2, 3, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((data.int(), scales, "nf4"), TypeError, "data: nf4 has torch.uint8, got torch.int32"),
        ((data, scales.half(), "nf4"), TypeError, "scales: nf4 has torch.float32, got torch.float16"),
        ((data, scales.clone().requires_grad_(), "nf4"), TypeError, "frozen; give scales.detach"),
        ((data, scales[:, :2], "nf4"), ValueError, r"scales: expected \[2, 3, 2\]"),
        ((data[..., :16], scales, "nf4"), ValueError, r"data: expected \[2, 3, 2, 32\]"),
        ((data[0], scales[0], "nf4"), ValueError, r"do not tell I and O of a matrix; give \(I, O\)"),
        ((data, scales, "nf4", (128, 3)), ValueError, "tell I and O of a matrix; give None"),
        ((data[0, 0], scales[0, 0], "nf4"), ValueError, "3 or 4 dims for E matrices"),
    ],
)
def test_what_a_weight_refuses(arguments, error, match):
    with pytest.raises(error, match=match):
        QuantizedWeight(*arguments)


def test_what_quantize_refuses():
    with pytest.raises(ValueError, match="mxfp4 has blocks of 32 along the summed dim, which is 48 here; use 'int8'"):
        quantize(torch.randn(2, 48, 32), "mxfp4")
    with pytest.raises(ValueError, match="w: matrix 1 has numbers that are not finite"):
        quantize(torch.tensor([[[1.0]], [[torch.nan]]]), "int8")
    with pytest.raises(ValueError, match=r"w: expected \[E, I, O\], got \[2, 3\]"):
        quantize(torch.randn(2, 3), "int8")
    with pytest.raises(TypeError, match="w: dtype torch.int8"):
        quantize(torch.zeros(2, 3, 4, dtype=torch.int8), "int8")
