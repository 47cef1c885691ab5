"""Arguments of another type than is expected: the operators and the layer name them, and say what to give."""

import numpy as np
import pytest
import torch

import moesaic
from moesaic import MoE, MoEConfig
from moesaic.compat import grouped_gemm
from moesaic.layers import GroupedExperts
from moesaic.ops import accumulate_weight_grad, combine, grouped_mm_weight_grad, permute, sort_by_expert

pytestmark = pytest.mark.usefixtures("unchecked")

x, w, w2 = torch.rand(4, 8), torch.rand(2, 8, 6), torch.rand(2, 6, 8)
ids, weights, sizes = torch.tensor([[0], [1], [1], [0]]), torch.rand(4, 1), torch.tensor([2, 2])
rows = sort_by_expert(ids, 2)
CONFIG = {"dim": 8, "hidden_dim": 6, "num_experts": 2, "top_k": 1}

NO_TENSORS = {
    "grouped_mm x": lambda: moesaic.grouped_mm(x.numpy(), w, sizes),
    "grouped_mm group_sizes": lambda: moesaic.grouped_mm(x, w, [2, 2]),
    "weight_grad grad": lambda: grouped_mm_weight_grad(x, x.tolist(), sizes),
    "weight_grad like": lambda: grouped_mm_weight_grad(x, x, sizes, like=w.numpy()),
    "accumulate into": lambda: accumulate_weight_grad(w.numpy(), x, x[:, :6], sizes),
    "experts_mlp topk_ids": lambda: moesaic.experts_mlp(x, ids.numpy(), weights, w, w, w2),
    "experts_mlp w3": lambda: moesaic.experts_mlp(x, ids, weights, w, w.numpy(), w2),
    "experts_mlp w2": lambda: moesaic.experts_mlp(x, ids, weights, w, w, None),
    "sort_by_expert ids": lambda: sort_by_expert(ids.tolist(), 2),
    "permute x": lambda: permute(x.numpy(), rows),
    "combine weights": lambda: combine(x, rows, weights.tolist()),
    "MoE x": lambda: MoE(MoEConfig(**CONFIG))(x.numpy()),
    "gmm batch_sizes": lambda: grouped_gemm.ops.gmm(x, w, [2, 2]),
    "gmm a": lambda: grouped_gemm.ops.gmm(x.numpy(), w, sizes),
}


@pytest.mark.parametrize("case", NO_TENSORS)
def test_what_is_no_tensor(case):
    with pytest.raises(TypeError, match=rf"^{case.split()[1]}: expected a torch.Tensor, got (ndarray|list|None)"):
        NO_TENSORS[case]()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.complex64])
def test_dtypes_of_rows(dtype):
    other = torch.zeros(4, 8, dtype=dtype)
    for name, call in {
        "x": lambda: permute(other, rows),
        "y": lambda: combine(other, rows),
        "weights": lambda: permute(x, rows, torch.zeros(4, 1, dtype=dtype)),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name}: dtype {dtype} is not supported; use one of"):
            call()
    with pytest.raises(TypeError, match=rf"^x: dtype {dtype} is not supported"):
        MoE(MoEConfig(**CONFIG))(other)


def test_permutations():
    with pytest.raises(TypeError, match="^permutation: expected the result of sort_by_expert, got list"):
        permute(x, list(rows))
    with pytest.raises(ValueError, match="^x: is on meta, the permutation on cpu; move it there"):
        permute(x.to("meta"), rows)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MoEConfig(**CONFIG | {"dim": 64.0}), "dim: expected an int, got 64.0 (float); give 64"),
        (lambda: MoEConfig(**CONFIG | {"top_k": "2"}), "top_k: expected an int, got '2' (str)"),
        (lambda: MoEConfig(**CONFIG | {"num_experts": True}), "num_experts: expected an int, got True (bool)"),
        (lambda: MoEConfig(**CONFIG | {"top_k": None}), "top_k: expected an int, got NoneType"),
        (lambda: MoEConfig(**CONFIG, z_loss_coef="0.1"), "z_loss_coef: expected a number, got '0.1' (str)"),
        (lambda: MoEConfig(**CONFIG, gated="no"), "gated: expected True or False, got 'no' (str)"),
        (
            lambda: MoEConfig(**CONFIG, score_biass=True),
            "score_biass: MoEConfig has no such field; did you mean score_b",
        ),
        (lambda: MoE(CONFIG), "config: expected a MoEConfig, got dict; MoEConfig(**config) makes one"),
        (lambda: GroupedExperts(2, 8.0, 6), "dim: expected an int, got 8.0 (float); give 8"),
        (lambda: sort_by_expert(ids, 2.5), "num_experts: expected an int, got 2.5 (float)"),
        (lambda: moesaic.build_meshes(tp="1"), "tp: expected an int, got '1' (str)"),
        (lambda: moesaic.build_meshes(ep=1.0), "ep: expected an int, got 1.0 (float); give 1"),
        (
            lambda: moesaic.parallelize(MoE(MoEConfig(**CONFIG)), None),
            "meshes: expected the result of moesaic.build_mesh",
        ),
        (lambda: moesaic.parallelize(None, moesaic.build_meshes()), "model: expected a torch.nn.Module, got NoneType"),
    ],
)
def test_other_types(call, message):
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value).startswith(message)


def test_numbers_that_are_no_sizes():
    for changes, message in {
        ("aux_loss_coef", float("nan")): "aux_loss_coef: must be at least 0, got nan",
        ("route_scale", float("inf")): "route_scale: must be finite, got inf",
    }.items():
        with pytest.raises(ValueError, match=message):
            MoEConfig(**CONFIG, **dict([changes]))
    with pytest.raises(ValueError, match="device_type: got 'gpu'; give 'cuda' or 'cpu'"):
        moesaic.build_meshes(device_type="gpu")
    with pytest.raises(ValueError, match="device_type: got 'cpu:0'; give .*without a number: 'cpu'"):
        moesaic.build_meshes(device_type="cpu:0")


def test_integers_of_numpy_are_integers():
    assert MoE(MoEConfig(**CONFIG | {"dim": np.int64(8)}))(x).shape == (4, 8)
