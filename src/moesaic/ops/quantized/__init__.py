"""Weights of 8 and 4 bits: formats, the type that stands in the place of a weight, and the operators behind it."""

from moesaic.ops.quantized.formats import FORMATS, Format
from moesaic.ops.quantized.weight import QuantizedWeight, quantize

__all__ = ["FORMATS", "Format", "QuantizedWeight", "quantize"]
