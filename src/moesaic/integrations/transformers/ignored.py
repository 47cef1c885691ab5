"""A warning where transformers ignores ``experts_implementation``: its models ask for it, or they do not.

Such a model runs as if the argument had not been given, and nobody says so.
"""

import functools
import inspect
import re
import sys
import warnings
from typing import Any

from transformers import PreTrainedModel

from moesaic.integrations.transformers.families import FAMILIES

_EXPERTS = re.compile(r"^class \w*(Experts|Moe|MoE)\w*\(nn\.\w+\)", re.MULTILINE)
_USES = "@use_experts_implementation"


def watch(name: str) -> None:
    """Warn from now on when a model that has experts is asked for the implementation ``name`` and does not look."""
    plain = PreTrainedModel.get_correct_experts_implementation
    if hasattr(plain, "_warns"):
        return

    @functools.wraps(plain)
    def get_correct_experts_implementation(self: Any, requested_experts: str | None) -> str:
        if requested_experts == name and (advice := _advice(type(self).__module__)):
            warnings.warn(
                f"experts_implementation: the experts of {type(self).__module__} do not ask for it, and run as if it "
                f"were not there; {advice}",
                stacklevel=2,
            )
        return plain(self, requested_experts)

    get_correct_experts_implementation._warns = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_experts_implementation = get_correct_experts_implementation


@functools.cache
def _advice(module: str) -> str:
    """What to do instead, for a module whose experts do not use the interface; else an empty text."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return ""
    if _USES in source or not _EXPERTS.search(source):
        return ""
    place = module.removeprefix("transformers.models.")
    if any(family.startswith(f"{place}:") for family in FAMILIES):
        return "swap_moe() can replace them"
    return "leave it out"
