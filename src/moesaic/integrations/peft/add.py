"""Put the adapters of a config of peft into a model with our layers."""

import math
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesaic.integrations.peft.switch import adapters_of, configs_of, set_adapter
from moesaic.integrations.peft.targets import Target, targets_of
from moesaic.layers.blocks import fill_by_position
from moesaic.layers.dropout import KeyedDropout
from moesaic.layers.lora import ExpertsAdapter, RouterAdapter, add_adapter
from moesaic.parallel.split import Stages, module_in_whole
from moesaic.sharding.parts import local_part

Model = TypeVar("Model", bound=nn.Module)


def add_adapters(model: Model, config: Any, name: str = "default", *, seed: int = 0) -> Model:
    """Put low-rank adapters into a model that :func:`swap_moe` has changed, in place, and freeze the rest.

    The config names modules and parameters as for the model before the swap, and the model then computes what
    ``peft.get_peft_model`` makes of that one. Adapters of linear layers are peft's own. Those of experts and routers
    (``target_parameters``) are ours: :mod:`moesaic.layers.lora`. Call this before :func:`moesaic.parallelize`, which
    takes models with adapters in every layout.

    The new adapters are active, and the others keep their numbers and are frozen. Factors ``a`` are drawn as in peft,
    but each number depends on ``seed`` and on its place alone; factors ``b`` are zero. Adapters of a model in half
    precision are fp32, as in peft.

    Args:
        model: a transformers model with our layers, not yet cut into stages nor parallelized. It may be on the meta
            device.
        config: a ``peft.LoraConfig`` with ``target_modules``, ``target_parameters``, or both, for instance
            ``target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]``. Also ``r``, ``lora_alpha``,
            ``use_rslora``, patterns of both, and what chooses layers. ``lora_dropout`` is for experts and routers too,
            where peft itself refuses it. Its masks do not depend on the layout: :mod:`moesaic.layers.dropout`.
        name: of these adapters.
        seed: another seed gives other numbers.

    Returns:
        ``model``.

    Raises:
        TypeError: ``config`` is no ``LoraConfig``.
        ValueError: nothing is adapted, or something that cannot be; the model is cut or parallelized; or there are
            adapters of this name. Nothing has changed then.

    Example:
        >>> experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        >>> config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], target_parameters=experts)
        >>> model = parallelize(add_adapters(swap_moe(model), config), meshes)
    """
    if isinstance(model, Stages):
        raise ValueError("model: it has been cut into stages; call add_adapters before split_into_stages")
    placed = next((n for n, p in model.named_parameters() if isinstance(p, DTensor)), None)
    if placed is not None:
        raise ValueError(f"model: '{placed}' is a DTensor; call add_adapters before you shard the model")
    if name in configs_of(model):
        raise ValueError(f"name: the model has adapters {name!r} already; choose another name")
    targets, kept = targets_of(model, config)
    of_experts: dict[str, list[Target]] = {}
    for target in targets:
        if target.link is not None:
            of_experts.setdefault(target.module, []).append(target)
        elif target.is_router:
            router: Any = model.get_submodule(target.module)
            adapter = RouterAdapter(router, target.rank, dropout=config.lora_dropout, dtype=_dtype(router.weight))
            add_adapter(router, name, adapter)
        else:
            _wrap_linear(model, target, name, kept)
    for path, of_one in of_experts.items():
        experts: Any = model.get_submodule(path)
        ranks = {weight: target.rank for target in of_one for weight in target.weights}
        ranks = {weight: ranks[weight] for weight in ("w1", "w3", "w2") if weight in ranks}
        # One weight of the block, so one factor for both of ours.
        share = any(target.weights == ("w1", "w3") for target in of_one)
        options: dict[str, Any] = {"share": share, "dropout": config.lora_dropout, "dtype": _dtype(experts.w1)}
        add_adapter(experts, name, ExpertsAdapter(experts, ranks, **options))
    configs_of(model)[name] = kept
    if not any(p.is_meta for p in model.parameters()):
        reset_adapters(model, name, seed)
    set_adapter(model, name)
    return model


def _dtype(weight: Any) -> torch.dtype:
    """That of an adapter. A quantised weight has the dtype that it had before."""
    return torch.promote_types(weight.dtype, torch.float32)


def _wrap_linear(model: nn.Module, target: Target, name: str, config: Any) -> None:
    linear: Any = model.get_submodule(target.module)
    options: dict[str, Any] = {"r": target.rank.r, "lora_alpha": target.alpha, "config": config}
    with linear.weight.device:
        if isinstance(linear, lora.Linear):
            linear.update_layer(name, **options)
        else:
            parent, _, child = target.module.rpartition(".")
            linear = lora.Linear(linear, name, **options)
            setattr(model.get_submodule(parent), child, linear)
    if config.lora_dropout:
        linear.lora_dropout[name] = KeyedDropout(config.lora_dropout)
    linear.lora_A[name].to(_dtype(linear.weight))
    linear.lora_B[name].to(_dtype(linear.weight))


def factors_of(model: nn.Module, target: Target, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of one adapter, each with what it is called in the key of random numbers.

    None where another stage has the module.
    """
    module = module_in_whole(model, target.module)
    if module is None:
        return
    if target.link is not None or target.is_router:
        for factor, parameter in module.adapters[name].named_parameters():
            if target.is_router or factor[:2] in target.weights:
                yield factor, parameter
    else:
        yield "lora_a", module.lora_A[name].weight
        yield "lora_b", module.lora_B[name].weight


@torch.no_grad()
def reset_adapters(model: nn.Module, name: str, seed: int) -> None:
    """Give adapters their first numbers, in place. No rank communicates."""
    for target in adapters_of(model, name):
        for factor, parameter in factors_of(model, target, name):
            local, box = local_part(parameter)
            if factor[-1] == "b":
                local.zero_()
                continue
            # Of experts the dim before the last is that of the rows that the factor is applied to.
            bound = 1 / math.sqrt(parameter.shape[-2 if parameter.ndim == 3 else -1])

            def draw(t: Tensor, generator: torch.Generator, bound: float = bound) -> Tensor:
                return t.uniform_(-bound, bound, generator=generator)

            fill_by_position(local, box, parameter.shape, f"{seed} {target.key} {factor}", draw)
