"""What users may do to a model once it is parallelized, and what is refused by name.

Parameters that come later are not laid over the ranks, and nobody would sum their gradients. Copies would share hooks
and process groups with the model. Whole tensors can be loaded: each rank takes its shards of them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from moesaic.layers import MoE
from moesaic.parallel.mesh import Meshes
from moesaic.sharding.parts import local_part, with_part


def guard(model: nn.Module, language_models: list[Any], meshes: Meshes) -> None:
    """Install all of it on a parallelized model, and on the language models in it."""
    owners = {m: frozenset(m._parameters) for m in model.modules() if m._parameters}
    for entry in dict.fromkeys([model, *language_models]):
        entry.register_forward_pre_hook(partial(_refuse_additions, owners), prepend=True)
    for module in dict.fromkeys([model, *language_models, *(m for m in model.modules() if isinstance(m, MoE))]):
        module.__dict__["__deepcopy__"] = module.__dict__["__reduce_ex__"] = _refuse_copies
    for module in dict.fromkeys([*owners, *(m for m in model.modules() if m._buffers)]):
        module.register_load_state_dict_pre_hook(_take_shards)
    for language_model in language_models:
        language_model.resize_token_embeddings = _refuse_to_resize
        if meshes.sequence_parts > 1:
            language_model.generate = partial(_refuse_to_generate, meshes.sequence_axes)
        # transformers then lets ranks that are done wait for the others: every step is a sequence of collectives.
        language_model._is_fsdp_managed_module = True
    if isinstance(model, FSDPModule) and model not in language_models and hasattr(model, "generate"):
        # A wrapper calls its model directly, and FSDP's hooks are on the wrapper.
        register_fsdp_forward_method(model, "generate")


def _refuse_additions(owners: dict[nn.Module, frozenset[str]], model: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for module in model.modules():
        if module._parameters and owners.get(module) != module._parameters.keys():
            name = next(name for name, other in model.named_modules() if other is module)
            raise ValueError(
                f"model: '{name}' ({type(module).__name__}) got parameters after parallelize, which are not laid "
                "over the ranks, and whose gradients nobody would sum; add adapters and other modules before it"
            )


def _refuse_copies(*_: Any) -> NoReturn:
    raise TypeError(
        "model: a parallelized model can be neither copied nor pickled, for it is tied to process groups and hooks. "
        "For a second one parallelize a copy made before, and call its load_state_dict(model.state_dict()); to save it "
        "use torch.distributed.checkpoint or export_pretrained(); for averages of weights keep "
        "[p.detach().clone() for p in model.parameters()]"
    )


def _refuse_to_resize(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "resize_token_embeddings: the model is parallelized, and the new rows would not be laid over the ranks; "
        "call it before parallelize"
    )


def _refuse_to_generate(axes: Sequence[str], *_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        f"generate: with {' and '.join(axes)} > 1 a rank has the logits of its own part of the sequence only; use "
        f"{' and '.join(f'{axis}=1' for axis in axes)}, or "
        "export_pretrained() and generate with plain transformers"
    )


def _take_shards(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Of whole tensors under the names of DTensors, this rank's parts."""
    for name, parameter in {**module._parameters, **module._buffers}.items():
        tensor = state_dict.get(prefix + name)
        if not isinstance(parameter, DTensor) or not isinstance(tensor, Tensor) or isinstance(tensor, DTensor):
            continue
        # torch tells of another shape.
        if tensor.shape == parameter.shape:
            local, box = local_part(parameter)
            state_dict[prefix + name] = with_part(tensor[box].to(local.device).contiguous(), parameter)
