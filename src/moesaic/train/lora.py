"""Low-rank adapters of a pretrained model: peft's config for the settings, and the adapters at the end of a run."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moesaic.integrations.transformers.loading import Source, model_on_meta, read_changed_config
from moesaic.integrations.transformers.origin import origin_of
from moesaic.integrations.transformers.swap import swap_moe
from moesaic.train.architecture import ModelSource
from moesaic.train.config import TrainConfig
from moesaic.train.errors import UserError, check_packages

# In the folder of the export.
ADAPTER = "adapter"
# By --export-dtype.
EXPORT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check_adapters(config: TrainConfig, source: ModelSource) -> None:
    """Raise `UserError` if adapters are asked for where they cannot be, or a model can be trained by them alone."""
    if source.stored and not (config.lora_rank and config.quantize_experts == source.stored):
        raise UserError(
            f"--model {config.model}: its experts are stored as {source.stored} and read-only; to train adapters "
            f"beside them add --quantize-experts {source.stored} and --lora-rank, or give a bf16 or fp32 version"
        )
    if not config.lora_rank:
        if config.quantize_experts:
            raise UserError(
                f"--quantize-experts {config.quantize_experts}: quantised weights are read-only, so only adapters "
                "beside them can be trained; add --lora-rank, or leave it out"
            )
        return
    if not source.pretrained:
        raise UserError("--lora-rank adapts a pretrained model, but --model is a new one; leave one of them out")
    check_packages("--lora-rank", "lora", "peft")


def adapter_config(config: TrainConfig, source: ModelSource) -> Any:
    """The `LoraConfig` of a run, or None. Its names are those of the plain model, as short as they can be.

    Raises `UserError` for a model without linear layers in its attention.
    """
    if not config.lora_rank:
        return None
    peft = importlib.import_module("peft")
    model = swap_moe(model_on_meta(read_changed_config(Source(str(source.weights)))))
    attention, experts = set(), set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (found := re.search(r"(?:^|\.)(self_attn\..*)", name)):
            attention.add(found[1])
        if (origin := origin_of(module)) is not None:
            block = name.rpartition(".")[2]
            links = (link for link in origin.links if any(re.fullmatch(r"experts\.w\d", own) for own in link.ours))
            experts |= {f"{block}.{link.theirs}" for link in links}
    if not attention and config.lora_on != "experts":
        raise UserError(f"--lora-on {config.lora_on}: {type(model).__name__} has no linear layers in a 'self_attn'")
    return peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=alpha_of(config),
        use_rslora=config.lora_rslora,
        lora_dropout=config.lora_dropout,
        target_modules=[] if config.lora_on == "experts" else sorted(attention),
        target_parameters=None if config.lora_on == "attention" else sorted(experts),
        base_model_name_or_path=str(source.weights),
        task_type="CAUSAL_LM",
    )


def alpha_of(config: TrainConfig) -> float:
    """`lora_alpha`, or twice the rank where it is not given."""
    return 2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha


def describe(config: TrainConfig) -> str:
    """What a run with other adapters differs in."""
    stabilised = ", rank-stabilised" if config.lora_rslora else ""
    on = config.lora_on + (f" around experts in {config.quantize_experts}" if config.quantize_experts else "")
    on += f", dropout {config.lora_dropout:g}" if config.lora_dropout else ""
    return f"adapters of rank {config.lora_rank} and alpha {alpha_of(config):g}{stabilised} on {on}"


def write_adapter_config(model: nn.Module, folder: Path) -> None:
    """Write peft's config of the adapters into the run folder, by which a checkpoint's adapters can be converted."""
    config_of = importlib.import_module("moesaic.integrations.peft.switch").config_of
    config_of(model, "default").save_pretrained(str(folder))


def save_adapters(model: nn.Module, folder: Path) -> None:
    """Write the adapters as peft's files. Collective."""
    importlib.import_module("moesaic.integrations.peft").save_adapters(model, folder)


def merge_adapters(model: nn.Module) -> None:
    """Add the adapters to the weights. Collective."""
    importlib.import_module("moesaic.integrations.peft").merge_adapters(model)


def export_merged(config: TrainConfig, weights: str, adapter: Path, folder: Path, add: Callable[[Path], None]) -> None:
    """Write the pretrained model with the adapters in a folder added. Collective."""
    source = Source(weights, EXPORT_DTYPES[config.export_dtype], ignore_unexpected=config.ignore_unexpected)
    importlib.import_module("moesaic.integrations.peft.merged").export_merged(source, adapter, folder, add)
