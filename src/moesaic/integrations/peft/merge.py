"""Add adapters to the weights that they are on."""

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesaic.integrations.peft.switch import adapters_of, configs_of, layers_of
from moesaic.layers.packed import PackedWeight
from moesaic.parallel.split import Stages, module_in_whole, whole_of
from moesaic.sharding.parts import local_part


@torch.no_grad()
def merge_adapters(model: nn.Module, name: str = "default") -> None:
    """Add ``scale * a b`` of the adapters of one name to the weights, in place, and take out the adapters of all names.

    Collective on a parallelized model, stage by stage in a pipeline: the factors are gathered, one weight's at a time,
    and each rank adds its part. The model then computes with its weights alone. All of it stays frozen.
    :func:`export_pretrained` writes it.

    Raises:
        ValueError: there are no adapters of this name; or the experts are quantised, and so read-only. Nothing has
            changed then.
    """
    whole: Any = whole_of(model)
    targets = adapters_of(model, name)
    for target in targets:
        packed = [
            weight
            for weight in target.weights
            if isinstance(getattr(whole.get_submodule(target.module), weight), PackedWeight)
        ]
        if packed:
            raise ValueError(
                f"model: '{target.module}.{packed[0]}' is quantised and read-only; save the adapters by "
                "save_adapters(), and merge them into the model that was quantised"
            )
    for target in targets:
        module = module_in_whole(model, target.module)
        if module is None:
            continue  # another stage has it
        scale = target.rank.scale
        if target.link is not None:
            adapter = module.adapters[name]
            for weight in target.weights:
                a, b = adapter.factors(weight)
                _add(getattr(module, weight), _whole(a), scale * _whole(b))
        elif target.is_router:
            _add(module.weight, scale * _whole(module.adapters[name].b), _whole(module.adapters[name].a))
        else:
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            _add(module.base_layer.weight, scale * _whole(b), _whole(a))
    # A stage of dense layers alone has no DTensors.
    parallel = isinstance(model, Stages) or any(isinstance(p, DTensor) for p in model.parameters())
    # Of stages also out of the whole, which says the names.
    for each in dict.fromkeys([model, whole]):
        _take_out(each, parallel)
    configs_of(model).clear()


def _whole(t: Tensor) -> Tensor:
    """All of a factor, in a dtype in which no digit of the product is lost before it is added."""
    t = t.full_tensor() if isinstance(t, DTensor) else t
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _add(weight: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Add ``rows @ columns`` to this rank's part of a weight; of experts, expert by expert."""
    local, box = local_part(weight)
    *experts, of_rows, of_columns = box
    if experts:
        for i, expert in enumerate(range(experts[0].start, experts[0].stop)):
            _add_product(local[i], rows[expert, of_rows], columns[expert][:, of_columns])
    elif local.numel():
        _add_product(local, rows[of_rows], columns[:, of_columns])


def _add_product(weight: Tensor, rows: Tensor, columns: Tensor) -> None:
    dtype = torch.promote_types(weight.dtype, rows.dtype)
    weight.copy_(weight.to(dtype) + rows.to(dtype) @ columns.to(dtype))


def _take_out(model: nn.Module, parallel: bool) -> None:
    names = {module: name for name, module in model.named_modules()}
    for layer in layers_of(model):
        if not isinstance(layer, lora.LoraLayer):
            layer.adapters = layer.active_adapter = None
        elif parallel:
            # It stays around its layer, for the plan's functions are on it. Without factors it passes on what it gets.
            layer.enable_adapters(False)
            for factors in (layer.lora_A, layer.lora_B):
                factors.clear()
        else:
            parent, _, child = names[layer].rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
