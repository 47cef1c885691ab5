"""What the interpreter itself is trusted with, mended as it is."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from moesaic.ops.triton import available

available.load("interpreter")


@triton.jit
def _compute_kernel(x, y, OP: tl.constexpr):
    a, b = tl.load(x), tl.load(y)
    if OP == "add":
        result = a + b
    elif OP == "sub":
        result = a - b
    else:
        result = a * b
    tl.store(x, result)


def compute(op: str, a: int, b: int, dtype: torch.dtype) -> int:
    x, y = torch.tensor([a], dtype=dtype), torch.tensor([b], dtype=dtype)
    _compute_kernel[(1,)](x, y, OP=op)
    return x.item()


@pytest.mark.parametrize(
    ("op", "a", "b", "result"),
    [("add", 2**31 - 2, 1, 2**31 - 1), ("sub", -(2**31) + 1, 1, -(2**31)), ("mul", 2**16, -(2**15), -(2**31))],
)
def test_an_integer_that_overflows_is_an_error(op, a, b, result):
    assert compute(op, a, b, torch.int32) == result
    further = {"add": 2, "sub": 2, "mul": 2**15}[op]
    with pytest.raises(InterpreterError, match=f"int32 overflow detected for operation {op}"):
        compute(op, a, further, torch.int32)
    assert compute(op, a, further, torch.int64) == {"add": a + 2, "sub": a - 2, "mul": a * 2**15}[op]
