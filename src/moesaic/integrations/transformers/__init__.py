"""transformers models on moesaic: its kernels (:func:`register`), its layers (:func:`swap_moe`), and back again.

Needs the extra: ``pip install moesaic[transformers]``.
"""

try:
    import transformers.integrations.moe  # noqa: F401
except ImportError as error:
    raise ImportError(
        "moesaic.integrations.transformers needs transformers 5: pip install 'moesaic[transformers]'"
    ) from error

from moesaic.integrations.transformers.experts import register
from moesaic.integrations.transformers.export import to_transformers_state_dict
from moesaic.integrations.transformers.loading import load_pretrained
from moesaic.integrations.transformers.saving import export_pretrained
from moesaic.integrations.transformers.swap import swap_moe, unswap_moe

__all__ = ["export_pretrained", "load_pretrained", "register", "swap_moe", "to_transformers_state_dict", "unswap_moe"]
