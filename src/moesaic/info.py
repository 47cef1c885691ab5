"""What `moesaic info` prints: versions, and which kernels this machine gets."""

import platform
from importlib.metadata import version

import torch

from moesaic.ops import native, pool
from moesaic.ops.fastest import LARGEST, measured_for
from moesaic.ops.processor import INSTRUCTION_SETS, Processor, cpuinfo, has_amx, processor

_MB = 1 << 20
_OPERATORS = {"in training": "experts_mlp", "without gradients": "experts_mlp_inference"}
_UNMEASURED = "torch's products (nobody measured the kernels on this kind of processor)"
_LABELS = {"cpu": "CPU kernels", "torch": "torch's products"}


def lines() -> list[str]:
    """One line a fact, for people and for bug reports."""
    return [
        f"moesaic {version('moesaic')}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        f"processor: {cpuinfo().get('model name', platform.processor()) or 'unknown'}{_amx()}",
        f"CPU kernels: {_cpu_kernels()}",
        *choices(processor()),
        f"pool of large CPU results: {_pool()}",
        f"CUDA: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}",
    ]


def choices(machine: Processor) -> list[str]:
    """What computes experts on CPU without ``impl=``, for each dtype of the kernels, and the numbers that say why."""
    return [line for dtype in native.DTYPES for line in _choices_of(dtype, machine)]


def _choices_of(dtype: torch.dtype, machine: Processor) -> list[str]:
    # For each choice, in which passes it is taken, and there for which numbers of rows an expert.
    found: dict[str, dict[str, list[str]]] = {}
    shapes = [*LARGEST, "many"]
    for name, operator in _OPERATORS.items():
        for shape in shapes:
            entries = measured_for(operator, "cpu", dtype, shape, machine)
            choice = f"{_LABELS[entries[0].fastest]} (see {entries[0].numbers})" if entries else _UNMEASURED
            found.setdefault(choice, {}).setdefault(name, []).append(shape)
    title = f"{str(dtype).removeprefix('torch.')} experts on CPU"
    if len(found) == 1:
        return [f"{title}: {choice}" for choice in found]
    lines = []
    for choice, passes in found.items():
        if len(passes) == len(_OPERATORS) and len({tuple(rows) for rows in passes.values()}) == 1:
            passes = {"": next(iter(passes.values()))}
        where = [" ".join(filter(None, [name, _rows(rows, shapes)])) for name, rows in passes.items()]
        lines.append(f"{title}, {' and '.join(where)}: {choice}")
    return lines


def _rows(taken: list[str], shapes: list[str]) -> str:
    if taken == shapes:
        return ""
    first, last = shapes.index(taken[0]), taken[-1]
    if last == "many":
        return f"above {LARGEST[shapes[first - 1]]} rows an expert"
    above = f"above {LARGEST[shapes[first - 1]]} and " if first else ""
    return f"{above}up to {LARGEST[last]} rows an expert"


def _cpu_kernels() -> str:
    loaded = native.kernels()
    return f"none, {loaded}" if isinstance(loaded, str) else INSTRUCTION_SETS[loaded.isa]


def _amx() -> str:
    return ", with AMX" if has_amx() else ""


def _pool() -> str:
    lent, idle, limit = pool.state()
    if limit == 0:
        return "off"
    return f"{lent // _MB} MB in tensors, {idle // _MB} MB idle, at most {limit // _MB} MB kept idle"
