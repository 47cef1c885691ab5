"""Triton's interpreter (``TRITON_INTERPRET=1``), mended where version 3.6 or 3.9 does something else than a GPU."""

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_IN_INT64 = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def mend() -> None:
    """Let the interpreter's values bound loops, its bf16 be bf16, and a launch take half the time."""
    _accept_numpy()
    _patch_once()
    _check_overflow_at_once()
    _splat_masks()
    _convert_bf16()
    _multiply_bf16()


def _accept_numpy() -> None:
    # A scalar is kept as an array of one element, of which an int is made. NumPy refuses that since 2.4.
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


def _patch_once() -> None:
    # Every launch, and every call of a function of a kernel, replaced all of the language and put it back.
    patch = interpreter._patch_lang
    every_module = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    @functools.cache
    def patch_once() -> Any:
        scope = patch(every_module)
        scope.restore = lambda: None
        return scope

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang = lambda _: patch_once()
    interpreter.InterpretedFunction.__call__ = call


def _check_overflow_at_once() -> None:
    # Every sum, difference and product of integers was made again in int64 by seven interpreted operations, which was
    # nearly half of the time.
    def check(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        integer = lhs.type.scalar
        if integer.int_bitwidth >= 64:
            return
        result = _IN_INT64[binary_op.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
        is_inside = (result >= integer.get_int_min_value()) & (result <= integer.get_int_max_value())
        assert is_inside.all(), f"int{integer.int_bitwidth} overflow detected for operation {binary_op.__name__}"

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def _splat_masks() -> None:
    # A comparison of two int32 is kept as int32, and so is its copy for each element. Version 3.9 takes no such mask.
    splat = interpreter.InterpreterBuilder.create_splat

    def splat_masks(self: Any, shape: Any, value: Any) -> Any:
        result = splat(self, shape, value)
        if value.data.dtype == np.bool_:
            result.data = result.data.astype(np.bool_)
        return result

    interpreter.InterpreterBuilder.create_splat = splat_masks


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
