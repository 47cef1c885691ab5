"""Opt-in: a token's results are the same bits whatever else is in the batch, and however the batch is cut.

The order in which a product's numbers are added depends on its number of rows. So every product has the same number
here: an expert's rows go in tiles of :data:`ROWS`, the last one filled up with zeros. And a library computes the end of
a long row of numbers by other instructions than the rest, which makes other bits of an exponential function. So rows of
activations are filled up, too.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 32
"""Rows of a tile: few enough for decoding, and enough for a weight that is read once a tile."""

# With fewer columns MKL's fp32 products depend on a row's place in the tile.
_FEW = 16
# A multiple of two vectors of any instruction set and dtype.
_COLUMNS = 128
_ENABLED: ContextVar[bool] = ContextVar("moesaic_batch_invariant", default=False)


def batch_invariant_enabled() -> bool:
    """Whether the caller is inside :func:`batch_invariant`. Code that is being compiled never is."""
    return not torch.compiler.is_compiling() and _ENABLED.get()


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    """Have ``grouped_mm``, ``experts_mlp`` and the routers of layers give each token the same bits in every batch.

    What a token's result is then depends on its own numbers and on no other token: neither on their number nor on the
    order. That is so for results in fp32 and bf16, on one machine with one number of threads. Gradients are right, and
    nothing is promised of their bits. Other layers, such as attention and shared experts, are torch's and as they were.

    It is for the CPU and has its products from torch: with ``impl=None`` it takes ``"torch"``, and another name is an
    error, as are tensors on other devices. Routers in compiled code do not look at it. The setting belongs to the
    calling thread.

    Example:
        >>> with moesaic.ops.batch_invariant():
        ...     y = moe(x)
    """
    token = _ENABLED.set(True)
    try:
        yield
    finally:
        _ENABLED.reset(token)


def only_implementation(impl: str | None, first: object) -> str:
    """The name of the implementation that can do it.

    Raises:
        ValueError: another one is asked for.
        RuntimeError: the operands are not on the CPU.
    """
    if impl not in (None, "torch"):
        raise ValueError(f"impl: got {impl!r}, and inside batch_invariant() only 'torch' or None is possible")
    if (device := getattr(first, "device", None)) is not None and device.type not in ("cpu", "meta"):
        raise RuntimeError(f"batch_invariant() is for tensors on the CPU, and these are on {device}; leave it out")
    return "torch"


def mm_in_tiles(x_RK: Tensor, w_KN: Tensor, out_RN: Tensor) -> None:
    """``out = x @ w`` in products of :data:`ROWS` rows each."""
    num_rows, columns = len(x_RK), w_KN.shape[1]
    if columns < _FEW:
        filled_RN = out_RN.new_empty(num_rows, _FEW)
        mm_in_tiles(x_RK, F.pad(w_KN, (0, _FEW - columns)), filled_RN)
        out_RN.copy_(filled_RN[:, :columns])
        return
    whole = num_rows // ROWS * ROWS
    for start in range(0, whole, ROWS):
        torch.mm(x_RK[start : start + ROWS], w_KN, out=out_RN[start : start + ROWS])
    if whole < num_rows:
        filled = F.pad(x_RK[whole:], (0, 0, 0, ROWS - num_rows + whole))
        out_RN[whole:] = torch.mm(filled, w_KN)[: num_rows - whole]


def in_filled_rows(function: Callable[[list[Tensor]], Tensor], tensors_RF: list[Tensor], value: float = 0.0) -> Tensor:
    """A function of tensors ``[R, F]``, row by row, of rows that are filled up with a value that changes no other."""
    columns = tensors_RF[0].shape[1]
    if not columns % _COLUMNS:
        return function(tensors_RF)
    return function([F.pad(t, (0, -columns % _COLUMNS), value=value) for t in tensors_RF])[:, :columns].contiguous()
