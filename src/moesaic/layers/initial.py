"""Initial weights that do not depend on how a model is laid over ranks."""

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.layers.blocks import fill_by_position

Model = TypeVar("Model", bound=nn.Module)

aten = torch.ops.aten
# What torch.compile and activation checkpointing put into the names of what they wrap.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
_BY_POSITION: ContextVar[bool] = ContextVar("moesaic_numbers_by_position", default=False)


@torch.no_grad()
def init_weights_(model: Model, *, std: float | None = None, seed: int = 0) -> Model:
    """Give all parameters their initial values, in place. The numbers are the same in every layout.

    Each module sets its own parameters with ``reset_parameters()``. In a transformers model, the model's
    ``_init_weights(module)`` follows. Only the source of the random numbers is different. The number of an element
    depends on ``seed``, on the name and shape of its parameter, and on its place in the parameter. A rank makes only
    the numbers of its shards, in blocks, and no rank communicates. The state of torch's generator has no influence and
    does not change.

    Use it after :func:`moesaic.parallelize` of a model on the meta device. There ``reset_parameters()`` itself is an
    error on CPU: every rank would draw alone, so shards would be equal and copies different.

    Args:
        model: a model on a real device, parallelized or not; or its stages in a pipeline, each of which makes the
            numbers that the whole model would have there. Where two stages share a weight this is collective.
        std: draw all matrices and stacks of matrices from ``normal(0, std)``, and not as their modules do.
        seed: another seed gives other numbers.

    Returns:
        ``model``.

    Raises:
        ValueError: ``std`` is negative, a parameter is on the meta device, no module sets a parameter, or a module
            draws in another way than by ``normal_`` or ``uniform_`` of whole tensors, ``rand`` or ``randn``. The
            message names the parameter or module.

    Example:
        >>> with torch.device("meta"):
        ...     moe = moesaic.MoE(config)
        >>> moe = init_weights_(moesaic.parallelize(moe, meshes), std=0.02, seed=1)
    """
    if std is not None and not std >= 0:
        raise ValueError(f"std: must be at least 0, got {std}")
    if isinstance(model, OfAWhole):
        model.init_parts_(std, seed)
    else:
        init_as_(model, std, seed, {})
    return model


class OfAWhole(nn.Module):
    """Some parts of a model, under names of their own. Numbers go by the names in the whole model."""

    def init_parts_(self, std: float | None, seed: int) -> None:
        """What :func:`init_weights_` does for the whole model."""
        raise NotImplementedError


@torch.no_grad()
def init_as_(model: nn.Module, std: float | None, seed: int, known_as: Mapping[str, str]) -> None:
    """:func:`init_weights_`, for a model in which some parameters are ``known_as`` others, and get their numbers."""
    names: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"model: parameter '{name}' is on the meta device; call parallelize(model, meshes) or "
                "model.to_empty(device=...) first"
            )
        names[parameter] = known_as.get(_clean(name), _clean(name))
    token = _BY_POSITION.set(True)
    try:
        with _NumbersByPosition(names, std, seed) as mode:
            for name, module, owner in _with_owners(model):
                mode.enter_module(_clean(name), type(module).__name__)
                _set_own_parameters(module, owner)
    finally:
        _BY_POSITION.reset(token)
    unset = [name for parameter, name in names.items() if parameter not in mode.written]
    if unset:
        raise ValueError(
            f"model: no module sets {unset}; give the class of the module reset_parameters(), which sets them"
        )


def _clean(name: str) -> str:
    """The name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def reset_checked(module: Any) -> None:
    """``module.reset_parameters()``, unless ranks would draw alone.

    Raises:
        RuntimeError: ranks would draw alone; see :func:`init_weights_`.
    """
    check_generators(module)
    type(module).reset_parameters(module)


def check_generators(module: nn.Module) -> None:
    """Raise ``RuntimeError`` if every rank would draw other random numbers for the module's own parameters."""
    from moesaic.sharding.parts import ranks_draw_alone  # not needed before there are DTensors

    if not _BY_POSITION.get() and any(map(ranks_draw_alone, module.parameters(recurse=False))):
        raise RuntimeError(
            f"reset_parameters() of {type(module).__name__}: its parameters are DTensors on CPU, where every rank "
            "would draw alone, and shards would be equal and copies different; call "
            "moesaic.layers.init_weights_(model, seed=0)"
        )


def _with_owners(module: nn.Module, name: str = "", owner: Any = None) -> Iterator[tuple[str, nn.Module, Any]]:
    """Every module with its name, and the innermost module around it that sets others' parameters, as in transformers.

    Children come first, as in ``module.apply``: a module may set again what they have set.
    """
    owner = module if callable(getattr(module, "_init_weights", None)) else owner
    for child, submodule in module.named_children():
        yield from _with_owners(submodule, f"{name}.{child}".lstrip("."), owner)
    yield name, module, owner


def _set_own_parameters(module: Any, owner: Any) -> None:
    padding = getattr(module, "padding_idx", None) if isinstance(module, nn.Embedding) else None
    if padding is not None:
        module.padding_idx = None  # a row of a sharded weight cannot be set as modules do
    try:
        for reset in ("reset_parameters", "_reset_parameters"):
            if hasattr(type(module), reset):
                getattr(type(module), reset)(module)
        if owner is not None:
            owner._init_weights(module)
    finally:
        if padding is not None:
            module.padding_idx = padding
    if padding is not None:
        local, box = _part(module.weight)
        if box[0].start <= padding < box[0].stop:
            local[padding - box[0].start].zero_()


class _NumbersByPosition(TorchDispatchMode):
    """Makes random operators fill parameters by position.

    Attributes:
        written: the parameters that have been set.
    """

    def __init__(self, names: dict[Tensor, str], std: float | None, seed: int) -> None:
        super().__init__()
        self.written: set[Tensor] = set()
        self._module, self._class, self._draws = "", "", 0
        self._names, self._std, self._seed = names, std, seed
        # Modules may also set `parameter.data`, another tensor with the same memory.
        self._by_memory = {_part(p)[0].data_ptr(): p for p in names if _part(p)[0].numel()}

    def enter_module(self, name: str, class_name: str) -> None:
        """From now on it is this module that sets parameters."""
        self._module, self._class, self._draws = name, class_name, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        into = args[0] if args and isinstance(args[0], Tensor) else None
        target = None if into is None else self._parameter(into)
        if target is not None and func._schema.is_mutable:
            self.written.add(target)
        if torch.Tag.nondeterministic_seeded in func.tags:
            return self._draw(func, into, target, args, kwargs)
        if func == aten.copy_.default and type(args[1]) is Tensor and into is not None and into.shape == args[1].shape:
            # Every rank computed the whole, and keeps its part. DTensors do not mix with others.
            local, box = _part(into)
            local.copy_(args[1][box])
            return into
        return func(*args, **kwargs)

    def _draw(self, func: Any, into: Tensor | None, target: Tensor | None, args: Any, kwargs: Any) -> Tensor:
        draw, arguments = _DRAWS.get(func), args[1:]
        if draw is None or (into is not None and target is None and into._is_view()):
            raise ValueError(
                f"model: '{self._module}' ({self._class}) draws random numbers by {func}, which would differ between "
                "layouts; use only normal_ and uniform_ of whole tensors, rand and randn"
            )
        if into is None:
            into = torch.empty(args[0], **kwargs)
        self._draws += 1
        # What is not a parameter is something that one is computed of.
        name = f"{self._module} {self._draws}" if target is None else self._names[target]
        if self._std is not None and target is not None and target.ndim >= 2:
            draw, arguments = _normal, (0.0, self._std)
        fill_by_position(*_part(into), into.shape, f"{self._seed} {name}", partial(draw, *arguments or (0.0, 1.0)))
        return into

    def _parameter(self, t: Tensor) -> Tensor | None:
        if t in self._names:
            return t
        local, _ = _part(t)
        found = self._by_memory.get(local.data_ptr()) if local.numel() else None
        return found if found is not None and found.shape == t.shape else None


def _part(t: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    from moesaic.sharding.parts import local_part

    return local_part(t)


def _normal(*args: Any) -> None:
    *moments, block, generator = args
    block.normal_(*moments, generator=generator)


def _uniform(*args: Any) -> None:
    *ends, block, generator = args
    block.uniform_(*ends, generator=generator)


_DRAWS = {
    aten.normal_.default: _normal,
    aten.randn.default: _normal,
    aten.uniform_.default: _uniform,
    aten.rand.default: _uniform,
}
