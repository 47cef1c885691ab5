"""The experts' down bias on the (ep, etp) mesh: once, though every rank of etp has the rows that it is added to."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import local_map

from moesaic.layers import GroupedExperts
from moesaic.layers.experts import MainGrads
from moesaic.ops.experts_mlp.down_bias import down_bias
from moesaic.parallel.placements import PLACES


def add_down_bias_apart(experts: GroupedExperts, mesh: DeviceMesh) -> None:
    """Let experts that compute on DTensors add their down bias to the ``Partial`` result, by a local computation."""
    compute = experts.compute
    biases: Any = local_map(
        partial(_biases_of_rows, mesh=mesh),
        out_placements=(PLACES["z"],),
        in_placements=(PLACES["weights"], PLACES["ids"], PLACES["b2"]),
        in_grad_placements=(PLACES["grad_weights"], PLACES["ids"], PLACES["b2"]),
        device_mesh=mesh,
    )

    def with_bias(
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        w1: Tensor,
        w3: Tensor,
        w2: Tensor,
        b1: Tensor | None,
        b3: Tensor | None,
        b2: Tensor | None,
        *,
        main_grads: MainGrads | None = None,
    ) -> Tensor:
        z = compute(x, topk_ids, topk_weights, w1, w3, w2, b1, b3, None, main_grads=main_grads)
        return z if b2 is None else z + biases(topk_weights, topk_ids, b2)

    experts.compute = with_bias


def _biases_of_rows(weights_1CK: Tensor, ids_1CK: Tensor, b_eD: Tensor, mesh: DeviceMesh) -> Tensor:
    return down_bias(weights_1CK, ids_1CK, on_first_rank(b_eD, mesh), b_eD.shape[0])


def on_first_rank(b_eD: Tensor, mesh: DeviceMesh) -> Tensor:
    """The bias on etp rank 0, zeros on the others. The gradient passes: every rank has the whole one of the result."""
    return _OnFirstRank.apply(b_eD, mesh.get_local_rank("etp") == 0)


class _OnFirstRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, b: Tensor, is_first: bool) -> Tensor:
        return b.view_as(b) if is_first else torch.zeros_like(b)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
