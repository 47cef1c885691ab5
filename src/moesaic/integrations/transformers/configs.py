"""Model configs from files of any origin. A damaged one raises one kind of error, and nothing in a config loads code.

A config can name classes in Python files beside it (``auto_map``), and attention kernels of the hub. The first are
never loaded (``trust_remote_code=False``), and the second only where the caller asks by ``attn_implementation=``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

from moesaic.checkpoint import CheckpointError

# Attention that torch and transformers bring along. Others may be kernels that transformers would fetch.
_BUILT_IN = (None, "eager", "sdpa", "flex_attention")
_SIZES = ("size", "dim", "num_", "heads", "layers", "experts", "rank", "position", "_k", "step")

_log = logging.getLogger(__name__)


@contextmanager
def damage_is_value_error(place: str | Path, values: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Turn what a damaged file makes transformers or torch raise into ``ValueError`` that names the file.

    ``OSError``, ``NotImplementedError``, ``CheckpointError`` and ``ValueError`` pass; the text of the last gets the
    file's name if it lacks it. ``values`` are those of a config: sizes among them that cannot be are named.
    """
    try:
        yield
    except (OSError, NotImplementedError, CheckpointError):
        raise
    except Exception as error:
        text = str(error).strip().partition("\n\n")[0].replace("\n", " ")
        if isinstance(error, ValueError) and str(place) in text:
            raise
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{place}: {kind}{text}{_odd_sizes(values or {})}") from error


def read_config(path: str | Path, revision: str | None = None, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """The config of a checkpoint in a folder or on the hub, and the changes that it has no place for.

    Raises:
        OSError: there is no config.json.
        ValueError: it is damaged, names a model that transformers does not have, or a kernel of the hub.
    """
    file = cached_file(str(path), CONFIG_NAME, revision=revision)
    values = read_values(Path(str(file)))
    with damage_is_value_error(file or path, values):
        found: Any = AutoConfig.from_pretrained(
            path, revision=revision, return_unused_kwargs=True, trust_remote_code=False, **changes
        )
        config, unused = found
        only_built_in(config, file or path)
    return config, unused


def config_for(values: Mapping[str, Any], place: str | Path) -> Any:
    """A config from its values, which are from ``place``. Raises ``ValueError``, as :func:`read_config` does."""
    values = dict(values)
    kind = values.pop("model_type", None)
    with damage_is_value_error(place, values):
        if not isinstance(kind, str):
            raise ValueError(f"model_type must be a string, got {kind!r}")
        config = AutoConfig.for_model(kind, **values)
        only_built_in(config, place)
    return config


def read_values(file: Path) -> dict[str, Any]:
    """The values of a JSON file. Raises ``ValueError`` that names the file if it is no JSON object, ``OSError``."""
    try:
        values = json.loads(file.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: it is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is damaged: it holds no JSON object, but a {type(values).__name__}")
    return values


def read_generation_config(path: str | Path, revision: str | None = None) -> Any:
    """How a checkpoint generates; None if it does not say. Raises ``ValueError`` if the file is damaged."""
    file = cached_file(
        str(path), GENERATION_CONFIG_NAME, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if file is None:
        return None
    read_values(Path(file))
    with damage_is_value_error(file):
        return GenerationConfig.from_pretrained(path, revision=revision or "main")


def only_built_in(config: Any, place: str | Path) -> None:
    """Leave out implementations of attention that may be loaded from elsewhere, with a warning.

    Raises ``ValueError`` for one that names a repository of the hub.
    """
    for part in [config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))]:
        chosen = part._attn_implementation
        if isinstance(chosen, str) and chosen not in _BUILT_IN:
            if "/" in chosen:
                raise ValueError(
                    f"attn_implementation is {chosen!r}, which is code from a hub; take it out of the config, or pass "
                    "attn_implementation= to load_pretrained if you trust it"
                )
            _log.warning(
                "%s: attn_implementation %r is left out: a config does not choose what code is loaded; pass "
                "attn_implementation= for it",
                place,
                chosen,
            )
            part._attn_implementation_internal = None
        elif not isinstance(chosen, str | None):
            raise ValueError(f"attn_implementation must be a string, got {chosen!r}")


def _odd_sizes(values: Mapping[str, Any]) -> str:
    """The sizes that are no positive numbers, as a hint."""
    texts = values.get("text_config")
    both = {**values, **(texts if isinstance(texts, dict) else getattr(texts, "__dict__", {}))}
    odd = [
        f"{name} is {value!r}"
        for name, value in both.items()
        if any(part in name for part in _SIZES)
        and not name.endswith("_id")
        and value is not None
        and not isinstance(value, list | dict | bool)
        and not (isinstance(value, int | float) and value > 0)
    ]
    return f" (in it, {', '.join(odd[:5])})" if odd else ""
