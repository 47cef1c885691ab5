"""A table of choices: for each kind of call on the CPU, which implementation computes it.

A kind of call is an operator, a dtype of the kernels and the average number of rows a group. Tables are made by
:mod:`moesaic.ops.fastest` and kept as JSON, in the file of ``moesaic tune`` and with a training run.
"""

from typing import Any, NamedTuple

import torch

from moesaic.ops.native import DTYPES

# Largest average of rows a group, by the name of the shape.
LARGEST = {"one": 1, "few": 16, "some": 64}
SHAPES = (*LARGEST, "many")

# The names in `torch.ops.moesaic` of what has several implementations.
OPERATORS = (
    "grouped_mm",
    "grouped_mm_input_grad",
    "grouped_mm_weight_grad",
    "grouped_mm_accumulate_weight_grad",
    "experts_mlp",
    "experts_mlp_inference",
    "experts_mlp_backward",
    "experts_mlp_backward_into",
)
# What the tables choose between.
CHOSEN = ("cpu", "torch")


class Case(NamedTuple):
    """A kind of call: the operator's name, the dtype of its operands, and one of ``SHAPES``."""

    operator: str
    dtype: torch.dtype
    shape: str


Choices = dict[Case, str]
CASES = tuple(Case(operator, dtype, shape) for dtype in DTYPES for operator in OPERATORS for shape in SHAPES)


def shape_class(num_rows: int, num_groups: int) -> str:
    """By the average number of rows a group, for on CUDA the numbers themselves are never read to the host."""
    average = num_rows / max(num_groups, 1)
    return "few" if average <= LARGEST["few"] else "some" if average <= LARGEST["some"] else "many"


def shape_on_cpu(num_rows: int, num_groups: int) -> str:
    """As :func:`shape_class`; ``"one"`` is one row a group, or less."""
    return "one" if num_rows <= num_groups else shape_class(num_rows, num_groups)


def dtype_name(dtype: torch.dtype) -> str:
    """Without the module: ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def to_json(choices: Choices) -> dict[str, Any]:
    """By dtype, operator and shape; one name for an operator where its shapes have the same."""
    values: dict[str, Any] = {}
    for case, name in choices.items():
        values.setdefault(dtype_name(case.dtype), {}).setdefault(case.operator, {})[case.shape] = name
    for by_operator in values.values():
        for operator, by_shape in by_operator.items():
            if len(by_shape) == len(SHAPES) and len(set(by_shape.values())) == 1:
                by_operator[operator] = by_shape[SHAPES[0]]
    return values


def from_json(values: Any) -> Choices:
    """What :func:`to_json` was given.

    Raises:
        ValueError: something else, with what is wrong.
    """
    known = {dtype_name(dtype): dtype for dtype in DTYPES}
    choices: Choices = {}
    for dtype, by_operator in _items(values, "choices"):
        for operator, by_shape in _items(by_operator, dtype):
            of_shapes = dict.fromkeys(SHAPES, by_shape) if isinstance(by_shape, str) else by_shape
            for shape, name in _items(of_shapes, operator):
                for value, allowed in ((dtype, known), (operator, OPERATORS), (shape, SHAPES), (name, CHOSEN)):
                    if value not in allowed:
                        raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
                choices[Case(operator, known[dtype], shape)] = name
    return choices


def _items(values: Any, what: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{what}: expected an object, got {values!r:.40}")
    return values.items()
