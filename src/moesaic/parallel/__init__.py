"""Parallel plans: MoE layers and the models around them, laid over device meshes."""

from moesaic.parallel.accumulate import no_sync
from moesaic.parallel.build import build_meshes
from moesaic.parallel.capacity import most_copies, skip_overflowed_steps
from moesaic.parallel.gradients import clip_grad_norm_
from moesaic.parallel.mesh import Meshes, MeshLayout, resolve_layout
from moesaic.parallel.plan import parallelize
from moesaic.parallel.tuning import tune_kernels

__all__ = [
    "MeshLayout",
    "Meshes",
    "build_meshes",
    "clip_grad_norm_",
    "most_copies",
    "no_sync",
    "parallelize",
    "resolve_layout",
    "skip_overflowed_steps",
    "tune_kernels",
]
