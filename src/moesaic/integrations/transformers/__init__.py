"""transformers models on moesaic: its kernels (:func:`register`), its layers (:func:`swap_moe`), and back again.

Needs the extra: ``pip install '.[transformers]'`` in a checkout of moesaic.
"""

try:
    from transformers.distributed.expert_parallel import EPImplementationInterface  # noqa: F401
except ImportError as error:
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = f"this is {version('transformers')}"
    except PackageNotFoundError:
        found = "it is not installed"
    raise ImportError(
        f"moesaic.integrations.transformers needs transformers 5.23 or a later 5, and {found}: "
        "pip install '.[transformers]' in a checkout of moesaic"
    ) from error

from moesaic.integrations.transformers.export import to_transformers_state_dict
from moesaic.integrations.transformers.loading import load_pretrained
from moesaic.integrations.transformers.registry import register
from moesaic.integrations.transformers.saving import export_pretrained
from moesaic.integrations.transformers.swap import swap_moe, unswap_moe
from moesaic.integrations.transformers.trainer import MeshTrainerMixin

__all__ = [
    "MeshTrainerMixin",
    "export_pretrained",
    "load_pretrained",
    "register",
    "swap_moe",
    "to_transformers_state_dict",
    "unswap_moe",
]
