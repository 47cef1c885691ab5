"""What users have put on a block before a swap: hooks on its calls go on with the layer, and the rest is refused."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

_ON_CALLS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# The others only mark which of these are called in another way. Each hook has a number of its own.
_CALLED = ("_forward_hooks", "_forward_pre_hooks")
_ON_STATES = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def check(block: nn.Module) -> None:
    """Raise ``ValueError`` if a hook or a forward of the user's would be lost with the block."""
    for name, module in block.named_modules():
        where = f"'{name}'" if name else "the block"
        own = vars(module)
        for kind in _ON_STATES if module is block else _ON_CALLS + _ON_STATES:
            if any(not _is_of_transformers(hook) for hook in own[kind].values() if callable(hook)):
                raise ValueError(
                    f"{where} has a hook ({kind.strip('_')}), and the layer has no such part to carry it; remove it, "
                    "or put it on the whole block, whose hooks on forward and backward passes are carried over"
                )
        if "forward" in own:
            raise ValueError(
                f"{where} has a forward that was set on this module alone, and would be lost; remove it (of "
                "accelerate: remove_hook_from_module) before swap_moe"
            )


def carry(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` have the hooks of ``source``. They share them, so the users' handles still remove them."""
    for kind in _ON_CALLS:
        target.__dict__[kind] = source.__dict__[kind]
    target._is_full_backward_hook = source._is_full_backward_hook


def take_off(model: nn.Module, is_ours: Callable[[Any], bool]) -> None:
    """Remove those hooks on the calls of a model's modules that ``is_ours`` says yes to."""
    for module in model.modules():
        own = vars(module)
        numbers = [n for kind in _CALLED for n, hook in own[kind].items() if is_ours(hook)]
        for kind in _ON_CALLS:
            for number in numbers:
                own[kind].pop(number, None)


def _is_of_transformers(hook: Any) -> bool:
    """Whether transformers has put it there, to record what a router gives. Those go with the router."""
    function = hook.func if isinstance(hook, functools.partial) else hook
    return getattr(function, "__module__", "").startswith("transformers.")
