"""Muon: momentum, orthogonalised; for the matrices of experts too, wherever their parts lie."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from moesaic import ranks
from moesaic.ops.arguments import check_int
from moesaic.optim.holders import groups_of_meshes, placement_problem
from moesaic.optim.newton_schulz import COEFFICIENTS, Coefficients, orthogonalize
from moesaic.optim.shares import Bucket, share_out, through_owners
from moesaic.sharding.parts import local_part

AdjustLR = Literal["original", "match_rms_adamw"]
_ADJUST: dict[str, Callable[[int, int], float]] = {
    "original": lambda out, into: math.sqrt(max(1, out / into)),
    "match_rms_adamw": lambda out, into: 0.2 * math.sqrt(max(out, into)),
}
# Those of fp16 overflow.
_NS_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


class Muon(Optimizer):
    """Muon for matrices, experts' among them, and AdamW for other parameters.

    A step, with gradient ``g`` and momentum ``m`` (zero at first), of each matrix by itself::

        m <- mu m + (1 - mu) g
        u = (1 - mu) g + mu m          (without nesterov: m)
        w <- (1 - lr weight_decay) w - lr adjust(w) orthogonal(u)

    where ``orthogonal(U S V^T)`` is about ``U V^T``, by ``ns_steps`` Newton-Schulz iterations. ``adjust(w)`` is
    ``sqrt(max(1, out / in))`` for ``"original"``, and ``0.2 sqrt(max(out, in))`` for ``"match_rms_adamw"``, with which
    updates are as large as those of AdamW, and learning rate and weight decay may be AdamW's. From Jordan (2024,
    https://kellerjordan.github.io/posts/muon) and Moonlight (arXiv 2502.16982). With 2-D parameters the numbers are
    those of ``torch.optim.Muon``, within rounding.

    A 2-D parameter is one matrix ``[out, in]``, as in ``nn.Linear``. A 3-D parameter ``[E, in, out]`` is E matrices, as
    in :class:`moesaic.GroupedExperts`. All matrices of one shape go through each product together.

    Parameters may be DTensors: over ep, etp, tp and FSDP, in any combination, uneven too. Where a matrix lies whole on
    one rank, that rank orthogonalises it. Where several ranks have parts or copies, one of them does: parts travel to
    it and the result back, in ``ns_dtype``, and no two ranks do the same work. ``step()`` is then collective: all
    ranks call it, with gradients for the same parameters. Plain tensors are this process's own.

    Groups with ``"algorithm": "adamw"`` are stepped by ``torch.optim.AdamW``, and may have its other options. So one
    optimizer has all parameters, and one state for checkpoints. :func:`moesaic.optim.param_groups` makes the groups.

    Args:
        params: parameters or groups.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        momentum: ``mu``.
        nesterov: look one step ahead.
        ns_coefficients: ``(a, b, c)`` of the iteration.
        eps: the least norm that a matrix is divided by.
        ns_steps: number of iterations.
        adjust_lr_fn: ``"original"`` or ``"match_rms_adamw"``; None is ``"original"``.
        ns_dtype: the dtype of the iteration, and of what travels. bf16 is enough, and what ``torch.optim.Muon`` has;
            on processors without bf16 products fp32 is faster.
        betas: of AdamW.

    Raises:
        TypeError, ValueError: an option that cannot be; a parameter of another number of dims, that is not of real
            numbers, or whose parts are no blocks of a matrix, by its place in the groups. In a step: ranks that have
            gradients for different parameters, or other options, on all ranks of the parameters, when they first have.

    Example:
        >>> optimizer = moesaic.optim.Muon(moesaic.optim.param_groups(model), lr=3e-4, adjust_lr_fn="match_rms_adamw")
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: AdjustLR | None = None,
        *,
        ns_dtype: torch.dtype = torch.bfloat16,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        defaults = {
            "algorithm": "muon",
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
        }
        _check_options(defaults, "")
        # For one element, since torch has no list of the options of AdamW.
        self._of_adamw = AdamW([torch.zeros(1)], lr=lr, betas=betas, weight_decay=weight_decay).defaults
        self._forget()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own."""
        algorithm = param_group.get("algorithm", "muon")
        if algorithm not in ("muon", "adamw"):
            raise ValueError(f"algorithm: a group has {algorithm!r}; choose 'muon' or 'adamw'")
        if algorithm == "adamw":
            for name, value in self._of_adamw.items():
                param_group.setdefault(name, value)
        super().add_param_group(param_group)
        if algorithm == "muon":
            where = f" of group {len(self.param_groups) - 1}"
            try:
                _check_options(self.param_groups[-1], where)
                for number, parameter in enumerate(self.param_groups[-1]["params"]):
                    _check_parameter(parameter, f"params: parameter {number}{where}")
            except (TypeError, ValueError):
                self.param_groups.pop()
                raise
        self._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """What was worked out for the groups as they were."""
        self._adamw: AdamW | None = None
        self._buckets: dict[tuple[int, ...], list[Bucket]] = {}
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyrefly: ignore [bad-override]
        """Change all parameters that have a gradient. Collective where parameters are DTensors.

        Returns:
            What ``closure()`` returns, which is called first, with gradients; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            if group["algorithm"] == "muon":
                self._step_muon(number, group)
        self._step_adamw()
        return loss

    def _step_adamw(self) -> None:
        groups = [group for group in self.param_groups if group["algorithm"] == "adamw"]
        if not groups:
            return
        if self._adamw is None:
            self._adamw = AdamW(groups)
        # Its groups and its state are ours, whatever has been loaded since.
        self._adamw.param_groups, self._adamw.state = groups, self.state
        self._adamw.step()

    def _step_muon(self, number: int, group: dict[str, Any]) -> None:
        parameters = group["params"]
        present = tuple(i for i, parameter in enumerate(parameters) if parameter.grad is not None)
        buckets = self._buckets_of(number, present, group)
        if not present:
            return
        momenta, gradients = {}, {}
        for i in present:
            gradient, state = _gradient(parameters[i]), self.state[parameters[i]]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
            gradients[i], momenta[i] = local_part(gradient)[0], local_part(state["momentum_buffer"])[0]
        torch._foreach_lerp_(list(momenta.values()), list(gradients.values()), 1 - group["momentum"])
        lr = float(group["lr"])
        if lr == 0:
            return
        options = {name: group[name] for name in ("ns_coefficients", "ns_steps", "eps")}
        for bucket in buckets:
            updates = {
                place: _of_three_dims(_update(gradients[i], momenta[i], group))
                for place in bucket.parameters
                for i in [present[place]]
            }
            for span, result in through_owners(bucket, updates, partial(_orthogonalize, options)):
                parameter = parameters[present[span.parameter]]
                part = _of_three_dims(local_part(parameter.detach())[0])[span.first : span.last]
                part.mul_(1 - lr * group["weight_decay"])
                part.add_(result, alpha=-lr * _adjustment(parameter, group["adjust_lr_fn"]))

    def _buckets_of(self, number: int, present: tuple[int, ...], group: dict[str, Any]) -> list[Bucket]:
        key = (number, *present)
        if key not in self._buckets:
            options = {name: value for name, value in group.items() if name != "params"}
            shapes = [tuple(parameter.shape) for parameter in group["params"]]
            said = {"gradients": present, "shapes": shapes, **options}
            for members in groups_of_meshes(group["params"], self._groups):
                _check_alike(number, ranks.gather(said, members))
            self._buckets[key] = share_out([group["params"][i] for i in present], self._groups)
        return self._buckets[key]


def _check_alike(number: int, everyone: list[dict[str, Any]]) -> None:
    """Raise the same error on all ranks of some parameters where a step would not be the same on them."""
    for rank, theirs in enumerate(everyone):
        differing = [name for name in {**everyone[0], **theirs} if everyone[0].get(name) != theirs.get(name)]
        if differing:
            name = differing[0]
            first, other = everyone[0].get(name), theirs.get(name)
            if name == "gradients":
                has, other_has = {*everyone[0][name]}, {*theirs[name]}
                first, other = sorted(has - other_has), sorted(other_has - has)
                name = "gradients for different parameters: their numbers, where only one rank has one,"
            raise ValueError(
                f"group {number}: ranks 0 and {rank} of its meshes have different {name} {first} and {other}; call "
                "step() on all ranks with the same groups, after the same backward passes"
            )


def _check_options(group: dict[str, Any], where: str) -> None:
    for name in ("lr", "weight_decay", "momentum", "eps"):
        if not 0 <= float(group[name]) < math.inf:
            raise ValueError(f"{name}{where}: must be a number, 0 or more, got {group[name]}")
    if len(group["ns_coefficients"]) != 3:
        raise ValueError(f"ns_coefficients{where}: expected three numbers, got {group['ns_coefficients']}")
    check_int(f"ns_steps{where}", group["ns_steps"])
    if not 0 <= group["ns_steps"] < 100:
        raise ValueError(f"ns_steps{where}: must be 0 or more and below 100, got {group['ns_steps']}")
    if group["adjust_lr_fn"] not in (None, *_ADJUST):
        raise ValueError(f"adjust_lr_fn{where}: got {group['adjust_lr_fn']!r}; choose one of {[*_ADJUST]}, or None")
    if group["ns_dtype"] not in _NS_DTYPES:
        raise ValueError(f"ns_dtype{where}: got {group['ns_dtype']}; choose one of {[*_NS_DTYPES]}")


def _check_parameter(parameter: Tensor, where: str) -> None:
    what = f"{where}, of shape {list(parameter.shape)},"
    elsewhere = "let AdamW have it: moesaic.optim.param_groups(model) makes the groups"
    if parameter.ndim not in (2, 3):
        raise ValueError(f"{what} is no matrix [out, in] and no stack of them [E, in, out]; {elsewhere}")
    if not parameter.is_floating_point():
        raise TypeError(f"{what} is {parameter.dtype}, not of real numbers; {elsewhere}")
    if isinstance(parameter, DTensor) and (problem := placement_problem(parameter)) is not None:
        raise ValueError(f"{what} {problem}; redistribute it, or {elsewhere}")


def _gradient(parameter: Tensor) -> Tensor:
    """The gradient, laid out as the parameter."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse:
        raise RuntimeError("Muon takes no sparse gradients; use nn.Embedding(sparse=False), and AdamW for embeddings")
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor) and gradient.placements != parameter.placements:
        return gradient.redistribute(placements=parameter.placements)
    return gradient


def _update(gradient: Tensor, momentum: Tensor, group: dict[str, Any]) -> Tensor:
    update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
    return update.to(group["ns_dtype"])


def _orthogonalize(options: dict[str, Any], x_BMN: Tensor) -> Tensor:
    return orthogonalize(x_BMN, coefficients=options["ns_coefficients"], steps=options["ns_steps"], eps=options["eps"])


def _adjustment(parameter: Tensor, name: str | None) -> float:
    out, into = parameter.shape if parameter.ndim == 2 else (parameter.shape[2], parameter.shape[1])
    return _ADJUST[name or "original"](out, into)


def _of_three_dims(t: Tensor) -> Tensor:
    return t if t.ndim == 3 else t.unsqueeze(0)
