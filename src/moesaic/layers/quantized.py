"""Experts whose weights have 8 or 4 bits: read-only, for decoding or under adapters."""

from typing import TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moesaic.layers.experts import GroupedExperts
from moesaic.layers.packed import PackedWeight
from moesaic.ops.quantized import Format, quantize
from moesaic.ops.quantized.formats import check_format, data_shapes

Model = TypeVar("Model", bound=nn.Module)
_WEIGHTS = ("w1", "w3", "w2")


@torch.no_grad()
def quantize_(model: Model, format: Format) -> Model:
    """Quantise the weights of all :class:`moesaic.GroupedExperts` of a model, in place.

    Each of ``w1``, ``w3`` and ``w2`` becomes a module with the buffers ``data`` and ``scales``: ``experts.w1.data`` and
    ``experts.w1.scales`` in the state of the model. They have no gradient, no optimizer has them, and
    ``model.to(dtype)`` leaves them as they are. Biases, routers and everything else stay. Weights are quantised one
    after the other, and each is dropped when it is.

    Call it before :func:`moesaic.parallelize`, and before you make the optimizer. On an (ep, etp) mesh the buffers are
    cut as the weights would be: ep cuts experts, etp the outputs of w1 and w3 and whole blocks of w2. Ranks of edp
    have copies.

    Args:
        model: a model, a :class:`moesaic.MoE`, or experts. Weights on the meta device stay there, for a checkpoint of
            a quantised model to fill them.
        format: ``"int8"``, ``"nf4"`` or ``"mxfp4"``; see :func:`moesaic.ops.quantize`.

    Returns:
        ``model``.

    Raises:
        ValueError: an unknown format; the model has no experts; experts that are quantised already, are parallelized
            or have ``main_grads``; a size that the format does not have, or numbers that are not finite. The message
            names the weight.

    Example:
        >>> moe = moesaic.MoE(moesaic.MoEConfig(dim=64, hidden_dim=128, num_experts=8, top_k=2))
        >>> quantize_(moe, "nf4").experts.w1.data.shape
        torch.Size([8, 128, 1, 32])
    """
    check_format(format)
    found = {name: m for name, m in model.named_modules() if isinstance(m, GroupedExperts)}
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no moesaic.GroupedExperts to quantise")
    for name, experts in found.items():
        _check(name or type(experts).__name__, experts, format)
    for name, experts in found.items():
        for weight in _WEIGHTS:
            if (w := getattr(experts, weight)) is None:
                continue
            try:
                packed = PackedWeight(quantize(w, format), w.dtype)
            except ValueError as error:
                raise ValueError(f"model: '{name}.{weight}': {error}") from None
            delattr(experts, weight)
            setattr(experts, weight, packed)
    return model


def _check(name: str, experts: GroupedExperts, format: Format) -> None:
    if experts.main_grads is not None:
        raise ValueError(f"model: '{name}' has main_grads, and quantised weights have no gradients; set it to None")
    for weight in _WEIGHTS:
        w = getattr(experts, weight)
        if w is None:
            continue
        if isinstance(w, PackedWeight):
            raise ValueError(f"model: '{name}.{weight}' is quantised already, to {w.format}; quantise a model once")
        if is_traceable_wrapper_subclass(w.data):
            raise ValueError(
                f"model: '{name}.{weight}' is a {type(w.data).__name__}; call quantize_ before parallelize"
            )
        try:
            data_shapes(format, w.shape[2], w.shape[1])
        except ValueError as error:
            raise ValueError(f"model: '{name}.{weight}': {error}") from None
