"""Whether the Triton kernels can run on a tensor. Imports triton only when asked about one."""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)


def load(name: str, x: Tensor) -> ModuleType:
    """The module of kernels ``moesaic.ops.triton.<name>``, for operands like ``x``.

    Raises:
        TypeError: a dtype without kernels.
        RuntimeError: there is no triton, ``x`` is not on a GPU (and the kernels are not interpreted), or on an old one.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f'impl: "triton" has no kernels for {x.dtype}; use "torch" or None')
    is_interpreted = _prepare()
    if x.device.type == "cuda":
        _check_gpu(x.device)
    elif not is_interpreted and x.device.type != "meta":
        raise RuntimeError(
            f'impl: "triton" computes on CUDA, x is on {x.device}; move it there, or use "torch" or None '
            "(TRITON_INTERPRET=1 in the environment runs the kernels on the CPU, slowly, for tests)"
        )
    return importlib.import_module(f"moesaic.ops.triton.{name}")


@functools.cache
def _prepare() -> bool:
    """Import triton; whether its interpreter runs the kernels."""
    try:
        import triton
    except ModuleNotFoundError as error:
        raise RuntimeError(
            'impl: "triton" needs triton, which is not installed; pip install "moesaic[triton]", or use "torch" or None'
        ) from error
    if not triton.knobs.runtime.interpret:
        return False
    from moesaic.ops.triton import interpreter

    interpreter.mend()
    return True


@functools.cache
def _check_gpu(device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _OLDEST:
        raise RuntimeError(
            f'impl: "triton" needs compute capability 8.0, {device} has {capability[0]}.{capability[1]}; use "torch"'
        )
