"""Sort token copies by expert, and bring them back."""

from moesaic.ops.permute.api import Permutation, combine, permute, sort_by_expert

__all__ = ["Permutation", "combine", "permute", "sort_by_expert"]
