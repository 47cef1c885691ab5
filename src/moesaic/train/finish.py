"""The end of a run: export in Hugging Face format, compare the export with the model, and sample from it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moesaic import ranks
from moesaic.integrations.transformers import export_pretrained
from moesaic.parallel.mesh import Meshes
from moesaic.train.config import TrainConfig
from moesaic.train.errors import TrainingError
from moesaic.train.lora import ADAPTER, EXPORT_DTYPES, export_merged, merge_adapters, save_adapters
from moesaic.train.model import quiet
from moesaic.train.step import evaluating, whole_logits

# Relative to the largest logit. Sums in another order differ by about 1e-6; a wrong weight differs by far more.
_TOLERANCE = 1e-3


def export(model: Any, folder: Path, tokenizer: Any, config: TrainConfig, weights: str | None) -> None:
    """Write the model and its tokenizer for `AutoModelForCausalLM.from_pretrained`. Collective.

    Adapters are merged into the model, which has none then, and written beside it for peft. If its experts are
    quantised, the adapters are merged into the pretrained `weights` instead, and the model keeps them.

    Raises `TrainingError` on all ranks if it cannot be written.
    """
    beside = folder.with_name(f".{folder.name}.{ADAPTER}")

    def add(new: Path) -> None:
        # Into the new folder before it gets its name: an export with its adapters is there at once, or not at all.
        tokenizer.save_pretrained(new)
        if config.lora_rank:
            shutil.move(beside, new / ADAPTER)

    try:
        with quiet():
            if config.lora_rank:
                ranks.on_leader(lambda: shutil.rmtree(beside, ignore_errors=True))
                save_adapters(model, beside)
            if config.quantize_experts:
                export_merged(config, str(weights), beside, folder, add)
                return
            if config.lora_rank:
                merge_adapters(model)
            dtype = EXPORT_DTYPES[config.export_dtype]
            if dtype is not torch.float32:
                round_parameters(model, dtype)
            export_pretrained(model, folder, dtype=dtype, add=add)
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(
            f"cannot export to {folder}: {error}. The training is saved. To export again, run the same command with "
            f"--resume --out {folder.parent}"
        ) from error


@torch.no_grad()
def round_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights of a trained model, in place, so that they are those of an export in this dtype."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype).to(parameter.dtype))


def compare_with_export(
    model: nn.Module, exported: nn.Module | None, tokens: Tensor, meshes: Meshes, *, rounded: bool = False
) -> float:
    """The largest difference of logits between the sharded model and the exported one, relative to the largest logit.

    If experts were `rounded` in one of the two only, any difference is given back.

    `tokens [B, S]` are the same on all ranks; so is the result. Only rank 0 has `exported`, and it compares its own
    part of the sequence. Collective. Raises `TrainingError` if the two are not the same model.
    """
    with evaluating(model):
        own = whole_logits(model, tokens)
    difference = 0.0
    if exported is not None:
        part = meshes.sequence_positions(tokens.shape[1])
        with torch.no_grad():
            theirs = exported(input_ids=tokens.cpu()).logits[:, part]
        difference = float((own.float().cpu() - theirs).abs().max() / theirs.abs().max())
    difference = ranks.from_leader(difference)
    if not (difference <= _TOLERANCE or (rounded and math.isfinite(difference))):
        raise TrainingError(
            f"the exported model's logits differ from the trained model's, by {difference:.1e} of the largest"
        )
    return difference


def load_exported(folder: Path) -> nn.Module | None:
    """The exported model as plain transformers loads it, on the CPU in fp32; on rank 0, None elsewhere. Collective.

    Raises `TrainingError` on all ranks if transformers cannot load it.
    """
    model: nn.Module | None = None

    def load() -> None:
        # Not given back: results go to all ranks, and the model is to stay here.
        nonlocal model
        try:
            with quiet():
                model = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32, trust_remote_code=False
                ).eval()
        except Exception as error:
            raise TrainingError(f"transformers cannot load the export in {folder}: {error}") from error

    ranks.on_leader(load)
    return model


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: Sequence[int], *, max_new_tokens: int, seed: int) -> str:
    """The text that the model adds to a prompt, by nucleus sampling. The same seed gives the same text."""
    inputs = torch.tensor([list(prompt) or [tokenizer.eos_token_id]])
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        found = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(found[0, inputs.shape[1] :], skip_special_tokens=True)
