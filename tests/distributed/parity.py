"""Compare a parallel run with the one-process run: outputs, losses, every gradient, and the weights that follow."""

import functools
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import moesaic
from moesaic.parallel import Meshes
from moesaic.parallel.mesh import View, resolve_layout

# Design: every gradient equals the one-process fp32 gradient within this, relative in norm.
TOLERANCE = 1e-5


def whole(t: Tensor) -> Tensor:
    """The global value of a DTensor, without its graph."""
    t = t.detach()
    return t.full_tensor() if isinstance(t, DTensor) else t


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Relative in the 2-norm; what is zero has to be zero."""
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    assert bool(actual.isfinite().all()), f"{name}: not finite"
    scale = expected.norm().item()
    error = (actual - expected).norm().item()
    assert error <= tolerance * scale, f"{name}: error {error:.3g} of {scale:.3g}, {error / max(scale, 1e-30):.3g}"


def assert_gradients_close(model: nn.Module, expected: Mapping[str, Tensor], when: str = "") -> None:
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient is not None, f"{name}: no gradient"
        assert_close(f"gradient of {name}{when}", whole(gradient), expected[name])


def assert_weights_close(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert_close(f"weight {name}", whole(parameter), expected[name])


def legal_layouts(world_size: int) -> list[dict[str, int]]:
    """Every (dp, tp, ep, etp) of a world size, HSDP where there are ranks for it."""
    divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
    dense = [
        {"tp": tp, "dp_replicate": replicate}
        for tp in divisors
        for replicate in divisors
        if world_size % (tp * replicate) == 0 and replicate in (1, 2)
    ]
    expert = [{"ep": ep, "etp": etp} for ep in divisors for etp in divisors if world_size % (ep * etp) == 0]
    # HSDP changes how dense gradients are reduced, which the expert view has no part in: one expert layout is enough.
    return [d | e for d in dense for e in expert if d["dp_replicate"] == 1 or e == expert[-1]]


def meshes_of(layout: Mapping[str, int]) -> Meshes:
    """The meshes of a layout on CPU. Layouts share each mesh that they have in common: its groups are made once."""
    sizes = resolve_layout(dist.get_world_size(), **layout)
    views: tuple[View, ...] = ("dense", "expert")
    return Meshes(sizes, {view: _mesh(tuple(sizes.of_view(view).items())) for view in views})


@functools.cache
def _mesh(sizes: tuple[tuple[str, int], ...]) -> DeviceMesh:
    names, shape = zip(*sizes, strict=True)
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def clip(model: nn.Module, max_norm: float) -> Tensor:
    """As a check asks for it."""
    return moesaic.clip_grad_norm_(model.parameters(), max_norm)


class LocalAdamW:
    """AdamW on the local shards: the same numbers, without DTensor's propagation for every elementwise operation."""

    def __init__(self, parameters: Iterable[nn.Parameter], **options: float):
        self._parameters = list(parameters)
        self._locals = [nn.Parameter(_local(p.detach())) for p in self._parameters]
        self._optimizer = torch.optim.AdamW(self._locals, **options)

    def step(self) -> None:
        for p, local in zip(self._parameters, self._locals, strict=True):
            assert p.grad is not None
            if isinstance(p, DTensor):
                assert isinstance(p.grad, DTensor)
                assert p.grad.placements == p.placements
            local.grad = _local(p.grad)
        self._optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self._parameters:
            p.grad = None


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t
