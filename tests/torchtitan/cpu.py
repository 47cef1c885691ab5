"""What torchtitan 0.3.0 lacks to run on CPU and gloo. :func:`install` comes before any other import of torchtitan.

Nothing here touches the experts: what is compared runs as it is. :func:`stock_in_fp32` is for the reference alone.
"""

import contextlib
import functools
import logging
import types
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask


class _CpuModule(types.ModuleType):
    """Stands for `torch.cuda`: `torch.cpu` has no memory statistics, no device names and no numbered devices."""

    FIXED = types.MappingProxyType(
        {
            "memory_stats": dict.fromkeys(
                ("active_bytes.all.peak", "reserved_bytes.all.peak", "num_alloc_retries", "num_ooms"), 0
            ),
            "current_device": 0,
            "get_device_name": "cpu",
            "get_device_properties": types.SimpleNamespace(total_memory=1 << 34, name="cpu"),
        }
    )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self.FIXED:
            return lambda *_: self.FIXED[name]
        return getattr(torch.cpu, name, None) or (lambda *_, **__: 0)


@functools.cache
def install(quiet: bool = True) -> None:
    """Put all stand-ins in place, once in a process; ``quiet`` leaves out warnings and what torchtitan reports."""
    if not hasattr(dist, "set_timeout"):  # torch 2.13
        dist.set_timeout = lambda *_: None
    import torchtitan.tools.utils as utils

    utils.device_type, utils.device_module = "cpu", _CpuModule("cpu")
    # A name of the processor is looked for with lspci, by way of a warning.
    utils.get_peak_flops = lambda _: 1.0

    import torchtitan.distributed.fsdp as fsdp
    import torchtitan.models.common.attention as attention
    import torchtitan.trainer as trainer

    attention.FlexAttention._compiled_flex_attn = staticmethod(_attention)
    attention._compiled_create_block_mask = create_block_mask  # to compile it takes each rank seconds
    fsdp.disable_fsdp_gradient_division = _plain_sums(fsdp.disable_fsdp_gradient_division)
    trainer.time = types.SimpleNamespace(sleep=lambda _: None, perf_counter=trainer.time.perf_counter)
    if quiet:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    # torchtitan does so where it makes the process group, which tests have made before.
    torch.autograd.set_multithreading_enabled(False)


class _Aux:
    def __init__(self, lse: Tensor) -> None:
        self.lse = lse


def _attention(
    q_BNLH: Tensor,
    k_BNLH: Tensor,
    v_BNLH: Tensor,
    *,
    block_mask: BlockMask,
    scale: float | None,
    **_: object,
) -> tuple[Tensor, _Aux]:
    """FlexAttention has no backward pass on CPU: the same, with the whole matrix of scores."""
    B, N, L, H = q_BNLH.shape
    k, v = (t.repeat_interleave(N // t.shape[1], 1) for t in (k_BNLH, v_BNLH))
    mask = create_mask(block_mask.mask_mod, B, N, L, k.shape[2], device="cpu")
    scores = (q_BNLH @ k.mT).float() * (H**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, _Aux(lse)


def _plain_sums(stock: Any) -> Any:
    def disable(model: Any) -> None:
        """A divide factor of 1.0 makes FSDP2 ask for NCCL's PREMUL_SUM. gloo has none, and a plain sum is the same."""
        stock(model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)

    return disable


@contextlib.contextmanager
def stock_in_fp32() -> Iterator[None]:
    """torchtitan's own experts round to bf16. Here they do not, so that the rest can be compared in fp32."""
    from torchtitan.models.common.moe import GroupedExperts
    from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

    def loop(self: object, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
        ends = offs.tolist()
        groups = [A[a:b] @ w for a, b, w in zip([0, *ends], ends, B_t, strict=False)]
        return torch.cat([*groups, A.new_zeros(A.shape[0] - ends[-1], B_t.shape[2])])

    def unrounded(stock: Any) -> Any:
        def forward(self: object, *args: Tensor) -> Tensor:
            with mock.patch.object(Tensor, "bfloat16", lambda t: t):
                return stock(self, *args)

        return forward

    with contextlib.ExitStack() as patches:
        for owner in (GroupedExperts, GptOssGroupedExperts):
            patches.enter_context(mock.patch.object(owner, "forward", unrounded(owner.forward)))
        patches.enter_context(mock.patch.object(GroupedExperts, "_grouped_mm", loop))
        yield
