"""What a check is made of, and what one process or rank saw."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.testing.layout import Layout
from moesaic.testing.routing import Choice

# A part of a tensor: for each dim the indices that a rank has, or None for all of them.
Index = tuple[Tensor | None, ...]


@dataclass(frozen=True, kw_only=True)
class Check:
    """What is compared with what. All functions have to be importable by name: the ranks import them.

    Attributes:
        build: makes the model, the same in every process. It is called after ``torch.manual_seed(0)``.
        inputs: ``inputs(rank, layout)`` is the batch of a rank: keyword arguments of the model as a mapping, or
            positional ones as a tuple, or one tensor; a list of those has one batch for each step.
            ``inputs(0, Layout())`` is the whole batch, for the one process. Floating tensors are inputs whose gradient
            is compared.
        parallelize: ``parallelize(model, layout)`` lays the model over the ranks, and returns it, or None if it did so
            in place. Process groups, meshes and wrappers are its business.
        layouts: the layouts, each a mapping of axes to sizes; see :class:`Layout`.
        loss: ``loss(model, batch)``, a scalar; or a mapping of names to the terms of a sum, which lets a term that is
            counted twice be named. By default the ``.loss`` of the model's output, and its ``aux_loss`` apart.
        backward: ``backward(model, batch, layout)``, for ranks alone: forward and backward as your trainer does them,
            with its accumulation and synchronisation. Returns the loss. By default ``loss`` and its ``backward()``.
        clip: ``clip(model, max_norm)`` as your trainer clips, for ranks alone; returns the norm, or None. The one
            process uses torch's ``clip_grad_norm_``. Without it nothing is clipped and no norm is compared.
        optimizer: makes the optimizer from a list of parameters; by default ``SGD(lr=0.1, foreach=False)``.
        after_step: ``after_step(model)`` after every optimizer step, such as an update of a router's bias.
        where: ``where(name, rank, layout)`` says of which parameter of the one process this rank's parameter ``name``
            is, and which part: ``(name, index)``, the index a tuple of slices. None leaves the parameter to the search,
            which finds parts by their initial values.
        steps: number of optimizer steps.
        dtype: to which the model is cast; None leaves it as it was built.
        exact: the dtype of the one process; ``torch.float32`` where a kernel refuses fp64. Then rounding errors that
            all runs in fp32 have in common are not seen.
        world: number of ranks of every layout, where that is not the least that its axes allow.
        timeout_s: after this many seconds without an answer a layout counts as hung.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, Layout], Any]
    parallelize: Callable[[nn.Module, Layout], nn.Module | None]
    layouts: Sequence[Mapping[str, int]] = ()
    loss: Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]] | None = None
    backward: Callable[[nn.Module, Any, Layout], Tensor] | None = None
    clip: Callable[[nn.Module, float], Tensor | float | None] | None = None
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None
    after_step: Callable[[nn.Module], object] | None = None
    where: Callable[[str, int, Layout], tuple[str, tuple[slice, ...]] | None] | None = None
    steps: int = 1
    dtype: torch.dtype | None = torch.float32
    exact: torch.dtype = torch.float64
    world: int | None = None
    timeout_s: float = 60.0


@dataclass
class Step:
    """What one step left behind, all of it detached and copied."""

    loss: Tensor
    output: Tensor | None
    inputs: dict[str, Tensor]
    input_grads: dict[str, Tensor | None]
    grads: dict[str, Tensor | None]
    norm: Tensor | None = None
    # Gradients of each term of the loss; of the one process alone.
    by_term: dict[str, dict[str, Tensor | None]] = field(default_factory=dict)


@dataclass
class Run:
    """What a process or rank saw from the first weights to the last.

    Attributes:
        initial, final: weights before and after.
        steps: one for each optimizer step.
        buffers: after the last step.
        layers: outputs of modules in the first step, by name and call, in the order in which they were done.
        entering: gradients that these modules give for their first input, by the same names.
        choices: those of ``topk``, for each step.
        dropouts: digests of the input and the mask of each dropout of the first step.
        flips: tokens whose choice was taken from the other run.
        meshes: the ranks that each axis of a mesh of a parameter joins.
    """

    initial: dict[str, Tensor] = field(default_factory=dict)
    final: dict[str, Tensor] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, Tensor] = field(default_factory=dict)
    entering: dict[str, Tensor] = field(default_factory=dict)
    choices: list[list[Choice]] = field(default_factory=list)
    dropouts: list[tuple[str, str]] = field(default_factory=list)
    flips: int = 0
    meshes: dict[str, list[list[int]]] = field(default_factory=dict)
