"""Triton's interpreter (``TRITON_INTERPRET=1``), mended where version 3.6 computes something else than a GPU."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Let the interpreter's values bound loops, its bf16 be bf16, and calls between kernels' functions be quick."""
    _accept_numpy()
    _patch_once_a_launch()
    _convert_bf16()
    _multiply_bf16()


def _accept_numpy() -> None:
    # A scalar is kept as an array of one element, of which an int is made. NumPy refuses that since 2.4.
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


def _patch_once_a_launch() -> None:
    # Every call of a function of a kernel replaced all of the language anew, which was nearly all of the time.
    patch = interpreter._patch_lang
    every_module = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang = lambda _: patch(every_module)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def _convert_bf16() -> None:
    # Conversion to bf16 cuts the lower bits off, where a GPU rounds to nearest even.
    convert = interpreter._convert_float

    def convert_rounding(array: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(array)).to(torch.bfloat16)
            return rounded.view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            return _to_fp32(array)
        return convert(array, source, target, mode)

    interpreter._convert_float = convert_rounding


def _multiply_bf16() -> None:
    # bf16 is kept as its bits in uint16, and these were multiplied.
    dot = interpreter.InterpreterBuilder.create_dot

    def dot_of_values(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return dot(self, *(_as_fp32(operand) for operand in (a, b)), d, *options)

    interpreter.InterpreterBuilder.create_dot = dot_of_values


def _as_fp32(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return interpreter.TensorHandle(_to_fp32(operand.data), tl.float32)


def _to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
