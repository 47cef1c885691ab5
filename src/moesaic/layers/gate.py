"""The gate of the router. It computes logits in a wide dtype, but keeps no copy of the tokens in that dtype.

Legend: T tokens, D model dim, E experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.ops.autocast import no_autocast
from moesaic.ops.invariant import batch_invariant_enabled, mm_in_tiles


def gate_logits(x_TD: Tensor, weight_ED: Tensor, dtype: torch.dtype) -> Tensor:
    """``x W^T [T, E]``, computed in ``dtype``. For the gradient it saves ``x`` and ``W`` in their own dtypes."""
    if x_TD.dtype == dtype and not batch_invariant_enabled():
        return F.linear(x_TD, weight_ED.to(dtype))
    return _Gate.apply(x_TD, weight_ED, dtype)


class _Gate(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    # pyrefly: ignore [bad-override]
    def forward(x_TD: Tensor, weight_ED: Tensor, dtype: torch.dtype) -> Tensor:
        x_TD, weight_ED = x_TD.to(dtype), weight_ED.to(dtype)
        if not batch_invariant_enabled():
            return F.linear(x_TD, weight_ED)
        logits_TE = x_TD.new_empty(len(x_TD), len(weight_ED))
        mm_in_tiles(x_TD, weight_ED.mT, logits_TE)
        return logits_TE

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x_TD, weight_ED, ctx.dtype = inputs
        ctx.save_for_backward(x_TD, weight_ED)

    @staticmethod
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TD, weight_ED = ctx.saved_tensors
        gx = gw = None
        with no_autocast(grad_TE.device.type):
            if ctx.needs_input_grad[0]:
                gx = (grad_TE @ weight_ED.to(ctx.dtype)).to(x_TD.dtype)
            if ctx.needs_input_grad[1]:
                gw = (grad_TE.mT @ x_TD.to(ctx.dtype)).to(weight_ED.dtype)
        return gx, gw, None
