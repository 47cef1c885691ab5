"""What ``impl=None`` goes by: which implementation was measured to be the fastest, where.

An entry of ``MEASURED`` changes together with the numbers that justify it. ``moesaic tune`` measures a machine; what it
keeps (:mod:`moesaic.ops.tuned`) goes before the entries. Where neither says anything, ``"torch"`` computes. **CUDA
awaits measurement**: the Triton kernels are compiled for GPUs and checked in an interpreter, and were timed on none.
``benchmarks/fastest_cpu.py`` and ``benchmarks/gpu`` measure.

What a process goes by is settled at the first call, and :func:`use` replaces it: by that of another rank, or of the run
that is continued.
"""

import functools
from typing import NamedTuple

import torch

from moesaic.ops import native, tuned
from moesaic.ops.choices import CASES, Case, Choices, shape_on_cpu
from moesaic.ops.processor import Processor, kernels_for, processor
from moesaic.ops.quantized.weight import Weight


class Call(NamedTuple):
    """What a choice depends on.

    Attributes:
        operator: its name in ``torch.ops.moesaic``.
        operands: the tensors that an implementation may refuse; the first has the dtype and the device of all.
        num_rows: of all groups together.
        num_groups: how many there are.
    """

    operator: str
    operands: tuple[Weight, ...]
    num_rows: int
    num_groups: int


class Measured(NamedTuple):
    """Where an implementation is the fastest. What is None makes no difference.

    Attributes:
        fastest: the implementation.
        kind: an instruction set of the CPU kernels, or a type of device.
        numbers: a file of ``benchmarks/results/`` that shows it.
        vendor, has_amx, best: of the processor.
        dtypes, operators, shapes: of the call; those of :mod:`moesaic.ops.choices`.
    """

    fastest: str
    kind: str
    numbers: str
    vendor: str | None = None
    has_amx: bool | None = None
    best: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    operators: tuple[str, ...] | None = None
    shapes: tuple[str, ...] | None = None

    def fits(self, case: Case, machine: Processor, kind: str) -> bool:
        """Whether it is of this kind of call, on such a processor."""
        return (
            kind == self.kind
            and self.vendor in (None, machine.vendor)
            and self.has_amx in (None, machine.has_amx)
            and self.best in (None, machine.best)
            and (self.dtypes is None or case.dtype in self.dtypes)
            and (self.operators is None or case.operator in self.operators)
            and (self.shapes is None or case.shape in self.shapes)
        )


class Reason(NamedTuple):
    """A choice, and what it rests on: an entry, or what ``moesaic tune`` has measured on a day."""

    fastest: str
    why: Measured | tuned.Tuned


_WITHOUT_GRADIENT = ("grouped_mm", "experts_mlp_inference")
_FP32, _BF16 = (torch.float32,), (torch.bfloat16,)

# The first one that fits counts. In fp32 the kernels of "avx512" and "avx512_bf16" are the same, and called "avx512".
MEASURED = (
    # AMD since Zen 4.
    Measured("cpu", "avx512", "fastest_cpu_zen5_1thread.json", vendor="AMD", dtypes=_FP32),
    Measured("cpu", "avx512_bf16", "fastest_cpu_zen5_1thread.json", vendor="AMD", dtypes=_BF16),
    # Intel with AMX: without it these instructions are not the usual ones. torch's products cannot add to what is wider
    # than they are: they make fp32 ones there, not on AMX.
    Measured(
        "cpu",
        "avx512_bf16",
        "fastest_cpu_xeon_1thread.json",
        vendor="Intel",
        dtypes=_BF16,
        operators=("grouped_mm_accumulate_weight_grad",),
    ),
    # Its bf16 products run on AMX tiles, and the kernels do not.
    Measured(
        "cpu", "avx512_bf16", "fastest_cpu_xeon_1thread.json", vendor="Intel", dtypes=_BF16, shapes=("one", "few")
    ),
    Measured("torch", "avx512_bf16", "fastest_cpu_xeon_1thread.json", vendor="Intel", dtypes=_BF16),
    Measured("cpu", "avx512", "fastest_cpu_xeon_1thread.json", vendor="Intel", has_amx=True, dtypes=_FP32),
    # Intel without AMX, with bf16 instructions that the kernels leave alone.
    Measured(
        "torch",
        "avx512",
        "fastest_cpu_emerald_1thread.json",
        vendor="Intel",
        has_amx=False,
        best="avx512_bf16",
        dtypes=_FP32,
        operators=("grouped_mm",),
        shapes=("many",),
    ),
    Measured("cpu", "avx512", "fastest_cpu_emerald_1thread.json", vendor="Intel", has_amx=False, best="avx512_bf16"),
    # Intel with AVX-512 and no bf16 instructions.
    Measured(
        "torch",
        "avx512",
        "fastest_cpu_icelake_1thread.json",
        vendor="Intel",
        has_amx=False,
        dtypes=_FP32,
        operators=_WITHOUT_GRADIENT,
        shapes=("many",),
    ),
    Measured("cpu", "avx512", "fastest_cpu_icelake_1thread.json", vendor="Intel", has_amx=False),
    # AMD with AVX2.
    Measured(
        "torch",
        "avx2",
        "fastest_cpu_zen3_1thread.json",
        vendor="AMD",
        dtypes=_FP32,
        operators=("grouped_mm",),
        shapes=("many",),
    ),
    Measured("cpu", "avx2", "fastest_cpu_zen3_1thread.json", vendor="AMD"),
)

_used: Choices | None = None


def fastest(call: Call, machine: Processor) -> tuple[str, ...]:
    """The names of implementations, the fastest first. The last one takes everything."""
    x = call.operands[0]
    if x.device.type != "cpu":
        return ("torch",)
    case = Case(call.operator, x.dtype, shape_on_cpu(call.num_rows, call.num_groups))
    chosen = in_force(machine).get(case, "torch")
    return ("torch",) if chosen == "torch" else (chosen, "torch")


def in_force(machine: Processor | None = None) -> Choices:
    """What this process goes by, on a ``machine`` that is by default its own. A case that is not there is torch's."""
    if _used is not None:
        return _used
    return _own(machine or processor(), tuned.threads_class(torch.get_num_threads()))


def use(choices: Choices | None) -> None:
    """From now on this process goes by these choices; for None by its own again."""
    global _used
    _used = choices


def check_runs(choices: Choices, whose: str) -> None:
    """Raise unless this process can compute by these choices; ``whose`` they are is said in the text.

    Raises:
        RuntimeError: they ask for the CPU kernels, and there are none.
    """
    loaded = native.kernels()
    if "cpu" in choices.values() and isinstance(loaded, str):
        raise RuntimeError(f"{whose} computes experts with the CPU kernels, and there are none here: {loaded}")


@functools.cache
def _own(machine: Processor, threads: str) -> Choices:
    reasons = explain(machine, torch.get_num_threads())
    return {case: reasons[case].fastest if case in reasons else "torch" for case in CASES}


def explain(machine: Processor, threads: int) -> dict[Case, Reason]:
    """A machine's choices with their reasons, where anything was measured."""
    here = tuned.found(machine, threads) if machine == processor() else None
    of_file = {} if here is None else {case: Reason(name, here) for case, name in here.choices.items()}
    return _by_entries(machine) | of_file


def by_entries(machine: Processor) -> Choices:
    """What the entries say of a kind of processor."""
    return {case: reason.fastest for case, reason in _by_entries(machine).items()}


@functools.cache
def _by_entries(machine: Processor) -> dict[Case, Reason]:
    found = {}
    for case in CASES:
        # Kernels that the processor does not use by itself were compared with torch's products on others.
        kind = kernels_for(machine.kernels, case.dtype)
        if kind == kernels_for(machine.usual, case.dtype):
            entry = next((entry for entry in MEASURED if entry.fits(case, machine, kind)), None)
            if entry is not None:
                found[case] = Reason(entry.fastest, entry)
    return found
