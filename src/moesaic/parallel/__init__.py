"""Parallel plans: MoE layers and the models around them, laid over device meshes."""

from moesaic.parallel.accumulate import no_sync
from moesaic.parallel.build import build_meshes
from moesaic.parallel.capacity import most_copies, skip_overflowed_steps
from moesaic.parallel.gradients import clip_grad_norm_
from moesaic.parallel.mesh import Meshes, MeshLayout, resolve_layout
from moesaic.parallel.pipeline import Pipeline
from moesaic.parallel.plan import parallelize
from moesaic.parallel.split import PipelineConfig, Stages, split_into_stages
from moesaic.parallel.tuning import tune_kernels

__all__ = [
    "MeshLayout",
    "Meshes",
    "Pipeline",
    "PipelineConfig",
    "Stages",
    "build_meshes",
    "clip_grad_norm_",
    "most_copies",
    "no_sync",
    "parallelize",
    "resolve_layout",
    "skip_overflowed_steps",
    "split_into_stages",
    "tune_kernels",
]
