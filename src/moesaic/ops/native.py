"""The C interface of the CPU kernels: the library built from ``csrc/``, its records and its functions."""

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.ops.library import load
from moesaic.ops.processor import INSTRUCTION_SETS, processor
from moesaic.ops.quantized.weight import QuantizedWeight, Weight

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
FORMAT_NUMBERS = {"int8": 1, "nf4": 2, "mxfp4": 3}  # of `enum moesaic_format`
OK, BAD_GROUPS, OUT_OF_MEMORY, BAD_ARGUMENT = 0, 1, 2, 3  # of `enum moesaic_status`


MAX_PROJECTIONS = 2


class CGroups(ctypes.Structure):
    """``moesaic_groups`` of ``csrc/moesaic_cpu.h``."""

    _fields_ = (
        ("sizes", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("matrices", ctypes.c_int64),
        ("shared", ctypes.c_int32),
    )


class CMatrix(ctypes.Structure):
    """``moesaic_matrix`` of ``csrc/moesaic_cpu.h``."""

    _fields_ = (("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("column_stride", ctypes.c_int64))


class CScales(ctypes.Structure):
    """``moesaic_scales`` of ``csrc/moesaic_cpu.h``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("format", ctypes.c_int32),
    )


class CWeights(ctypes.Structure):
    """``moesaic_weights`` of ``csrc/moesaic_cpu.h``."""

    _fields_ = (("matrix", CMatrix), ("stride", ctypes.c_int64), ("scales", CScales))


class CRouting(ctypes.Structure):
    """``moesaic_routing`` of ``csrc/moesaic_cpu.h``."""

    _fields_ = (
        ("ids", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("copies", ctypes.c_int64),
        ("lines", ctypes.c_void_p),
        ("num_lines", ctypes.c_int64),
    )


class CProjection(ctypes.Structure):
    """``moesaic_projection`` of ``csrc/moesaic_cpu.h``."""

    _fields_ = (("w", CWeights), ("b", CMatrix))


class CExperts(ctypes.Structure):
    """``moesaic_experts`` of ``csrc/moesaic_cpu.h``."""

    _fields_ = (
        ("projections", CProjection * MAX_PROJECTIONS),
        ("down", CProjection),
        *((name, ctypes.c_int64) for name in ("experts", "dim", "hidden")),
        *((name, ctypes.c_int32) for name in ("num_projections", "activation", "dtype")),
    )


class CProjectionGrads(ctypes.Structure):
    """``moesaic_projection_grads`` of ``csrc/moesaic_cpu.h``."""

    _fields_ = (
        ("w", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("transposed", ctypes.c_int32),
        ("adds", ctypes.c_int32),
    )


class CExpertsGrads(ctypes.Structure):
    """``moesaic_experts_grads`` of ``csrc/moesaic_cpu.h``."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("projections", CProjectionGrads * MAX_PROJECTIONS),
        ("down", CProjectionGrads),
    )


# A pointer for each projection: where its results lie.
CPreActivations = ctypes.c_void_p * MAX_PROJECTIONS


class Kernels(NamedTuple):
    """The library, and the number of the instruction set to use."""

    library: ctypes.CDLL
    isa: int


@functools.cache
def kernels() -> Kernels | str:
    """The kernels of this machine, or why there are none.

    Raises:
        ValueError: ``MOESAIC_CPU_ISA`` names none, or one that this machine does not have.
    """
    library = load()
    if isinstance(library, str):
        return library
    best, used = processor().best, processor().kernels
    if best == "none":
        return "this processor has no AVX2 with FMA"
    if used == "none":
        return "MOESAIC_CPU_ISA is none"
    return Kernels(_declare(library), INSTRUCTION_SETS.index(used))


def refuses(x: Tensor, *others: Weight) -> Exception | None:
    """The error that says why the kernels cannot compute with these operands; None if they can."""
    for t in others:
        if isinstance(t, QuantizedWeight) and (error := _refuses_quantized(t)) is not None:
            return error
    if x.device.type != "cpu":
        return ValueError(f'impl: "cpu" computes on the CPU, x is on {x.device}; use "torch" or None')
    if x.dtype not in DTYPES or any(t.dtype != x.dtype for t in others):
        dtypes = " and ".join(str(t.dtype) for t in (x, *others))
        return TypeError(f'impl: "cpu" has no kernels for {dtypes}; use "torch" or None')
    loaded = kernels()
    if isinstance(loaded, str):
        return RuntimeError(f'impl: "cpu" has no kernels here, {loaded}; or use "torch" or None')
    return None


def _refuses_quantized(w: QuantizedWeight) -> Exception | None:
    if w.flat_sizes is not None:
        return ValueError(
            f'impl: "cpu" has no kernels for {w.format} whose blocks run over the ends of rows; use "torch" or None'
        )
    return None


def loaded_kernels() -> Kernels:
    """The kernels, for operands that they do not refuse."""
    loaded = kernels()
    assert isinstance(loaded, Kernels), loaded
    return loaded


def pointer(t: Tensor | None) -> int | None:
    """Where a tensor's elements begin; None, which is NULL in C, for none."""
    return None if t is None else t.data_ptr()


def matrix(t: Tensor | None) -> CMatrix:
    """The last two dims of a tensor; one without data for none."""
    return CMatrix() if t is None else CMatrix(t.data_ptr(), t.stride(-2), t.stride(-1))


def projection(w: Weight, b: Tensor | None) -> CProjection:
    """What every expert multiplies rows by, ``w [experts, inner, columns]``, and adds to them."""
    return CProjection(weights(w), matrix(b))


def weights(w: Weight) -> CWeights:
    """What rows are multiplied by; the tensors of a quantised weight have to be contiguous."""
    if isinstance(w, Tensor):
        return CWeights(matrix(w), w.stride(0))
    data, scales = w.data, w.scales
    row_bytes = data.stride(1) if data.shape[1] else 0
    # The kernels tell the dim along which an output is stored by a stride of zero.
    strides = (row_bytes, 0) if w.transposed else (0, row_bytes)
    return CWeights(
        CMatrix(data.data_ptr(), *strides),
        data.stride(0),
        CScales(scales.data_ptr(), scales.stride(0), scales.stride(1), FORMAT_NUMBERS[w.format]),
    )


def check_status(operator: str, status: int) -> None:
    """Raise unless a call of the library went well."""
    if status == OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(f"{operator}: no memory for the kernels' buffers")
    if status == BAD_ARGUMENT:
        raise RuntimeError(
            f"{operator}: the CPU kernels have no such dtype, activation or instruction set; "
            'build them again, or use impl="torch"'
        )
    if status != OK:
        raise RuntimeError(f"{operator}: the CPU kernels returned status {status}")


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    address, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    structs = (CGroups, CRouting, CExperts, CExpertsGrads, CWeights)
    groups, routing, experts, grads, weights = (ctypes.POINTER(t) for t in structs)
    signatures = {
        "moesaic_cpu_isa_name": (ctypes.c_char_p, i32),
        "moesaic_cpu_has_isa": (i32, i32),
        "moesaic_cpu_tile_product": (i32, address, address, address, i32),
        "moesaic_cpu_grouped_mm": (i32, groups, CMatrix, CMatrix, i64, address, i64, i64, i32, i32, i32, i32),
        "moesaic_cpu_quantized_mm": (i32, groups, CMatrix, weights, address, i64, i64, i32, i32, i32, i32),
        "moesaic_cpu_weight_grad": (i32, groups, CMatrix, CMatrix, address, i64, i64, i32, i32, i32, i32, i32),
        "moesaic_cpu_experts": (i32, routing, experts, CMatrix, address, CPreActivations, i32, i32),
        "moesaic_cpu_experts_backward": (i32, routing, experts, CMatrix, CMatrix, CPreActivations, grads, i32, i32),
        "moesaic_cpu_spin": (ctypes.c_double, i64, i32, i32),
        "moesaic_pool_limit": (None, i64),
        "moesaic_pool_state": (None, ctypes.POINTER(i64), ctypes.POINTER(i64)),
        "moesaic_pool_tensor": (address, ctypes.POINTER(i64), i32, i32),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
