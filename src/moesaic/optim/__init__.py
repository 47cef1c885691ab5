"""Optimizers for models with experts: :class:`Muon`, and :func:`param_groups`, which says what it is for."""

from moesaic.optim.groups import param_groups
from moesaic.optim.muon import Muon

__all__ = ["Muon", "param_groups"]
