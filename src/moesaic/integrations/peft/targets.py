"""Which weights of a model with our layers a config of peft adapts, and the names that peft's files have for them.

peft itself says so: the config is put into the model that transformers would have, on the meta device. So names,
regular expressions, patterns of ranks, and names of older checkpoints mean what they mean there.

Legend: E experts, r rank.
"""

import copy
import re
import warnings
from dataclasses import dataclass
from typing import Any

import peft
from peft.tuners import lora
from torch import nn

from moesaic.integrations.transformers.links import Link
from moesaic.integrations.transformers.origin import origin_of
from moesaic.integrations.transformers.plain import plain_on_meta
from moesaic.layers.lora import Rank
from moesaic.ops.experts_lora.dropout import check_dropout
from moesaic.parallel.split import whole_of

_PREFIX = "base_model.model."
# Settings that change more than which weights have factors, each with the value that does not.
_LEFT_ALONE: dict[str, Any] = {
    "modules_to_save": None,
    "bias": "none",
    "lora_bias": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "init_lora_weights": True,
}


@dataclass(frozen=True)
class Target:
    """A weight that has an adapter.

    Attributes:
        key: the beginning of its names in peft's files.
        module: the name of our module that has the adapter: a linear layer, or an MoE layer's experts or router.
        rank: the rank and the scale.
        alpha: ``lora_alpha``, for peft's own layers.
        link: for experts, how their weights follow from that of the block; else None.
        experts: E; 0 if it is not a weight of experts.
        swapped: whether peft takes the block's weights for ``[E, out, in]``, and not for ``[E, in, out]``.
        is_router: whether it is the router's weight.
    """

    key: str
    module: str
    rank: Rank
    alpha: float
    link: Link | None = None
    experts: int = 0
    swapped: bool = False
    is_router: bool = False

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the experts' weights."""
        return () if self.link is None else tuple(name.removeprefix("experts.") for name in self.link.ours)

    @property
    def weight_in_plain(self) -> str:
        """The name of the weight in the model before the swap."""
        path = self.key.removeprefix(_PREFIX).replace(".base_layer", "")
        return f"{path}.weight" if self.link is None else f"{path.removesuffix('experts')}{self.link.theirs}"


def targets_of(model: nn.Module, config: Any) -> tuple[list[Target], Any]:
    """The weights that a ``LoraConfig`` adapts, in the order of peft's files, and the config as peft keeps it.

    Raises:
        TypeError: ``config`` is no ``LoraConfig``.
        ValueError: nothing is adapted, or what adapters of ours cannot be put on; the message names it.
    """
    if not isinstance(config, peft.LoraConfig):
        raise TypeError(f"config: expected a peft.LoraConfig, got {type(config).__name__}")
    for setting, value in _LEFT_ALONE.items():
        if (given := getattr(config, setting, value)) != value and given:
            raise ValueError(f"config: {setting}={given!r} is not supported; leave it out")
    try:
        check_dropout(config.lora_dropout)
    except ValueError as error:
        raise ValueError(f"config: lora_{error}") from None
    model = whole_of(model)
    plain = plain_on_meta(model, without_adapters=True)
    with warnings.catch_warnings():
        # A config is used again for each model.
        warnings.simplefilter("ignore")
        without_dropout = copy.deepcopy(config)
        # peft would refuse it for experts: what it makes of them is a sum of weights.
        without_dropout.lora_dropout = 0.0
        wrapped = peft.get_peft_model(plain, without_dropout, autocast_adapter_dtype=False)
    origins = {name: origin for name, module in model.named_modules() if (origin := origin_of(module))}
    kept: Any = wrapped.peft_config["default"]
    kept.lora_dropout = config.lora_dropout
    # peft puts the plain model's, which has none.
    kept.base_model_name_or_path = config.base_model_name_or_path or getattr(model, "name_or_path", None)
    targets = []
    for name, layer in wrapped.named_modules():
        if isinstance(layer, lora.LoraLayer):
            targets.append(_target(name, layer, origins))
    return targets, kept


def _target(name: str, layer: Any, origins: dict[str, Any]) -> Target:
    path = re.sub(r"(\.base_layer)+$", "", name.removeprefix(_PREFIX))
    rank, alpha = Rank(layer.r["default"], float(layer.scaling["default"])), float(layer.lora_alpha["default"])
    inside = next((prefix for prefix in origins if path.startswith(f"{prefix}.")), None)
    parameter = getattr(layer, "parameter_name", "weight")
    if type(layer) not in (lora.Linear, lora.ParamWrapper):
        raise ValueError(f"config: '{path}' is adapted as {type(layer).__name__}; choose linear layers and weights")
    if inside is None:
        if not isinstance(layer, lora.Linear):
            raise ValueError(
                f"config: target_parameters has '{path}.{parameter}', which is no weight of a router or of experts; "
                "name linear layers in target_modules"
            )
        return Target(name, path, rank, alpha)
    theirs = f"{path.removeprefix(f'{inside}.')}.{parameter}"
    link = next((link for link in origins[inside].links if link.theirs == theirs), None)
    ours = link.ours if link is not None else ()
    if link is not None and all(re.fullmatch(r"experts\.w\d", own) for own in ours):
        return Target(name, f"{inside}.experts", rank, alpha, link, layer.num_experts, layer._did_swap_in_out_features)
    if ours == ("router.weight",):
        return Target(name, f"{inside}.router", rank, alpha, is_router=True)
    if isinstance(layer, lora.Linear) and len(ours) == 1:
        return Target(name, f"{inside}.{ours[0].removesuffix('.weight')}", rank, alpha)
    raise ValueError(f"config: '{path}.{parameter}' cannot have an adapter; leave it out")
