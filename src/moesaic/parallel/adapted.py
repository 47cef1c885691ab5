"""Linear layers with low-rank adapters of peft. They are known by what they have, since peft is not imported here."""

from typing import Any

from torch import nn


def base_of(module: Any) -> Any:
    """The linear layer that adapters of peft are around, or else the module itself."""
    base = getattr(module, "base_layer", None)
    return base if isinstance(base, nn.Linear) and hasattr(module, "lora_A") else module


def factors(module: Any, name: str) -> list[nn.Parameter]:
    """The factors ``lora_A`` or ``lora_B`` of all adapters on a layer; none if it has no adapters."""
    return [] if base_of(module) is module else list(getattr(module, name).parameters())


def tensor_parallel_problem(module: Any) -> str | None:
    """Why the adapters on a layer cannot be split over ranks, if so."""
    if base_of(module) is module:
        return None
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.lora_dropout.values()):
        return "has a dropout, which each rank would draw for itself; set lora_dropout to 0"
    if any(True for _ in module.lora_magnitude_vector.parameters()):
        return "normalizes whole columns of the weight (DoRA), of which a rank has a part; set use_dora to False"
    return None
