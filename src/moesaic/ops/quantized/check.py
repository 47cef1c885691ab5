"""Checks of quantised weights among the arguments of experts_mlp."""

from collections.abc import Mapping
from typing import Any

from moesaic.ops.quantized.weight import QuantizedWeight


def quantized_among(weights: Mapping[str, Any]) -> dict[str, QuantizedWeight]:
    """Those that are quantised: all that are given, or none.

    Raises:
        TypeError: some are, and others are tensors.
        ValueError: their formats differ, or one is the ``.mT`` of a weight.
    """
    given = {name: w for name, w in weights.items() if w is not None}
    found = {name: w for name, w in given.items() if isinstance(w, QuantizedWeight)}
    if not found:
        return found
    if left := sorted(given.keys() - found.keys()):
        raise TypeError(f"{left[0]}: {', '.join(found)} are quantised, and this is not; quantise all weights, or none")
    formats = {w.format for w in found.values()}
    if len(formats) > 1:
        said = ", ".join(f"{name} is {w.format}" for name, w in found.items())
        raise ValueError(f"w1, w3, w2: {said}; quantise them to one format")
    for name, w in found.items():
        if w.transposed:
            raise ValueError(
                f"{name}: is the .mT of a quantised weight, whose scales lie along the other dim; quantise the "
                "matrices as they are used, y = x @ w"
            )
    return found
