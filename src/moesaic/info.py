"""What `moesaic info` prints: versions, and which kernels this machine gets."""

import platform
from importlib.metadata import version

import torch

from moesaic.ops import native, pool, tuned
from moesaic.ops.choices import CASES, LARGEST, SHAPES, Case, Choices, dtype_name
from moesaic.ops.fastest import Reason, explain, in_force
from moesaic.ops.native import DTYPES
from moesaic.ops.processor import INSTRUCTION_SETS, Processor, cpuinfo, has_amx, processor
from moesaic.ops.tuned import Tuned

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
        f"quantised experts on CPU: {quantised(processor())}",
        *_tuning(),
        f"pool of large CPU results: {_pool()}",
        f"CUDA: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}",
    ]


def choices(machine: Processor) -> list[str]:
    """What computes experts on CPU without ``impl=``, for each dtype of the kernels, and the numbers that say why."""
    reasons = explain(machine, torch.get_num_threads())
    return [line for dtype in DTYPES for line in _choices_of(dtype, reasons)]


def quantised(machine: Processor) -> str:
    """What computes experts with weights of 8 or 4 bits on CPU without ``impl=``. No table of numbers decides there."""
    if machine.kernels == "none":
        return f"{_LABELS['torch']} (a matrix is decoded whenever it is used)"
    return f"{_LABELS['cpu']} (weights are decoded in registers), in {' and '.join(map(dtype_name, DTYPES))}"


def _choices_of(dtype: torch.dtype, reasons: dict[Case, Reason]) -> list[str]:
    # For each choice, in which passes it is taken, and there for which numbers of rows an expert.
    found: dict[str, dict[str, list[str]]] = {}
    shapes = list(SHAPES)
    for name, operator in _OPERATORS.items():
        for shape in shapes:
            reason = reasons.get(Case(operator, dtype, shape))
            choice = _UNMEASURED if reason is None else f"{_LABELS[reason.fastest]} ({_why(reason)})"
            found.setdefault(choice, {}).setdefault(name, []).append(shape)
    title = f"{dtype_name(dtype)} experts on CPU"
    if len(found) == 1:
        return [f"{title}: {choice}" for choice in found]
    lines = []
    for choice, passes in found.items():
        if len(passes) == len(_OPERATORS) and len({tuple(rows) for rows in passes.values()}) == 1:
            passes = {"": next(iter(passes.values()))}
        where = [" ".join(filter(None, [name, _rows(rows, shapes)])) for name, rows in passes.items()]
        lines.append(f"{title}, {' and '.join(where)}: {choice}")
    return lines


def _why(reason: Reason) -> str:
    if isinstance(reason.why, Tuned):
        return f"measured here by moesaic tune, {reason.why.measured}"
    return f"see benchmarks/results/{reason.why.numbers}"


def _tuning() -> list[str]:
    """What `moesaic tune` has kept, or could do."""
    machine, path = processor(), tuned.file()
    if machine.kernels == "none" or path is None:
        return []
    if tuned.found(machine, torch.get_num_threads()) is not None:
        return [f"moesaic tune: measured this machine, see {path}; --forget forgets it"]
    if len(explain(machine, torch.get_num_threads())) < len(CASES):
        return ["moesaic tune: measures what is the fastest here, in half a minute at most, and keeps it"]
    return []


def _rows(taken: list[str], shapes: list[str]) -> str:
    """Of shapes that need not be next to each other: each run of them."""
    if taken == shapes:
        return ""
    runs: list[list[int]] = []
    for place in map(shapes.index, taken):
        if runs and runs[-1][-1] == place - 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return " and ".join(_rows_of_run(shapes, run[0], run[-1]) for run in runs) + " rows an expert"


def _rows_of_run(shapes: list[str], first: int, last: int) -> str:
    above = f"above {LARGEST[shapes[first - 1]]}" if first else ""
    if shapes[last] == "many":
        return above
    return f"{above} and up to {LARGEST[shapes[last]]}" if first else f"up to {LARGEST[shapes[last]]}"


def _cpu_kernels() -> str:
    loaded = native.kernels()
    if isinstance(loaded, str):
        return f"none, {loaded}"
    return _where_they_run(INSTRUCTION_SETS[loaded.isa], in_force())


def _where_they_run(isa: str, choices: Choices) -> str:
    """The instruction set, and for which dtypes its kernels are taken without being asked for, if not for all."""
    taken = {dtype: {name == "cpu" for case, name in choices.items() if case.dtype == dtype} for dtype in DTYPES}
    if all(found == {True} for found in taken.values()):
        return isa
    dtypes = [dtype_name(d) + " in part" * (False in found) for d, found in taken.items() if True in found]
    return f"{isa}, for {' and '.join(dtypes)}" if dtypes else f'none without impl="cpu"; {isa} with it'


def _amx() -> str:
    return ", with AMX" if has_amx() else ""


def _pool() -> str:
    lent, idle, limit = pool.state()
    if limit == 0:
        return "off"
    return f"{lent // _MB} MB in tensors, {idle // _MB} MB idle, at most {limit // _MB} MB kept idle"
