"""Policies of selective activation checkpointing, as users have them."""

import functools
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten


class Counting:
    """A policy that knows how often the operator was called before, in this pass."""

    def __init__(self, saves: Callable[[Any, int], bool]):
        self._saves, self._calls = saves, Counter[Any]()

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        self._calls[context.is_recompute, op] += 1
        saves = self._saves(op, self._calls[context.is_recompute, op])
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE


# Those of torchtitan's `_get_save_ops` that run on a CPU; of the products, it keeps every second.
TORCHTITAN = (
    aten.mm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
    aten.max.default,
)
POLICIES: dict[str, Callable[[Any, int], bool]] = {
    "save all": lambda op, n: True,
    "save none": lambda op, n: False,
    "torchtitan": lambda op, n: op in TORCHTITAN and (op != aten.mm.default or n % 2 == 1),
    "routing": lambda op, n: op in (aten.topk.default, aten.scatter_add.default, aten.zeros_like.default),
    "communication": lambda op, n: "c10d" in str(op),
    "ours": lambda op, n: op.namespace == "moesaic",
    "every other": lambda op, n: n % 2 == 0,
    "some": lambda op, n: zlib.crc32(f"{op} {n}".encode()) % 2 == 0,
    "others": lambda op, n: zlib.crc32(f"{op} {n}".encode()) % 3 == 0,
}


def contexts(policy: str) -> tuple[Any, Any]:
    """For `checkpoint(context_fn=)`."""
    return create_selective_checkpoint_contexts(Counting(POLICIES[policy]))


WAYS = ["reentrant", "plain", *POLICIES]


def options(way: str) -> dict[str, Any]:
    """Keywords of `torch.utils.checkpoint.checkpoint`: reentrant, plain, or with a policy."""
    if way in POLICIES:
        return {"use_reentrant": False, "context_fn": functools.partial(contexts, way)}
    return {"use_reentrant": way == "reentrant"}


def recomputed(way: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(function, x, **options(way))
