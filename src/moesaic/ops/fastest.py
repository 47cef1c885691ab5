"""What ``impl=None`` goes by: which implementation was measured to be the fastest, where.

An entry changes together with the numbers that justify it, and a kind of processor or GPU that nobody has measured
gets ``"torch"``. **CUDA awaits measurement**: the Triton kernels are compiled for GPUs and checked in an interpreter,
and were timed on none. ``benchmarks/fastest_cpu.py`` and ``benchmarks/gpu`` measure.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.ops.processor import Processor

# Largest average of rows a group, by the name of the shape.
LARGEST = {"one": 1, "few": 16, "some": 64}


class Call(NamedTuple):
    """What a choice depends on.

    Attributes:
        operator: its name in ``torch.ops.moesaic``.
        operands: the tensors that an implementation may refuse; the first has the dtype and the device of all.
        num_rows: of all groups together.
        num_groups: how many there are.
    """

    operator: str
    operands: tuple[Tensor, ...]
    num_rows: int
    num_groups: int


class Measured(NamedTuple):
    """Where an implementation is the fastest. What is None makes no difference.

    Attributes:
        fastest: the implementation.
        kind: an instruction set of the CPU kernels, or a type of device.
        numbers: what shows it, mostly a file of ``benchmarks/results/``.
        vendor, has_amx: of the processor.
        dtypes, operators, shapes: of the call. A shape is ``"one"`` (row a group, on average, or less), or that of
            :func:`shape_class`.
    """

    fastest: str
    kind: str
    numbers: str
    vendor: str | None = None
    has_amx: bool | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    operators: tuple[str, ...] | None = None
    shapes: tuple[str, ...] | None = None


_WITHOUT_GRADIENT = ("grouped_mm", "experts_mlp_inference")

# The first one that fits counts.
MEASURED = (
    Measured(
        "cpu",
        "avx512_bf16",
        "torch's products cannot add to what is wider than they are, so AMX is of no use there",
        dtypes=(torch.bfloat16,),
        operators=("grouped_mm_accumulate_weight_grad",),
    ),
    # Where there is AMX, torch's bf16 products run on its tiles and the kernels do not.
    Measured(
        "torch",
        "avx512_bf16",
        "fastest_cpu_xeon_1thread.json",
        has_amx=True,
        dtypes=(torch.bfloat16,),
        shapes=("some", "many"),
    ),
    Measured("cpu", "avx512_bf16", "experts_cpu_zen5_1thread.json"),
    # On these the kernels train 1.3 to 3.7 times (fp32) and 2.6 to 4.7 times (bf16) as fast as torch's products.
    Measured(
        "torch",
        "avx512",
        "docs/benchmarks.md",
        vendor="Intel",
        dtypes=(torch.float32,),
        operators=_WITHOUT_GRADIENT,
        shapes=("many",),
    ),
    Measured("cpu", "avx512", "docs/benchmarks.md", vendor="Intel"),
    Measured(
        "torch",
        "avx2",
        "fastest_cpu_zen3_1thread.json",
        vendor="AMD",
        dtypes=(torch.float32,),
        operators=_WITHOUT_GRADIENT,
        shapes=("one",),
    ),
    Measured("cpu", "avx2", "fastest_cpu_zen3_1thread.json", vendor="AMD"),
)


def shape_class(num_rows: int, num_groups: int) -> str:
    """By the average number of rows a group, for on CUDA the numbers themselves are never read to the host."""
    average = num_rows / max(num_groups, 1)
    return "few" if average <= LARGEST["few"] else "some" if average <= LARGEST["some"] else "many"


def fastest(call: Call, machine: Processor) -> tuple[str, ...]:
    """The names of implementations, the fastest first. The last one takes everything."""
    x = call.operands[0]
    shape = "one" if call.num_rows <= call.num_groups else shape_class(call.num_rows, call.num_groups)
    found = measured_for(call.operator, x.device.type, x.dtype, shape, machine)
    return (*(entry.fastest for entry in found), "torch")


@functools.cache
def measured_for(
    operator: str, device: str, dtype: torch.dtype, shape: str, machine: Processor
) -> tuple[Measured, ...]:
    """The entries that fit, the fastest first; none where nobody measured."""
    # Kernels for less than the processor has were compared with torch's products on others.
    on_cpu = machine.kernels if machine.kernels == machine.best else "none"
    kind = on_cpu if device == "cpu" else device
    return tuple(
        entry
        for entry in MEASURED
        if kind == entry.kind
        and entry.vendor in (None, machine.vendor)
        and entry.has_amx in (None, machine.has_amx)
        and (entry.dtypes is None or dtype in entry.dtypes)
        and (entry.operators is None or operator in entry.operators)
        and (entry.shapes is None or shape in entry.shapes)
    )
