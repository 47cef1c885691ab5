"""Layers whose experts are quantised: what they compute, hold and save."""

import copy

import pytest
import torch

import moesaic
from moesaic.layers import init_weights_, quantize_
from moesaic.ops import quantize
from moesaic.ops.quantized import FORMATS


def layer(dim: int = 64, hidden_dim: int = 128, **options) -> moesaic.MoE:
    torch.manual_seed(0)
    return moesaic.MoE(moesaic.MoEConfig(dim=dim, hidden_dim=hidden_dim, num_experts=4, top_k=2, **options))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("options", [{}, {"gated": False}, {"expert_biases": True, "shared_hidden_dim": 8}])
def test_a_layer_computes_with_the_decoded_weights(format, options):
    moe = layer(**options)
    quantized = quantize_(copy.deepcopy(moe), format)
    for name in ("w1", "w3", "w2"):
        if (w := getattr(moe.experts, name)) is not None:
            w.data.copy_(quantize(w, format).dequantize())
    x = torch.randn(3, 5, 64)
    results = []
    for m in (moe, quantized):
        leaf = x.clone().requires_grad_()
        m(leaf).square().sum().backward()
        results.append({"x": leaf.grad} | {name: p.grad for name, p in m.named_parameters()})
    ours = results[1]
    assert ours.keys() == {name for name in results[0] if not name.startswith("experts.w")}
    for name, t in ours.items():
        torch.testing.assert_close(t, results[0][name], rtol=1e-4, atol=1e-6)


def test_state_and_bytes():
    moe = layer()
    before = sum(p.numel() * 2 for p in moe.experts.parameters())  # in bf16
    quantized = quantize_(copy.deepcopy(moe).bfloat16(), "nf4")
    names = {f"experts.{w}.{part}" for w in ("w1", "w3", "w2") for part in ("data", "scales")}
    assert {name for name in quantized.state_dict() if name.startswith("experts.")} == names
    assert list(quantized.experts.parameters()) == []
    assert sum(b.nbytes for b in quantized.experts.buffers()) <= 0.30 * before
    other = quantize_(layer(), "nf4")
    other.load_state_dict(quantized.float().state_dict())
    x = torch.randn(5, 64)
    assert torch.equal(other(x), quantized(x))
    on_meta = copy.deepcopy(other).to("meta")
    assert on_meta.experts.w1.data.is_meta


def test_a_model_in_another_dtype_keeps_its_scales():
    moe = quantize_(layer(), "int8")
    scales = moe.experts.w1.scales
    moe.bfloat16()
    assert torch.equal(moe.experts.w1.scales, scales)
    assert moe(torch.randn(3, 64).bfloat16()).dtype == torch.bfloat16
    assert "int8, [4, 64, 128]" in repr(moe)


def test_nothing_quantised_gets_initial_values():
    with pytest.raises(ValueError, match="quantised weights have no initial values; quantise a model that has its"):
        init_weights_(quantize_(layer(), "nf4"))


@pytest.mark.usefixtures("unchecked")
def test_what_is_refused():
    moe = layer(dim=48)
    with pytest.raises(ValueError, match=r"'experts.w1': mxfp4 has blocks of 32 along the summed dim, which is 48"):
        quantize_(moe, "mxfp4")
    assert isinstance(moe.experts.w1, torch.nn.Parameter)
    with pytest.raises(ValueError, match="format: unknown format 'fp8'; choose one of int8, nf4, mxfp4"):
        quantize_(moe, "fp8")
    with pytest.raises(ValueError, match="model: Linear has no moesaic.GroupedExperts to quantise"):
        quantize_(torch.nn.Linear(2, 2), "int8")
    with pytest.raises(ValueError, match=r"'experts.w1' is quantised already, to int8"):
        quantize_(quantize_(moe, "int8"), "nf4")
    trained = layer()
    trained.experts.main_grads = (torch.zeros(1),) * 3
    with pytest.raises(ValueError, match="has main_grads, and quantised weights have no gradients"):
        quantize_(trained, "nf4")
    broken = layer()
    broken.experts.w2.data[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"'experts.w2': w: matrix 1 has numbers that are not finite"):
        quantize_(broken, "nf4")
