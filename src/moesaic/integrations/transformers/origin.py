"""The block that a swapped layer has replaced."""

from dataclasses import dataclass

from torch import nn

from moesaic.integrations.transformers.links import Link


@dataclass(frozen=True)
class Origin:
    """A transformers block on the meta device, and the links of its tensors to the layer's. It is no submodule."""

    block: nn.Module
    links: tuple[Link, ...]


def origin_of(module: nn.Module) -> Origin | None:
    """The origin of a layer that swap_moe made, or None."""
    return module.__dict__.get("origin")
