"""Which operators the gradient of an operator calls. On DTensors each of them needs a rule of its own."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.sharding.decide import on_meta


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[torch._ops.OpOverload, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[func] = None
        return func(*args, **(kwargs or {}))


def operators_of_gradient(
    op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[torch._ops.OpOverload, ...]:
    """The operators that autograd calls for the gradient of ``op(*args, **kwargs)``, in order.

    The gradient is computed once without values, on tensors of the given shapes. None where ``op`` has no gradient, or
    one that cannot be computed without values.
    """
    # In a thread of its own, for this may be called where autograd is switched off: inside an operator.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_trace, op, args, kwargs).result()


def _trace(
    op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[torch._ops.OpOverload, ...]:
    leaves: list[Tensor] = []

    def leaf(value: Any) -> Any:
        t = on_meta(value)
        if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex()):
            leaves.append(t.requires_grad_())
        return t

    results = op(*map(leaf, args), **{name: leaf(value) for name, value in kwargs.items()})
    results = [r for r in ([results] if isinstance(results, Tensor) else results) if r.requires_grad]
    if not results:
        return ()
    log = _Log()
    try:
        with log:
            torch.autograd.grad(results, leaves, [torch.empty_like(r) for r in results], allow_unused=True)
    except Exception:
        # Without values a formula may fail that would not with them. If it is wrong, backward will tell.
        return ()
    return tuple(log.ops)
