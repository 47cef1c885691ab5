"""Checkpoints written and read one tensor at a time, for states larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from moesaic.checkpoint.reader import SafeReader
from moesaic.checkpoint.store import read_into


class LazyPlanner(dcp.DefaultSavePlanner):
    """Saves tensors on the meta device. The values of each come from a function, when it is written.

    Args:
        read: by the name in the flattened state, such as ``model.norm.weight``.
    """

    def __init__(self, read: Mapping[str, Callable[[], Tensor]]) -> None:
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The numbers of a tensor."""
        return self._read[index.fqn]()


def stored_tensors(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor in a checkpoint, by its name in the flattened state."""
    metadata = SafeReader(path).read_metadata().state_dict_metadata
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_tensor(path: Path, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """One tensor of a checkpoint, whole, whatever layout wrote it."""
    tensor = torch.empty(shape, dtype=dtype)
    # This process alone reads, even if there are others.
    read_into(path, {name: tensor}, alone=True)
    return tensor
