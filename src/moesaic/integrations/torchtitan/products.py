"""torchtitan's expert modules with the products of :func:`moesaic.grouped_mm`.

Parameters, their names and their shardings are torchtitan's. Only ``forward`` differs, and it sees local tensors.
torchtitan rounds rows and weights to bf16. Here the weights keep the dtype that they have, which is FSDP's to choose,
and the rows take it on.

Legend: R routed rows, D model dim, F hidden dim, G = 2F, E experts of this rank.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts, swiglu

import moesaic
from moesaic.integrations.torchtitan.forms import local_part
from moesaic.integrations.torchtitan.hidden import HiddenAxis, check_halves, hidden_axis


class ProductExperts(GroupedExperts):
    """Experts of qwen3, deepseek_v3 and the like: ``(silu(x w1) * (x w3)) w2``."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        w1, w2, w3 = (local_part(w).mT for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD))
        rows, counts_E = x_RD.to(w1.dtype), _counts(num_tokens_per_expert_E)
        h_RF = F.silu(moesaic.grouped_mm(rows, w1, counts_E)) * moesaic.grouped_mm(rows, w3, counts_E)
        return moesaic.grouped_mm(h_RF, w2, counts_E).type_as(x_RD)


class GptOssProductExperts(GptOssGroupedExperts):
    """Experts of gpt_oss: gate and up are one matrix, and all products have biases."""

    @dataclass(kw_only=True, slots=True)
    class Config(GptOssGroupedExperts.Config):
        pass

    _hidden_axis: HiddenAxis | None = None

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        self._hidden_axis = hidden_axis(parallel_dims)
        check_halves(self.mlp1_weight_EGD, self._hidden_axis)
        super().parallelize(parallel_dims)

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        w1, w2 = local_part(self.mlp1_weight_EGD).mT, local_part(self.mlp2_weight_EDF).mT
        b1, b2 = local_part(self.mlp1_bias_EG), local_part(self.mlp2_bias_ED)
        if self._hidden_axis is not None:  # its ranks sum their results, and the bias counts once
            b2 = self._hidden_axis.counted_once(b2)
        rows, counts_E = x_RD.to(w1.dtype), _counts(num_tokens_per_expert_E)
        h_RG = moesaic.grouped_mm(rows, w1, counts_E) + _a_row_each(b1, counts_E, rows)
        h_RF = swiglu(h_RG, limit=self.swiglu_limit)
        return (moesaic.grouped_mm(h_RF, w2, counts_E) + _a_row_each(b2, counts_E, rows)).type_as(x_RD)


def _counts(num_tokens_per_expert_E: Tensor) -> Tensor:
    # torchtitan hands integers here, and floats where a dispatcher pads.
    return num_tokens_per_expert_E.to(torch.int64)


def _a_row_each(bias_EN: Tensor, counts_E: Tensor, rows: Tensor) -> Tensor:
    """The bias of every row's expert, and zero for rows past the last. Its gradient is summed in fp32, as a product."""
    return moesaic.grouped_mm(rows.new_ones(rows.shape[0], 1), bias_EN.unsqueeze(1).to(rows.dtype), counts_E)
