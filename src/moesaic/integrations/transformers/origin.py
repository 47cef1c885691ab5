"""Where a layer came from: the block that it stands in for."""

from dataclasses import dataclass

from torch import nn

from moesaic.integrations.transformers.links import Link


@dataclass(frozen=True)
class Origin:
    """A block of transformers, on the meta device, and the links of its tensors to the layer's. Not a submodule."""

    block: nn.Module
    links: tuple[Link, ...]


def origin_of(module: nn.Module) -> Origin | None:
    """The origin of a layer that swap_moe put there, or None."""
    return module.__dict__.get("origin")
