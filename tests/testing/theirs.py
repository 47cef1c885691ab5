"""Parallel training of transformers itself, of two families: its expert parallelism, tensor parallelism and FSDP2."""

import functools
import os
import shutil
import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from moesaic.testing import Check

BATCH, LENGTH, VOCAB = 4, 8, 32
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "use_cache": False,
}


def build(family: str, aux_loss: bool = False) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **_SIZES, output_router_logits=aux_loss, router_aux_loss_coef=0.1)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()


def inputs(rank, layout):
    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids[layout.rows(rank, BATCH)]}


def uneven_inputs(rank, layout):
    """The first sequences have labels at few places, so that ranks have different numbers of them."""
    batch = inputs(rank, layout)
    first = layout.rows(rank, BATCH).start or 0
    labels = batch["input_ids"].clone()
    for row, sequence in enumerate(labels):
        sequence[: LENGTH - 2 - 2 * (first + row)] = -100
    return {**batch, "labels": labels}


def mean_loss(model, batch):
    """The mean over a rank's tokens: every rank has as many, and FSDP averages gradients."""
    logits = model(**batch, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def distribute(model, layout):
    """Through a checkpoint, as ``from_pretrained(distributed_config=...)`` takes it."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    os.environ.setdefault("MASTER_ADDR", "localhost")
    sizes = {f"{name}_size": size for name, size in layout.items()}
    # transformers writes on rank 0 alone.
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    model.save_pretrained(folder[0])
    dist.barrier()
    again = AutoModelForCausalLM.from_pretrained(
        folder[0], distributed_config=DistributedConfig(**sizes), dtype=torch.float32, attn_implementation="eager"
    )
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])
    return again.train()


def loss_of_the_model(model, batch):
    """With its balance loss, as a trainer takes it."""
    return model(**batch, labels=batch["input_ids"], use_cache=False).loss


def check(family: str, *layouts: dict[str, int]) -> Check:
    return Check(
        build=functools.partial(build, family),
        inputs=inputs,
        parallelize=distribute,
        layouts=layouts,
        loss=mean_loss,
    )
