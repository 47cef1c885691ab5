"""A DCP reader that does not run code.

DCP's `.metadata` is a pickle, and unpickling can call anything. Here it can make metadata and nothing else. (Tensors
are read with `weights_only=True` by DCP itself.)
"""

from __future__ import annotations

import importlib
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from moesaic.checkpoint.folder import CheckpointError, is_plain

_ALLOWED = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise CheckpointError(f"it asks for {module}.{name}, which no checkpoint needs")
        return getattr(importlib.import_module(module), name)


class SafeReader(FileSystemReader):
    """`FileSystemReader` for checkpoints of any origin. `CheckpointError` if the metadata holds anything else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata."""
        path = self._get_metadata_path(kwargs.get("rank"))
        try:
            with self.fs.create_stream(path, "rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except CheckpointError as error:
            raise CheckpointError(f"{path} is not the metadata of a checkpoint: {error}") from None
        except Exception as error:
            raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path} is not the metadata of a checkpoint but a {type(metadata).__name__}")
        for entry in (metadata.storage_data or {}).values():
            if not is_plain(str(getattr(entry, "relative_path", ""))):
                raise CheckpointError(f"{path}: {entry!r} is not in this folder, where all files of a checkpoint are")
        storage = getattr(metadata, "storage_meta", None) or StorageMeta()
        storage.load_id = self.load_id
        metadata.storage_meta = storage
        return metadata
