"""The choice among an operator's implementations: what None is on each kind of processor, and what a name refuses."""

import json
import statistics
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import torch

from moesaic import info
from moesaic.ops import Implementation
from moesaic.ops.choices import OPERATORS, SHAPES, Case, shape_on_cpu
from moesaic.ops.experts_mlp.implementations import IMPLEMENTATIONS as EXPERTS
from moesaic.ops.fastest import MEASURED, Call, in_force
from moesaic.ops.grouped_mm.implementations import IMPLEMENTATIONS as GROUPED
from moesaic.ops.implementations import Row, check_name, choose, takes_all
from moesaic.ops.native import DTYPES
from moesaic.ops.processor import INSTRUCTION_SETS, Processor

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
ONE, FEW, SOME, MANY = 1, 16, 64, 65
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ADDING, WITHOUT_GRADIENT = {"grouped_mm_accumulate_weight_grad"}, {"grouped_mm", "experts_mlp_inference"}


def _refuses(x, *others):
    return None if x.dtype in DTYPES else TypeError("no kernels")


TABLE = {name: Row(ModuleType(name), _refuses if name == "cpu" else takes_all) for name in get_args(Implementation)}


def of(vendor: str, best: str, *, amx: bool = False, kernels: str | None = None) -> Processor:
    machine = Processor(vendor, amx, best, best)
    return machine._replace(kernels=kernels or machine.usual)


# For a processor, when the kernels are the choice: of the operator, the dtype and the rows a group.
KINDS = {
    "Zen 5": (of("AMD", "avx512_bf16"), lambda operator, dtype, rows: True),
    "Xeon with AMX": (
        of("Intel", "avx512_bf16", amx=True),
        lambda operator, dtype, rows: dtype == FP32 or rows <= FEW or operator in ADDING,
    ),
    "Xeon without bf16": (
        of("Intel", "avx512"),
        lambda operator, dtype, rows: not (dtype == FP32 and rows == MANY and operator in WITHOUT_GRADIENT),
    ),
    # In fp32 the kernels are those of Zen 5.
    "AMD without bf16": (of("AMD", "avx512"), lambda operator, dtype, rows: dtype == FP32),
    "Zen 3": (
        of("AMD", "avx2"),
        lambda operator, dtype, rows: not (dtype == FP32 and rows == MANY and operator == "grouped_mm"),
    ),
    "Intel with AVX2": (of("Intel", "avx2"), lambda operator, dtype, rows: False),
    "Zen 5, bf16 not chosen": (
        of("AMD", "avx512_bf16", kernels="avx512"),
        lambda operator, dtype, rows: dtype == FP32,
    ),
    "Zen 5, less chosen": (of("AMD", "avx512_bf16", kernels="avx2"), lambda operator, dtype, rows: False),
    "Xeon with AMX hidden": (
        of("Intel", "avx512_bf16"),
        lambda operator, dtype, rows: not (dtype == FP32 and rows == MANY and operator == "grouped_mm"),
    ),
    # Its bf16 instructions are not chosen there, so whoever asks for them gets torch's products.
    "Xeon with AMX hidden, bf16 instructions": (
        of("Intel", "avx512_bf16", kernels="avx512_bf16"),
        lambda operator, dtype, rows: dtype == FP32 and not (rows == MANY and operator == "grouped_mm"),
    ),
    "no kernels": (of("AMD", "none"), lambda operator, dtype, rows: False),
}


def chosen(machine: Processor, operator: str, dtype: torch.dtype, rows: int, device: str = "cpu") -> str:
    x = torch.empty(0, dtype=dtype, device=device)
    return choose(TABLE, None, Call(operator, (x,), 3 * rows, 3), machine).__name__


@pytest.mark.parametrize("kind", KINDS)
def test_what_none_is(kind):
    machine, takes_kernels = KINDS[kind]
    for operator in OPERATORS:
        for rows in (ONE, FEW, SOME, MANY):
            for dtype in (FP32, BF16):
                expected = "cpu" if takes_kernels(operator, dtype, rows) else "torch"
                assert chosen(machine, operator, dtype, rows) == expected, (operator, dtype, rows)
            assert chosen(machine, operator, FP64, rows) == "torch"
            assert chosen(machine, operator, BF16, rows, "meta") == "torch"


def test_every_entry_is_of_something_that_there_is():
    for entry in MEASURED:
        assert entry.fastest in get_args(Implementation)
        assert entry.kind in (*INSTRUCTION_SETS, "cuda")
        assert set(entry.operators or ()) <= set(OPERATORS)
        assert set(entry.shapes or ()) <= set(SHAPES)
        assert (RESULTS / entry.numbers).is_file()
    assert all(hasattr(torch.ops.moesaic, operator) for operator in OPERATORS)


# The passes that `benchmarks/fastest_cpu.py` times, and the operators that they are made of.
PASSES = {
    "experts_mlp, forward": ("experts_mlp_inference",),
    "experts_mlp, forward+backward": ("experts_mlp", "experts_mlp_backward"),
    "grouped_mm, forward": ("grouped_mm",),
    "grouped_mm, forward+backward": ("grouped_mm_input_grad", "grouped_mm_weight_grad"),
}


@pytest.mark.parametrize("kind", ["Zen 5", "Xeon with AMX", "Xeon with AMX hidden", "Zen 3"])
def test_the_numbers_say_so(kind):
    """Of a pass and rows a group, on average over the shapes of experts, no choice is much slower than the other."""
    machine, _ = KINDS[kind]
    case = Case("experts_mlp", BF16, "one")
    file = next(entry.numbers for entry in MEASURED if entry.fits(case, machine, machine.usual))
    ratios: dict[tuple[str, Case], list[float]] = {}
    for row in json.loads((RESULTS / file).read_text())["rows"]:
        for operator in PASSES[row["what"]]:
            case = Case(operator, getattr(torch, row["dtype"]), shape_on_cpu(row["rows"], 1))
            ratios.setdefault((row["what"], case), []).append(row["ratio"])
    assert len(ratios) == 6 * 2 * 4
    for (_, case), found in ratios.items():
        chosen = in_force(machine)[case]
        gain = statistics.geometric_mean(found) ** (1 if chosen == "cpu" else -1)
        assert gain > 0.9, (case, chosen, found)


@pytest.mark.parametrize("table", [GROUPED, EXPERTS])
def test_the_names_are_those_of_the_type(table):
    assert tuple(table) == get_args(Implementation)


def test_a_named_one_is_taken_or_says_why_not():
    call = Call("grouped_mm", (torch.empty(0, dtype=FP64),), 1, 1)
    assert choose(TABLE, "reference", call) is TABLE["reference"].module
    with pytest.raises(TypeError, match="no kernels"):
        choose(TABLE, "cpu", call)
    for refuse in (lambda: choose(TABLE, "cuda", call), lambda: check_name("cuda", TABLE)):
        with pytest.raises(ValueError, match="unknown implementation 'cuda'; choose one of .* or None"):
            refuse()


_KERNELS, _PRODUCTS = "CPU kernels (", "torch's products ("


@pytest.mark.parametrize(
    ("kind", "fp32", "bf16"),
    [
        ("Zen 5", {"": _KERNELS}, {"": _KERNELS}),
        ("no kernels", {"": _PRODUCTS}, {"": _PRODUCTS}),
        (
            "Xeon with AMX",
            {"": _KERNELS},
            {", up to 16 rows an expert": _KERNELS, ", above 16 rows an expert": _PRODUCTS},
        ),
        (
            "Xeon without bf16",
            {
                ", in training and without gradients up to 64 rows an expert": _KERNELS,
                ", without gradients above 64 rows an expert": _PRODUCTS,
            },
            {"": _KERNELS},
        ),
    ],
)
def test_info_says_what_runs_and_why(kind, fp32, bf16):
    expected = {
        f"{dtype} experts on CPU{where}": choice
        for dtype, choices in (("float32", fp32), ("bfloat16", bf16))
        for where, choice in choices.items()
    }
    quantised = info.quantised(KINDS[kind][0])
    assert quantised.startswith(_PRODUCTS if kind == "no kernels" else _KERNELS)
    said = dict(line.split(": ", 1) for line in info.choices(KINDS[kind][0]))
    assert said.keys() == expected.keys()
    for where, choice in said.items():
        assert choice.startswith(expected[where])
        assert ("nobody measured" in choice) == (kind == "no kernels")
