"""Which of torchtitan's configs an override may replace.

A target of an override matches subclasses, too. What a converter made has a meaning of its own, other products for
instance, which a replacement would lose. So what is not known is refused.
"""

from collections.abc import Mapping
from typing import Any

from torchtitan.components import lora
from torchtitan.config import derive


def derived(override_name: str, config: Any, replacements: Mapping[type, type], **changes: Any) -> Any:
    """A config of one of our classes in place of torchtitan's.

    LoRA makes configs that freeze what they build. What they become freezes, too.

    Args:
        override_name: of which override, for errors.
        config: torchtitan's.
        replacements: for each class that is known, the one that takes its place.
        changes: fields that change.

    Raises:
        ValueError: the config is of another class.
    """
    kind = type(config)
    is_frozen = lora._frozen_config_class_cache.get(kind.__base__) is kind
    known = kind.__base__ if is_frozen else kind
    if known not in replacements:
        raise ValueError(
            f"{override_name}: {kind.__module__}.{kind.__qualname__} is not one of torchtitan's own classes, and what "
            "it adds would be lost; take the converter or override that made it out, or leave this override out"
        )
    ours = derive(config, replacements[known], **changes)
    return lora._make_frozen_config(ours) if is_frozen else ours


def is_lora(config: Any) -> bool:
    """Whether LoRA made this config of a linear layer, with adapters of its own."""
    return type(config) in {made.Config for made in lora._lora_class_cache.values()}
