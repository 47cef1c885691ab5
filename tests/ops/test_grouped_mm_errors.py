"""What grouped_mm refuses, and how: every message names the argument, the value and what to do."""

import threading

import jaxtyping
import pytest
import torch

from moesaic.ops import debug_checks, grouped_mm
from moesaic.ops.debug import debug_checks_enabled
from moesaic.ops.grouped_mm import tiled
from moesaic.ops.grouped_mm.implementations import IMPLEMENTATIONS
from moesaic.ops.implementations import Row, takes_all
from tests.ops.cpu_isa import CPU


@pytest.fixture
def unchecked(monkeypatch):
    """Without jaxtyping's own checks, as for a user."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def sizes(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


X, W, SIZES = torch.ones(6, 4), torch.ones(3, 4, 5), sizes(2, 0, 3)

VALUE_ERRORS = {
    "x of 3 dims": (
        lambda: grouped_mm(X.view(2, 3, 4), W, SIZES),
        r"x: expected \[R, K\], got \[2, 3, 4\]; flatten leading dims with x.flatten\(0, -2\)",
    ),
    "x of 1 dim": (lambda: grouped_mm(X[0], W, SIZES), r"x: expected \[R, K\], got \[4\]"),
    "w of 2 dims": (lambda: grouped_mm(X, W[0], SIZES), r"w: expected \[E, K, N\], got \[4, 5\]"),
    "sizes of no dim": (
        lambda: grouped_mm(X, W, torch.tensor(3)),
        r"group_sizes: expected \[E\] or \[B, G\], got \[\]",
    ),
    "sizes of 3 dims": (
        lambda: grouped_mm(X, W, SIZES.view(1, 1, 3)),
        r"group_sizes: expected \[E\] or \[B, G\], got \[1, 1, 3\]",
    ),
    "K differs": (
        lambda: grouped_mm(X, W[:, :3], SIZES),
        r"w: expected \[E, 4, N\] to match x \[6, 4\], got \[3, 3, 5\]$",
    ),
    "w transposed": (
        lambda: grouped_mm(X, W.mT, SIZES),
        r"w: expected \[E, 4, N\] to match x \[6, 4\], got \[3, 5, 4\]; w looks transposed, pass w.mT",
    ),
    "w elsewhere": (lambda: grouped_mm(X, W.to("meta"), SIZES), r"w: is on meta, x on cpu; move it there"),
    "sizes elsewhere": (
        lambda: grouped_mm(X, W, SIZES.to("meta")),
        r"group_sizes: is on meta, x on cpu; move it there",
    ),
    "a size too few": (
        lambda: grouped_mm(X, W, SIZES[:2]),
        r"group_sizes: expected one size for each of the 3 matrices of w, got 2",
    ),
    "offsets with the leading 0": (
        lambda: grouped_mm(X, W, sizes(0, 2, 2, 5)),
        r"group_sizes: expected one size for each of the 3 matrices of w, got 4",
    ),
    "matrices for no form of blocks": (
        lambda: grouped_mm(X, W, sizes([1, 0], [2, 0], [0, 0])),
        r"group_sizes: 3 matrices of w over 3 blocks need 1 groups a block \(each its own\) or 3 \(shared\), got 2",
    ),
    "too many matrices for blocks": (
        lambda: grouped_mm(X, W.repeat(3, 1, 1), sizes([1, 0, 1, 0], [2, 0, 0, 0])),
        r"group_sizes: 9 matrices of w over 2 blocks need 5 groups a block \(each its own\) or 9 \(shared\), got 4",
    ),
    "matrices without blocks": (
        lambda: grouped_mm(X[:0], W, torch.empty(0, 2, dtype=torch.int64)),
        r"group_sizes: 3 matrices of w over 0 blocks need 3 groups a block \(each its own\) or 3 \(shared\), got 2",
    ),
    "unequal blocks": (
        lambda: grouped_mm(X[:5], W, sizes([1, 0, 1], [2, 0, 0])),
        r"x: 5 rows are not 2 equal blocks; pad every block to the same number of rows",
    ),
    "rows without blocks": (
        lambda: grouped_mm(X, W, torch.empty(0, 3, dtype=torch.int64)),
        r"x: 6 rows are not 0 equal blocks",
    ),
    "unknown implementation": (
        lambda: grouped_mm(X, W, SIZES, impl="cutlass"),
        r"impl: unknown implementation 'cutlass'; choose one of \['cpu', 'reference', 'torch', 'triton'\] or None",
    ),
}

TYPE_ERRORS = {
    "integer x": (
        lambda: grouped_mm(X.int(), W, SIZES),
        r"x: dtype torch.int32 is not supported; use one of .*bfloat16",
    ),
    "complex x": (lambda: grouped_mm(X.cfloat(), W, SIZES), r"x: dtype torch.complex64 is not supported"),
    "w of another type": (
        lambda: grouped_mm(X, W.bfloat16(), SIZES),
        r"w: dtype torch.bfloat16 differs from x's torch.float32; cast one of them, or use torch.autocast",
    ),
    "float sizes": (
        lambda: grouped_mm(X, W, SIZES.float()),
        r"group_sizes: dtype torch.float32 is not supported; use int32 or int64",
    ),
    "short sizes": (lambda: grouped_mm(X, W, SIZES.short()), r"group_sizes: dtype torch.int16 is not supported"),
    "narrower result": (
        lambda: grouped_mm(X, W, SIZES, out_dtype=torch.bfloat16),
        r"out_dtype: got torch.bfloat16; it can be torch.float32 \(that of x\) or torch.float32",
    ),
    "other half type": (
        lambda: grouped_mm(X.half(), W.half(), SIZES, out_dtype=torch.bfloat16),
        r"out_dtype: got torch.bfloat16; it can be torch.float16 \(that of x\) or torch.float32",
    ),
    "fp32 result of fp64": (
        lambda: grouped_mm(X.double(), W.double(), SIZES, out_dtype=torch.float32),
        r"out_dtype: torch.float32 would lose the precision of torch.float64 operands; omit it",
    ),
}

BAD_SIZES = {
    "negative": (sizes(3, -1, 3), r"group_sizes: sizes must be at least 0, got -1; pass how many rows each group has"),
    "offsets": (
        sizes(2, 2, 5),
        r"group_sizes: the groups of a block add up to 9 rows, but x has 6 rows a block \(6 rows in 1 blocks\); "
        r"pass counts, not cumulative offsets, or give x more rows",
    ),
    "one block too full": (
        sizes([1, 0, 1], [2, 2, 0]),
        r"group_sizes: the groups of a block add up to 4 rows, but x has 3 rows a block \(6 rows in 2 blocks\)",
    ),
    "rows without expert": (
        sizes([1, 0], [0, 2]),
        r"group_sizes: group 1 of block 1 has 2 rows but no expert: w has 3 matrices for 4 groups; "
        r"let groups past the last matrix be empty",
    ),
    "sum beyond int32": (sizes(2**31 - 1, 2**31 - 1, 2, dtype=torch.int32), r"add up to 4294967296 rows"),
}


@pytest.mark.parametrize("case", VALUE_ERRORS)
def test_value_errors(case, unchecked):
    call, message = VALUE_ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("case", TYPE_ERRORS)
def test_type_errors(case, unchecked):
    call, message = TYPE_ERRORS[case]
    with pytest.raises(TypeError, match=message):
        call()


def test_mixed_with_fp64_under_autocast(unchecked):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="w: dtype torch.bfloat16 differs"):
        grouped_mm(X.double(), W, SIZES)


@pytest.mark.parametrize("impl", ["reference", "torch", *CPU])
@pytest.mark.parametrize("case", BAD_SIZES)
def test_sizes_are_always_checked_on_cpu(case, impl):
    bad, message = BAD_SIZES[case]
    with pytest.raises(ValueError, match=message):
        grouped_mm(X, W, bad, impl=impl)


@pytest.mark.parametrize("case", BAD_SIZES)
def test_debug_checks_check_sizes_of_every_operator(case, monkeypatch):
    # The tiles stand in for a device where nothing else reads the sizes.
    monkeypatch.setitem(IMPLEMENTATIONS, "torch", Row(tiled, takes_all))
    bad, message = BAD_SIZES[case]
    grad = torch.ones(6, 5)
    calls = (
        lambda: grouped_mm(X, W, bad, impl="torch"),
        lambda: torch.ops.moesaic.grouped_mm_input_grad(grad, W, bad, "torch"),
        lambda: torch.ops.moesaic.grouped_mm_weight_grad(X, grad, bad, W, "torch"),
    )
    for call in calls:
        with debug_checks(), pytest.raises(ValueError, match=message):
            call()
    with debug_checks():
        grouped_mm(X, W, SIZES)
        grouped_mm(X, W[:0], SIZES[:0])


def test_debug_checks_end_with_their_block():
    assert not debug_checks_enabled()
    with debug_checks():
        with debug_checks():
            pass
        assert debug_checks_enabled()
    assert not debug_checks_enabled()
    with pytest.raises(KeyError), debug_checks():
        raise KeyError
    assert not debug_checks_enabled()


def test_debug_checks_belong_to_the_thread():
    seen = []
    with debug_checks():
        thread = threading.Thread(target=lambda: seen.append(debug_checks_enabled()))
        thread.start()
        thread.join()
    assert seen == [False]
