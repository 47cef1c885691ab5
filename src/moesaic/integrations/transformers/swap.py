"""Replace the MoE blocks of a transformers model by :class:`moesaic.MoE` layers, and put the blocks back.

No number changes, and no tensor is left out. A block is refused by name if the layer has no place for one of its
tensors, or if it lacks a tensor of the layer.
"""

from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesaic.integrations.transformers import context, hooks, masks, methods, router_logits
from moesaic.integrations.transformers.activations import activation_name
from moesaic.integrations.transformers.export import check_not_quantised
from moesaic.integrations.transformers.families import FAMILIES, Family, family_of, why_not
from moesaic.integrations.transformers.links import Link, without_numbers
from moesaic.integrations.transformers.origin import Origin, origin_of
from moesaic.integrations.transformers.plain import has_adapters
from moesaic.layers import MoE, MoEConfig
from moesaic.ops import Activation, Implementation
from moesaic.parallel.meta import refuse_offloaded

Model = TypeVar("Model", bound=nn.Module)
Balance = Literal["batch", "sequence", "pooled"]


class _Swap(NamedTuple):
    name: str
    block: nn.Module
    family: Family
    config: MoEConfig


def swap_moe(
    model: Model,
    *,
    aux_loss_coef: float | None = None,
    aux_loss: Balance = "batch",
    z_loss_coef: float = 0.0,
    bias_update_speed: float = 0.0,
    impl: Implementation | None = None,
) -> Model:
    """Replace the MoE blocks of a transformers model by :class:`moesaic.MoE`, in place, with their weights and routing.

    The model computes what it did before, up to rounding. In half precision our gate computes scores in fp32, and some
    of theirs do not. ``save_pretrained`` still writes the original names and layouts, also when transformers'
    ``Trainer`` calls it. ``load_state_dict`` still takes them. Hooks on the forward and backward passes of a block stay
    on its layer. Call this function before you make the optimizer, and
    before :func:`moesaic.parallelize`. To go back, use :func:`unswap_moe` in memory, or :func:`export_pretrained` to
    disk, which takes parallelized models too.

    Args:
        model: a model of transformers: also a classifier, a bare model or a class of your own. Or a model of peft
            around one, whose adapters are outside of the blocks. If it is on the meta device, the layers are there too.
            ``docs/transformers.md`` lists the families.
        aux_loss_coef, z_loss_coef: coefficients of the balance losses. :func:`moesaic.balance_losses` collects them.
            If ``aux_loss_coef`` is None the config decides, as in transformers: if it sets ``output_router_logits``,
            the loss of labels has ``router_aux_loss_coef`` times a loss over all layers, and otherwise nothing. A
            number replaces ``router_aux_loss_coef``: the loss of labels then has no balance loss.
        aux_loss: what ``aux_loss_coef`` is for. ``"batch"`` and ``"sequence"`` are losses of each layer, see
            :class:`moesaic.MoEConfig`. ``"pooled"`` is transformers' one loss over all layers
            (:func:`moesaic.layers.pooled_balance.pooled_balance_loss`).
        bias_update_speed: for families with a correction bias on the scores; see
            :func:`moesaic.layers.update_expert_bias`.
        impl: implementation of the operators; None picks one by device and dtype.

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no block to replace, or a block that the layer cannot replace, which the message
            names; or it is sharded; or ``aux_loss`` is unknown or does not fit the model. Nothing has changed then.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("path/to/model")
        >>> model = swap_moe(model)
    """
    _check_model(model)
    if aux_loss not in get_args(Balance):
        raise ValueError(f"aux_loss: got {aux_loss!r}; choose one of {get_args(Balance)}")
    options = {
        "aux_loss_coef": aux_loss_coef or 0.0,
        "aux_loss": "batch" if aux_loss == "pooled" else aux_loss,
        "z_loss_coef": z_loss_coef,
        "bias_update_speed": bias_update_speed,
    }
    swaps = []
    for name, block in model.named_modules():
        if (family := family_of(block)) is not None:
            try:
                _check_block(block)
                config = _config(block, family, options)
                if aux_loss == "pooled":
                    config = replace(config, aux_loss_coef=0.0)
                _check_tensors(block, family, config)
            except ValueError as error:
                raise ValueError(f"model: '{name}' ({type(block).__name__}): {error}") from error
            swaps.append(_Swap(name, block, family, config))
    _check_all_are_known(model, swaps)
    if aux_loss == "pooled" and len(sizes := {swap.config.num_experts for swap in swaps}) > 1:
        raise ValueError(f"aux_loss: 'pooled' needs layers of one number of experts, and these have {sorted(sizes)}")
    methods.check_names(model)
    std = _initial_std(model)
    for swap in swaps:
        parent, _, child = swap.name.rpartition(".")
        layer = _layer_for(swap, impl)
        if std is not None:
            # For new weights, as transformers would draw those of the block.
            layer.experts.init_std = layer.router.init_std = std
        setattr(model.get_submodule(parent), child, layer)
    methods.install(model)
    # Its hooks come first, so that each of them that begins a call also ends it, whatever another one raises.
    router_logits.install(model, aux_loss_coef, aux_loss == "pooled")
    masks.install(model)
    context.install(model)
    return model


def _initial_std(model: Any) -> float | None:
    config = getattr(model, "config", None)
    std = None if config is None else getattr(config.get_text_config(), "initializer_range", None)
    return std if isinstance(std, float) else None


def unswap_moe(model: Model) -> Model:
    """Put the blocks back that :func:`swap_moe` took out, in place, with the weights that the layers have now.

    Names, shapes and dtypes are those from before the swap. The router's counts and all gradients are dropped.

    Raises:
        ValueError: the model has no swapped layer, it is parallelized, or its experts are quantised. Nothing has
            changed then.

    Example:
        >>> keys = list(model.state_dict())
        >>> list(unswap_moe(swap_moe(model)).state_dict()) == keys
        True
    """
    layers = [(name, module, origin) for name, module in model.named_modules() if (origin := origin_of(module))]
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no layer that swap_moe made")
    check_not_quantised(model)
    for name, layer, _ in layers:
        if any(isinstance(p, DTensor) for p in layer.parameters()):
            raise ValueError(f"model: '{name}' is parallelized; use export_pretrained() to write the original layout")
    for name, layer, origin in layers:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _block_for(layer, origin))
    methods.remove(model)
    context.remove(model)
    masks.remove(model)
    router_logits.remove(model)
    return model


class _PairMoE(MoE):
    """For decoder layers that expect a pair of output and router results, and drop the latter."""

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x, token_mask), None


def _check_model(model: nn.Module) -> None:
    refuse_offloaded(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, DTensor):
            raise ValueError(f"model: '{name}' is a DTensor; call swap_moe before you shard the model")


def _check_block(block: nn.Module) -> None:
    if has_adapters(block):
        raise ValueError("adapters wrap parts of it; add them after swap_moe, or merge them first")
    hooks.check(block)


def _check_all_are_known(model: nn.Module, swaps: list[_Swap]) -> None:
    inside = {module for swap in swaps for module in swap.block.modules()}
    # transformers' experts interface leaves this attribute on every module that uses it.
    unknown = {type(m) for m in model.modules() if hasattr(m, "has_post_expert_norm") and m not in inside}
    if unknown:
        reason = next((f": {reason}" for cls in unknown if (reason := why_not(cls))), "")
        raise ValueError(
            f"model: moesaic.MoE cannot replace the blocks with {', '.join(sorted(c.__name__ for c in unknown))} in "
            f'{type(model).__name__}{reason}; use register() and experts_implementation="moesaic" to run them on our '
            "kernels"
        )
    if not swaps:
        known = sorted(place.rpartition(":")[2] for place in FAMILIES)
        raise ValueError(f"model: {type(model).__name__} has no MoE block; moesaic.MoE replaces {', '.join(known)}")


def _config(block: Any, family: Family, options: dict[str, Any]) -> MoEConfig:
    fields = family.fields(block)
    activation = fields.pop("activation", None) or activation_name(block.experts.act_fn)
    if activation is None:
        raise ValueError(f"hidden_act: moesaic.MoE does not have the activation {type(block.experts.act_fn).__name__}")
    if fields.get("shared_hidden_dim"):
        fields["shared_activation"] = _shared_activation(block)
    first = next(link for link in family.links if "experts.w1" in link.ours)
    E, D, F = first.split(block.get_parameter(first.theirs))[0].shape
    if (speed := options["bias_update_speed"]) and not fields.get("score_bias"):
        raise ValueError(f"bias_update_speed: got {speed}, but the router has no bias; leave it at 0")
    return MoEConfig(dim=D, hidden_dim=F, num_experts=E, activation=activation, **options, **fields)


def _shared_activation(block: Any) -> Activation:
    names = ("shared_experts", "shared_expert", "shared_mlp")
    dense: Any = next(getattr(block, name) for name in names if hasattr(block, name))
    function = dense.act_fn if hasattr(dense, "act_fn") else dense.activation_fn
    if (name := activation_name(function)) is None:
        raise ValueError(
            f"hidden_act: moesaic.MoE does not have the activation {type(function).__name__} of the shared expert"
        )
    return name


def _check_tensors(block: nn.Module, family: Family, config: MoEConfig) -> None:
    """Raise unless the layer has a place for every tensor of the block, and the block has every tensor of the layer."""
    theirs = block.state_dict()
    links = _links_of(block, family)
    if left := theirs.keys() - {link.theirs for link in links}:
        raise ValueError(f"moesaic.MoE has no place for {sorted(left)}")
    with torch.device("meta"):
        ours = MoE(config).state_dict().keys()
    if lacking := ours - {name for link in links for name in link.ours}:
        raise ValueError(f"the block has no tensor for {sorted(lacking)} of moesaic.MoE")
    for link in links:
        tensor = theirs[link.theirs]
        if link.is_bias and not tensor.is_meta and not torch.equal(tensor.float().to(tensor.dtype), tensor):
            raise ValueError(f"'{link.theirs}' is not exact in fp32, the dtype in which the layer keeps it")


def _links_of(block: nn.Module, family: Family) -> tuple[Link, ...]:
    tensors = block.state_dict()
    links = (link for link in family.links if link.theirs in tensors)
    # n_shared_experts=0 leaves a shared expert of hidden dim 0.
    return tuple(
        link if (tensor := tensors[link.theirs]).numel() else without_numbers(link.theirs, tensor) for link in links
    )


@torch.no_grad()
def _layer_for(swap: _Swap, impl: Implementation | None) -> MoE:
    block, links = swap.block, _links_of(swap.block, swap.family)
    with torch.device("meta"):
        layer = (_PairMoE if swap.family.returns_pair else MoE)(swap.config, impl=impl)
    theirs = block.state_dict(keep_vars=True)
    device = next(iter(theirs.values())).device
    for link in links:
        tensor = theirs[link.theirs]
        dtype = torch.float32 if link.is_bias else tensor.dtype
        for name, part in zip(link.ours, link.split(tensor.detach().to(dtype)), strict=True):
            # Cloned, so that no two parameters share storage: an optimizer, a checkpoint or a plan could not take that.
            _put(layer, name, part.clone(memory_format=torch.contiguous_format), tensor.requires_grad)
    layer.router.load = torch.zeros_like(layer.router.load, device=device)
    layer.register_load_state_dict_pre_hook(_take_original_names)
    hooks.carry(block, layer)
    layer.train(block.training)
    # The block is kept for unswap_moe, without its weights.
    layer.origin = Origin(block.to("meta"), links)  # type: ignore[assignment]
    return layer


@torch.no_grad()
def _block_for(layer: nn.Module, origin: Origin) -> nn.Module:
    block = origin.block
    ours, theirs = layer.state_dict(keep_vars=True), block.state_dict(keep_vars=True)
    for link in origin.links:
        parts = [ours[name] for name in link.ours]
        tensor = link.join(*(part.detach() for part in parts)).clone(memory_format=torch.contiguous_format)
        if link.is_bias:
            tensor = tensor.to(theirs[link.theirs].dtype)
        requires_grad = not parts or any(part.requires_grad for part in parts)
        _put(block, link.theirs, tensor.to(layer.get_parameter("experts.w1").device), requires_grad)
    hooks.carry(layer, block)
    return block.train(layer.training)


def _put(module: nn.Module, name: str, tensor: Tensor, requires_grad: bool) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=requires_grad)
    else:
        owner._buffers[leaf] = tensor


def _take_original_names(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    origin = origin_of(layer)
    assert origin is not None
    for link in origin.links:
        if prefix + link.theirs in state_dict and link.theirs not in link.ours:
            tensor = state_dict.pop(prefix + link.theirs)
            for name, part in zip(link.ours, link.split(tensor), strict=True):
                state_dict[prefix + name] = part
