"""The model: a transformers architecture, new or pretrained, laid over the meshes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from transformers.utils import logging as transformers_logging

from moesaic.integrations.transformers import load_pretrained, swap_moe
from moesaic.integrations.transformers.configs import config_for, read_config
from moesaic.integrations.transformers.loading import make_buffers, model_on_meta
from moesaic.integrations.transformers.router_logits import balance_coefficient
from moesaic.layers import init_weights_, uncounted
from moesaic.layers.blocks import fill_by_position
from moesaic.parallel.mesh import Meshes
from moesaic.parallel.meta import materialize
from moesaic.parallel.plan import parallelize
from moesaic.parallel.split import module_in_whole, split_into_stages, whole_of
from moesaic.sharding.parts import local_part
from moesaic.train.architecture import ModelSource
from moesaic.train.config import TrainConfig
from moesaic.train.errors import UserError, first_line
from moesaic.train.pipelining import pipeline_config
from moesaic.train.step import evaluating

# Rows of the embedding come in multiples of this, so that a vocabulary of any size can be split.
_VOCABULARY_MULTIPLE = 64


def model_config(values: dict[str, Any], *, vocab_size: int, eos_id: int) -> Any:
    """A transformers config for these values and a tokenizer."""
    values = dict(values)
    kind = values.pop("model_type")
    values["vocab_size"] = -(-vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    values |= {"bos_token_id": None, "eos_token_id": eos_id, "pad_token_id": eos_id}
    try:
        config = config_for({"model_type": kind, **values}, "--model")
        known = {*type(config)().to_dict(), *type(config).attribute_map}
    except Exception as error:
        raise UserError(f"--model: transformers rejects this config: {error}") from error
    for name in sorted(values.keys() - known):
        # transformers keeps keys that it does not know, and published configs have some. A misspelt one is near one
        # that is not there.
        if near := get_close_matches(name, sorted(known - values.keys()), n=1, cutoff=0.8):
            raise UserError(f"--model: its config has {name}, which {kind} does not know; did you mean {near[0]}?")
    return config


def identity(config: Any) -> str:
    """A hash of a model config. Configs of the same model have the same hash."""
    values = config.to_dict()
    for key in ("transformers_version", "_name_or_path", "dtype", "use_cache"):
        values.pop(key, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def own_aux_loss_coef(source: ModelSource) -> float | None:
    """What transformers multiplies its balance loss of a pretrained model by, None where it adds none."""
    if source.weights is None or not source.text_values.get("output_router_logits"):
        return None
    try:
        return balance_coefficient(read_config(source.weights)[0])
    except (ValueError, OSError) as error:
        raise UserError(f"--model {source.weights}: transformers rejects its config: {error}") from error


def build_model(config: TrainConfig, architecture: Any, meshes: Meshes, device: torch.device) -> nn.Module:
    """A new model, equal on every layout, its MoE blocks replaced, laid over `meshes`.

    Every rank makes the weights that it keeps, each number from the seed and its place.
    """
    try:
        _check_computes(swap_moe(model_on_meta(architecture)), config.model)
        model = model_on_meta(architecture)
        make_buffers(model, device)
        swap_moe(model, **_balance(config))
        if meshes.pp_size > 1:
            model = split_into_stages(model, meshes, pipeline_config(config))
        parallelize(model, meshes, **_plan(config))
        if not meshes.is_distributed:
            materialize(model, device)
        init_weights_(model, seed=config.seed)
    except ValueError as error:
        raise UserError(f"--model {config.model}: {error}") from error
    if not architecture.tie_word_embeddings:
        _widen_embedding(model, config.seed)
    return model


def _widen_embedding(model: nn.Module, seed: int) -> None:
    """Draw the embedding with standard deviation 1.

    transformers draws all weights with one small standard deviation. The output of the first layers would then be much
    larger than the embedding, and the model needs about a hundred steps to recover from that.
    """
    whole: Any = whole_of(model)
    embedding = whole.get_input_embeddings()
    here = module_in_whole(model, next(name for name, module in whole.named_modules() if module is embedding))
    if here is not None:
        local, box = local_part(here.weight)
        fill_by_position(local, box, here.weight.shape, f"{seed} embedding", lambda t, g: t.normal_(generator=g))


def _check_computes(model: nn.Module, name: str) -> None:
    """Raise `UserError` for a shape that its own code cannot compute. The model is on the meta device."""
    try:
        # Unlike tensors on the meta device alone, fakes tell transformers not to look at numbers.
        with evaluating(model), uncounted(), FakeTensorMode(allow_non_fake_inputs=True):
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device="meta"), use_cache=False)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
        pass  # it looks all the same, and only a run can tell
    except Exception as error:
        raise UserError(f"--model {name}: a model of this config cannot compute: {first_line(error)}") from error


def load_model(
    config: TrainConfig,
    source: ModelSource,
    meshes: Meshes,
    device: torch.device,
    *,
    vocab_size: int,
    adapter: Any = None,
) -> nn.Module:
    """A pretrained model in fp32, its MoE blocks replaced, laid over `meshes`; with adapters if there is a config.

    Raises `UserError` for a model that cannot be laid so, or a tokenizer of more than its `vocab_size` tokens.
    """
    rows = source.text_values["vocab_size"]
    if vocab_size > rows:
        if config.tokenizer is None:
            raise UserError(
                f"--model {config.model}: its tokenizer has {vocab_size} tokens, but its embedding has only {rows} "
                "rows; add rows with resize_token_embeddings of transformers, or give another --tokenizer"
            )
        raise UserError(
            f"--tokenizer: it has {vocab_size} tokens, but --model {config.model} has only {rows}; leave it out to "
            "use the tokenizer of the model"
        )
    try:
        with quiet():
            return load_pretrained(
                str(source.weights),
                meshes,
                dtype=torch.float32,
                device=device,
                ignore_unexpected=config.ignore_unexpected,
                adapter=adapter,
                pipeline=pipeline_config(config) if meshes.pp_size > 1 else None,
                quantize=config.quantize_experts,
                **_plan(config),
                **_balance(config),
            )
    except (ValueError, OSError, NotImplementedError, SafetensorError) as error:
        raise UserError(f"--model {config.model} ({source.values['model_type']}): {error}") from error


def _plan(config: TrainConfig) -> dict[str, Any]:
    """The options of `parallelize` for these settings."""
    names = ("compute", "capacity", "recompute", "reshard_after_forward")
    return {name: getattr(config, name) for name in names}


def _balance(config: TrainConfig) -> dict[str, Any]:
    """The balance losses of `swap_moe` for these settings, whose defaults are filled in."""
    return {"aux_loss_coef": config.aux_loss_coef, "aux_loss": config.aux_loss, "z_loss_coef": config.z_loss_coef}


def num_parameters(model: nn.Module) -> int:
    """Parameters of the whole model, however it is sharded and cut into stages."""
    return sum(parameter.numel() for parameter in whole_of(model).parameters())


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and advice of transformers."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
