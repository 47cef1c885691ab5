"""The formats of quantised weights: how numbers are stored, and what they mean.

A matrix is stored as a linear layer stores it, output by output: ``[O, I]`` for ``y = x w``, ``w [I, O]``. Each format
has data and scales:

=========  ==============================  ==========================  =====================================
format     data                            scales                      a weight is
=========  ==============================  ==========================  =====================================
``int8``   int8 ``[..., O, I]``            fp32 ``[..., O]``           ``data * scale``
``nf4``    uint8 ``[..., O, I / 64, 32]``  fp32 ``[..., O, I / 64]``   ``NF4[code] * scale``
``mxfp4``  uint8 ``[..., O, I / 32, 16]``  uint8 ``[..., O, I / 32]``  ``E2M1[code] * 2 ** (scale - 127)``
=========  ==============================  ==========================  =====================================

With scales that is 8 bits and 32 for each output, 4.5 bits, and 4.25 bits.

Two codes of 4 bits share a byte. NF4 has the first one in the high half, MXFP4 in the low half.

NF4 is that of bitsandbytes (Dettmers et al. 2023, arXiv 2305.14314): the code table and the order of
``bitsandbytes/backends/default/ops.py``, with a scale (``absmax``) for each block of 64 numbers of the flattened
matrix. Where 64 does not divide ``I``, blocks run over the ends of rows; data is then *flat*, ``[..., T, 32]`` with
scales ``[..., T]``, for ``T = ceil(O I / 64)`` blocks, and the last one is filled up with zeros.

MXFP4 is that of the OCP Microscaling specification 1.0, in the layout of gpt-oss's checkpoints
(``transformers/integrations/mxfp4.py``): blocks of 32 along the summed dim, each with a scale of type E8M0, of which
255 means NaN.

Legend: E experts, O outputs of a matrix, I its inputs (the summed dim), T blocks.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Format = Literal["int8", "nf4", "mxfp4"]

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_E2M1_MAGNITUDES, *(-m for m in _E2M1_MAGNITUDES))
_E2M1_LARGEST_EXPONENT = 2
_E8M0_BIAS, _E8M0_LARGEST = 127, 254


class FormatInfo(NamedTuple):
    """A format.

    Attributes:
        block: numbers with one scale, along the summed dim; None for all of an output.
        data, scales: dtypes.
        codes: what the codes of 4 bits mean; None for whole bytes.
        first_is_high: whether the first code of a byte is in its high half.
        runs_on: whether blocks run over the ends of rows.
    """

    block: int | None
    data: torch.dtype
    scales: torch.dtype
    codes: tuple[float, ...] | None = None
    first_is_high: bool = False
    runs_on: bool = False


FORMATS: dict[Format, FormatInfo] = {
    "int8": FormatInfo(None, torch.int8, torch.float32),
    "nf4": FormatInfo(64, torch.uint8, torch.float32, NF4, first_is_high=True, runs_on=True),
    "mxfp4": FormatInfo(32, torch.uint8, torch.uint8, E2M1),
}


def check_format(format: str) -> Format:
    """The format of that name.

    Raises:
        ValueError: there is none.
    """
    if format not in FORMATS:
        raise ValueError(f"format: unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    return format  # pyrefly: ignore [bad-return]


def data_shapes(format: Format, O: int, I: int) -> tuple[tuple[int, ...], tuple[int, ...]]:  # noqa: E741
    """The shapes of data and scales of one matrix.

    Raises:
        ValueError: the format has no place for a matrix of these sizes.
    """
    block = FORMATS[format].block
    if block is None:
        return (O, I), (O,)
    if I % block == 0:
        return (O, I // block, block // 2), (O, I // block)
    if not FORMATS[format].runs_on:
        raise ValueError(
            f"{format} has blocks of {block} along the summed dim, which is {I} here; use 'int8' or 'nf4', which take "
            "any size"
        )
    T = -(-O * I // block)
    return (T, block // 2), (T,)


def is_flat(format: Format, data: Tensor) -> bool:
    """Whether the blocks of these matrices ``[E, ...]`` run over the ends of rows."""
    return FORMATS[format].block is not None and data.ndim == 3


def sizes_of(format: Format, data: Tensor) -> tuple[Any, Any]:
    """``I`` and ``O`` of matrices ``[E, ...]`` that are not flat; symbolic where the data is."""
    block = FORMATS[format].block
    return (data.shape[2], data.shape[1]) if block is None else (data.shape[2] * block, data.shape[1])


def encode(format: Format, w_EOI: Tensor) -> tuple[Tensor, Tensor]:
    """Data and scales of matrices, each encoded by itself, so that no wide copy of all of them is made."""
    E, O, I = w_EOI.shape  # noqa: E741
    info, (data_shape, scales_shape) = FORMATS[format], data_shapes(format, O, I)
    data = w_EOI.new_empty(E, *data_shape, dtype=info.data)
    scales = w_EOI.new_empty(E, *scales_shape, dtype=info.scales)
    if w_EOI.is_meta:
        return data, scales
    for e in range(E):
        w_OI = w_EOI[e].float()
        if not bool(w_OI.isfinite().all()):
            raise ValueError(f"matrix {e} has numbers that are not finite, which no format can hold")
        data[e], scales[e] = _encode_int8(w_OI) if info.block is None else _encode_blocks(format, w_OI)
    return data, scales


def decode(format: Format, data: Tensor, scales: Tensor, O: int, I: int) -> Tensor:  # noqa: E741
    """Matrices ``[..., O, I]`` in fp32, from their data and scales."""
    info = FORMATS[format]
    if info.codes is None or info.block is None:
        return data.float() * scales.unsqueeze(-1)
    codes = torch.tensor(info.codes, device=data.device)
    halves = (data >> 4, data & 15) if info.first_is_high else (data & 15, data >> 4)
    numbers = codes[torch.stack(halves, -1).int()].flatten(-2)
    if info.scales == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu).float()
    blocks = numbers * scales.unsqueeze(-1)
    first = data.shape[: data.ndim - len(data_shapes(format, O, I)[0])]
    return blocks.reshape(*first, math.prod(blocks.shape[len(first) :]))[..., : O * I].reshape(*first, O, I)


def _encode_int8(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    if not w_OI.shape[1]:
        return w_OI.to(torch.int8), w_OI.new_zeros(w_OI.shape[0])
    scales_O = w_OI.abs().amax(1) / 127
    # Rows of zeros, and of numbers so small that their scale is zero.
    divisors_O1 = torch.where(scales_O > 0, scales_O, torch.inf).unsqueeze(1)
    return (w_OI / divisors_O1).round().clamp(-127, 127).to(torch.int8), scales_O


def _encode_blocks(format: Format, w_OI: Tensor) -> tuple[Tensor, Tensor]:
    info, (data_shape, scales_shape) = FORMATS[format], data_shapes(format, *w_OI.shape)
    assert info.block is not None
    flat = w_OI.flatten()
    blocks_TB = torch.nn.functional.pad(flat, (0, -len(flat) % info.block)).view(-1, info.block)
    largest_T1 = blocks_TB.abs().amax(1, keepdim=True)
    if format == "nf4":
        scales_T1 = largest_T1
        # As bitsandbytes does it: a product with the inverse, and the lower one of two codes that are equally near.
        scaled_TB = torch.where(largest_T1 > 0, blocks_TB * (1 / largest_T1), 0).clamp(-1, 1)
        codes_TB = torch.bucketize(scaled_TB, _middles(info.codes or ()).to(flat.device))
    else:
        scales_T1, codes_TB = _encode_e2m1(blocks_TB, largest_T1)
    first, second = codes_TB[:, ::2].to(torch.uint8), codes_TB[:, 1::2].to(torch.uint8)
    data = (first << 4 | second) if info.first_is_high else (second << 4 | first)
    return data.view(data_shape), scales_T1.view(scales_shape)


def _encode_e2m1(blocks_TB: Tensor, largest_T1: Tensor) -> tuple[Tensor, Tensor]:
    """Section 6.3 of the specification: the scale is that of the largest number, and numbers beyond 6 become 6."""
    exponents_T1 = torch.frexp(largest_T1).exponent - 1 - _E2M1_LARGEST_EXPONENT
    scales_T1 = (exponents_T1 + _E8M0_BIAS).clamp(0, _E8M0_LARGEST).to(torch.uint8)
    scaled_TB = blocks_TB.double() / scales_T1.view(torch.float8_e8m0fnu).double()
    middles = _middles(_E2M1_MAGNITUDES).to(blocks_TB.device, torch.float64)
    below_TB, above_TB = (torch.bucketize(scaled_TB.abs(), middles, right=right) for right in (False, True))
    # Of two codes that are equally near, the even one.
    magnitudes_TB = torch.where(below_TB % 2 == 0, below_TB, above_TB)
    return scales_T1, magnitudes_TB + 8 * torch.signbit(scaled_TB)


def _middles(codes: tuple[float, ...]) -> Tensor:
    numbers = torch.tensor(codes, dtype=torch.float64)
    return ((numbers[1:] + numbers[:-1]) / 2).float()
