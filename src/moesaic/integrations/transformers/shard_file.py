"""Write a safetensors file one tensor at a time: in memory there is never more than that one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moesaic.integrations.transformers.lazy import LazyTensor

# As the format has them: https://huggingface.co/docs/safetensors
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class ShardFile:
    """A file of tensors whose shapes and dtypes are known before.

    Args:
        place: of the file.
        tensors: what it will have, by name. They are not read here.

    Raises:
        OSError: it cannot be written.
        ValueError: a tensor has a dtype that the format does not have.
    """

    def __init__(self, place: Path, tensors: Mapping[str, LazyTensor]) -> None:
        # Wide numbers first, so that each is where a multiple of its width is.
        names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._starts: dict[str, int] = {}
        self._sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        end = 0
        for name in names:
            tensor = tensors[name]
            if tensor.dtype not in _DTYPES:
                raise ValueError(f"{name}: safetensors has no dtype for {tensor.dtype}; cast it")
            self._starts[name], end = end, end + tensor.nbytes
            header[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [self._starts[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._file = place.open("wb", buffering=0)
        self._write(0, len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the numbers of one tensor into their place."""
        numbers = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert numbers.numel() == self._sizes[name], f"{name}: {numbers.numel()} bytes, expected {self._sizes[name]}"
        self._write(self._data + self._starts[name], numbers.numpy().data)

    def close(self) -> None:
        """Flush all to the disk."""
        os.fsync(self._file.fileno())
        self._file.close()

    def _write(self, at: int, numbers: bytes | memoryview) -> None:
        self._file.seek(at)
        left = memoryview(numbers)
        while len(left):
            left = left[self._file.write(left) :]
