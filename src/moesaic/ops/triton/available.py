"""Whether the Triton kernels can run on a tensor. Imports triton only when asked about one."""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from moesaic.ops.quantized.weight import QuantizedWeight, Weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)


def refuses(x: Tensor, *others: Weight) -> Exception | None:
    """The error that says why the kernels cannot compute with operands like ``x``; None if they can."""
    if any(isinstance(t, QuantizedWeight) for t in others):
        return TypeError('impl: "triton" has no kernels for quantised weights; use "torch" or None')
    if x.dtype not in DTYPES:
        return TypeError(f'impl: "triton" has no kernels for {x.dtype}; use "torch" or None')
    try:
        is_interpreted = _prepare()
    except ModuleNotFoundError as error:
        refusal = RuntimeError(
            'impl: "triton" needs triton, which is not installed; pip install ".[triton]" in a checkout of moesaic, '
            'or use "torch" or None'
        )
        refusal.__cause__ = error
        return refusal
    if x.device.type == "cuda":
        return _refuses_gpu(x.device)
    if not is_interpreted and x.device.type != "meta":
        return RuntimeError(
            f'impl: "triton" computes on CUDA, x is on {x.device}; move it there, or use "torch" or None '
            "(TRITON_INTERPRET=1 in the environment runs the kernels on the CPU, slowly, for tests)"
        )
    return None


def load(name: str) -> ModuleType:
    """The module of kernels ``moesaic.ops.triton.<name>``."""
    _prepare()
    return importlib.import_module(f"moesaic.ops.triton.{name}")


@functools.cache
def _prepare() -> bool:
    """Import triton; whether its interpreter runs the kernels."""
    import triton

    if not triton.knobs.runtime.interpret:
        return False
    from moesaic.ops.triton import interpreter

    interpreter.mend()
    return True


@functools.cache
def _refuses_gpu(device: torch.device) -> Exception | None:
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _OLDEST:
        return RuntimeError(
            f'impl: "triton" needs compute capability 8.0, {device} has {capability[0]}.{capability[1]}; use "torch"'
        )
    return None
