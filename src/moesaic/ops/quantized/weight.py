"""The type that stands in the place of a weight: quantised matrices, of which those that are used are decoded.

Legend: E experts, I and O the dims that the weight comes from and goes to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moesaic.ops.arguments import check_floats, check_given
from moesaic.ops.quantized.formats import FORMATS, Format, check_format, data_shapes, decode, encode, is_flat, sizes_of


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Matrices ``w [E, I, O]`` of 8 or 4 bits. :func:`moesaic.grouped_mm` and :func:`moesaic.experts_mlp` take it.

    It is read-only: the operators give gradients of everything but the weight. Results are those of the decoded
    matrices, rounded to the dtype of the tokens. They are decoded matrix by matrix, or by the kernels in registers, and
    never all at once.

    Args:
        data, scales: what :mod:`moesaic.ops.quantized.formats` says, for ``E`` matrices. Both may be DTensors.
        format: ``"int8"``, ``"nf4"`` or ``"mxfp4"``.
        flat_sizes: ``(I, O)`` of matrices whose blocks run over the ends of rows, which do not tell; else None.

    Attributes:
        transposed: whether this is the ``.mT`` of the matrices that are stored.
        dtype: what matrices are decoded to.

    Raises:
        TypeError: dtypes that are not the format's, or scales that require a gradient.
        ValueError: an unknown format, shapes that do not fit it, or tensors on different devices.

    Example:
        >>> w = quantize(torch.randn(3, 64, 32), "nf4")
        >>> w.shape, w.data.shape, w[0].shape
        (torch.Size([3, 64, 32]), torch.Size([3, 32, 1, 32]), torch.Size([64, 32]))
        >>> moesaic.grouped_mm(torch.randn(6, 64), w, torch.tensor([2, 0, 3])).shape
        torch.Size([6, 32])
    """

    data: Tensor
    scales: Tensor
    format: Format
    flat_sizes: tuple[int, int] | None = None
    transposed: bool = False
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_given(data=self.data, scales=self.scales)
        info = FORMATS[check_format(self.format)]
        for name, t, dtype in (("data", self.data, info.data), ("scales", self.scales, info.scales)):
            if t.dtype != dtype:
                raise TypeError(f"{name}: {self.format} has {dtype}, got {t.dtype}")
        if self.scales.requires_grad:
            raise TypeError(
                "scales: require a gradient, and quantised weights are frozen; give scales.detach(), or train the "
                "weights in bf16 or fp32"
            )
        if self.scales.device != self.data.device:
            raise ValueError(f"scales: are on {self.scales.device}, data on {self.data.device}; move them there")
        flat = is_flat(self.format, self.data)
        if flat != (self.flat_sizes is not None):
            state = "do not tell" if flat else "tell"
            raise ValueError(
                f"flat_sizes: data {list(self.data.shape)} of {self.format} {state} I and O of a matrix; give "
                f"{'(I, O)' if flat else 'None'}"
            )
        if self.data.ndim != (3 if info.block is None or flat else 4):
            raise ValueError(f"data: {self.format} has 3 or 4 dims for E matrices, got {list(self.data.shape)}")
        I, O = self._sizes()  # noqa: E741
        data_shape, scales_shape = data_shapes(self.format, O, I)
        for name, t, shape in (("data", self.data, data_shape), ("scales", self.scales, scales_shape)):
            if tuple(t.shape) != (self.data.shape[0], *shape):
                raise ValueError(
                    f"{name}: expected {[self.data.shape[0], *shape]} for matrices of {self.format} with I = {I} and "
                    f"O = {O}, got {list(t.shape)}"
                )

    @property
    def shape(self) -> torch.Size:
        I, O = self._sizes()  # noqa: E741
        return torch.Size((self.data.shape[0], *((O, I) if self.transposed else (I, O))))

    @property
    def ndim(self) -> int:
        return 3

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def nbytes(self) -> int:
        """The bytes of data and scales."""
        return self.data.nbytes + self.scales.nbytes

    @property
    def mT(self) -> QuantizedWeight:
        """The transposed matrices, of the same memory."""
        return replace(self, transposed=not self.transposed)

    def to(self, dtype: torch.dtype) -> QuantizedWeight:
        """The same weight, whose matrices are decoded to another dtype."""
        return replace(self, dtype=dtype)

    def __getitem__(self, index: int | Tensor) -> Tensor:
        """Matrix ``w[e]``, or those of a tensor of indices, decoded."""
        I, O = self._sizes()  # noqa: E741
        w_OI = decode(self.format, self.data[index], self.scales[index], O, I).to(self.dtype)
        return w_OI if self.transposed else w_OI.mT

    def dequantize(self) -> Tensor:
        """All matrices, decoded: as large as what was quantised."""
        if not self.shape[0]:
            return self.scales.new_empty(self.shape, dtype=self.dtype)
        return torch.stack([self[e] for e in range(self.shape[0])])

    def _sizes(self) -> tuple[int, int]:
        return sizes_of(self.format, self.data) if self.flat_sizes is None else self.flat_sizes


Weight = Tensor | QuantizedWeight


def decoded(w: Weight) -> Tensor:
    """All matrices as a tensor, of the dtype that the weight is decoded to."""
    return w if isinstance(w, Tensor) else w.dequantize()


@torch.no_grad()
def quantize(w: Tensor, format: Format) -> QuantizedWeight:
    """Quantise the matrices of a weight, each by itself, to the nearest numbers of a format.

    Args:
        w: ``[E, I, O]``, fp64, fp32, bf16 or fp16; ``y = x @ w[e]``. On the meta device the result is there too.
        format: ``"int8"`` with a scale for each output, ``"nf4"`` or ``"mxfp4"`` with blocks along ``I``.

    Raises:
        ValueError: an unknown format, numbers that are not finite, or sizes that the format does not have.
        TypeError: no tensor of floats.

    Example:
        >>> w = torch.randn(8, 128, 64)
        >>> (quantize(w, "int8").dequantize() - w).abs().max() < 0.05
        tensor(True)
    """
    check_given(w=w)
    check_floats(w=w)
    if w.ndim != 3:
        raise ValueError(f"w: expected [E, I, O], got {list(w.shape)}")
    try:
        data, scales = encode(check_format(format), w.detach().mT)
    except ValueError as error:
        raise ValueError(f"w: {error}") from None
    return QuantizedWeight(data, scales, format, (w.shape[1], w.shape[2]) if is_flat(format, data) else None)
