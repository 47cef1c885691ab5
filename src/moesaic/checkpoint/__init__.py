"""Crash-safe, verified checkpoints of sharded training state, on torch.distributed.checkpoint.

A checkpoint is a folder `step-00000100`. It gets that name in one rename, after all ranks have written, flushed and
hashed their files. So a folder with such a name is complete, and a crash never leaves half of one.
Reading checks the hashes first. Layouts may differ between writing and reading.
"""

from moesaic.checkpoint.background import wait
from moesaic.checkpoint.folder import CheckpointError, Manifest, checkpoints, latest, read_manifest
from moesaic.checkpoint.state import restore, training_state
from moesaic.checkpoint.store import load, save

__all__ = [
    "CheckpointError",
    "Manifest",
    "checkpoints",
    "latest",
    "load",
    "read_manifest",
    "restore",
    "save",
    "training_state",
    "wait",
]
