"""The sharding rules of our operators, loaded when one of them first meets a DTensor.

DTensor and the rules take longer to import than torch itself, and most programs need neither. So only a stand-in is
registered, as soon as there is a DTensor class: here and now if it has been imported already, else behind the import
of ``torch.distributed.tensor``. An operator that meets a DTensor calls the stand-in, which loads the rules and
starts over. Raw calls of ``torch.ops.moesaic`` and backward operators go the same way.

The rules are imported by name: this module stands below them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_DTENSOR = "torch.distributed.tensor"
_RULES = "moesaic.sharding.library"
_stand_ins: torch.library.Library | None = None


def arrange() -> None:
    """Have the rules loaded when they are needed. Called once, when all operators are defined."""
    if _DTENSOR in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watcher())


def withdraw() -> None:
    """Take the stand-ins back: the rules are about to be registered."""
    global _stand_ins
    _stand_ins = None  # a library takes its registrations with it


def _register() -> None:
    global _stand_ins
    if _RULES in sys.modules:  # they were first, and imported DTensor themselves
        return
    cls = sys.modules[_DTENSOR].DTensor
    _stand_ins = torch.library.Library("moesaic", "FRAGMENT")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("moesaic::"):
            torch.library.register_torch_dispatch(name, cls, _load_and_call, lib=_stand_ins)


def _load_and_call(cls: type, op: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
    importlib.import_module(_RULES)
    return op(*args, **(kwargs or {}))


class _Watcher(MetaPathFinder):
    """Waits for the import of DTensor."""

    # The path of a namespace package calls itself a sequence and is none, which a run-time check of types refuses.
    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _DTENSOR:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            if find is not None and (spec := find(fullname, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _ThenRegister(spec.loader, self)
                return spec
        return None


class _ThenRegister(Loader):
    """Loads a module as its own loader does, and then registers the stand-ins."""

    def __init__(self, loader: Loader, watcher: _Watcher) -> None:
        self._loader = loader
        self._watcher = watcher

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # What others see of the module is as if nobody had watched.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self._watcher in sys.meta_path:
            sys.meta_path.remove(self._watcher)
        _register()
