"""Swap moesaic's layers into a transformers model, and write the model back as transformers would.

Needs the extra: ``pip install moesaic[transformers]``.

Legend: E experts, F expert hidden dim, D model dim.
"""

from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesaic.layers import MoE, MoEConfig

try:
    from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
except ImportError as error:
    raise ImportError(
        "moesaic.integrations.transformers needs transformers 5: pip install 'moesaic[transformers]'"
    ) from error

Model = TypeVar("Model", bound=PreTrainedModel)


def replace_moe_blocks(
    model: Model, *, aux_loss_coef: float = 0.0, z_loss_coef: float = 0.0, impl: str | None = None
) -> Model:
    """Replace the MoE blocks of a transformers model by :class:`moesaic.MoE`, in place, weights carried over exactly.

    Knows Qwen3-MoE. Call it before :func:`moesaic.parallelize`; :func:`export_pretrained` goes the other way.

    Args:
        model: a ``Qwen3MoeForCausalLM`` or ``Qwen3MoeModel``, materialised.
        aux_loss_coef, z_loss_coef: of the balance losses, collected by :func:`moesaic.balance_losses`.
        impl: implementation of :func:`moesaic.grouped_mm`; None picks by device and dtype.

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no block to replace, is on the meta device, or is set to return router logits.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("path/to/qwen3-moe")
        >>> model = replace_moe_blocks(model)
    """
    blocks = [(name, m) for name, m in model.named_modules() if isinstance(m, Qwen3MoeSparseMoeBlock)]
    if not blocks:
        raise ValueError(f"model: {type(model).__name__} has no Qwen3-MoE block to replace")
    if model.config.output_router_logits:
        raise ValueError(
            "model: config.output_router_logits is set, but the blocks that give them are replaced; set it to False, "
            "and use aux_loss_coef with moesaic.balance_losses()"
        )
    for name, block in blocks:
        if block.gate.weight.is_meta:
            raise ValueError(f"model: '{name}' is on the meta device; materialise the model first")
        parent, _, child = name.rpartition(".")
        moe = _from_qwen3(block, model.config.hidden_act, aux_loss_coef, z_loss_coef, impl)
        setattr(model.get_submodule(parent), child, moe.train(block.training))
    return model


@torch.no_grad()
def _from_qwen3(
    block: Qwen3MoeSparseMoeBlock, activation: str, aux_loss_coef: float, z_loss_coef: float, impl: str | None
) -> MoE:
    gate, experts = block.gate, block.experts
    config = MoEConfig(
        dim=experts.hidden_dim,
        hidden_dim=experts.intermediate_dim,
        num_experts=experts.num_experts,
        top_k=gate.top_k,
        activation=activation,  # type: ignore[arg-type]  # MoEConfig checks it
        normalize_top_k=gate.norm_topk_prob,
        aux_loss_coef=aux_loss_coef,
        z_loss_coef=z_loss_coef,
    )
    moe = MoE(config, impl=impl, device=gate.weight.device, dtype=experts.down_proj.dtype)
    w1_EFD, w3_EFD = experts.gate_up_proj.chunk(2, dim=1)
    moe.experts.w1.copy_(w1_EFD.mT)
    moe.experts.w3.copy_(w3_EFD.mT)
    moe.experts.w2.copy_(experts.down_proj.mT)
    moe.router.weight.copy_(gate.weight)
    moe.router.weight.requires_grad_(gate.weight.requires_grad)
    for weight in (moe.experts.w1, moe.experts.w3):
        weight.requires_grad_(experts.gate_up_proj.requires_grad)
    moe.experts.w2.requires_grad_(experts.down_proj.requires_grad)
    return moe


@torch.no_grad()
def to_transformers_state_dict(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The whole state of a model with replaced MoE blocks, under transformers' names and layouts, on the CPU.

    Collective: DTensors are gathered one by one. Where ``keep`` is false this process takes part and returns nothing.

    Raises:
        ValueError: a layer has a shared expert or a balance bias, which Qwen3-MoE has no place for.
    """
    state: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor) -> None:
        if keep:
            state[name] = tensor.detach().cpu().contiguous()

    moes = {name: m for name, m in model.named_modules() if isinstance(m, MoE)}
    for name, moe in moes.items():
        if moe.shared is not None or moe.router.bias is not None:
            raise ValueError(f"'{name}' has a shared expert or a balance bias, which Qwen3-MoE has no place for")
        prefix = f"{name}." if name else ""
        w1, w3, w2 = (_whole(w) for w in (moe.experts.w1, moe.experts.w3, moe.experts.w2))
        put(f"{prefix}experts.gate_up_proj", torch.cat([w1.mT, w3.mT], dim=1))
        put(f"{prefix}experts.down_proj", w2.mT)
        put(f"{prefix}gate.weight", _whole(moe.router.weight))
    for name, tensor in model.state_dict().items():
        if not any(name.startswith(f"{moe}." if moe else "") for moe in moes):
            put(name, _whole(tensor))
    return state


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def export_pretrained(model: nn.Module, path: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write a model, parallelized or not, as a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    Collective: every rank calls it; rank 0 writes safetensors, config and tokenizer, and all return when it is done.

    Raises:
        ValueError: the model has state that transformers' architecture has no place for.
        RuntimeError: on the other ranks, where rank 0 could not write.
    """
    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    state = to_transformers_state_dict(model, keep=is_writer)
    failure: Exception | None = None
    if is_writer:
        try:
            config: Any = model.config
            _write(config, state, path, tokenizer)
        except Exception as error:
            failure = error
    if dist.is_initialized():
        # Also the barrier that all return after; without it a failure would leave the others waiting for rank 0.
        message = [None if failure is None else f"{type(failure).__name__}: {failure}"]
        dist.broadcast_object_list(message, src=0)
        if message[0] is not None and not is_writer:
            raise RuntimeError(f"rank 0 could not export to {path}: {message[0]}")
    if failure is not None:
        raise failure


def _write(
    config: PreTrainedConfig, state: dict[str, Tensor], path: str | Path, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    # save_pretrained logs, and returns, where the path is a file.
    Path(path).mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    missing, unexpected = plain.load_state_dict(state, strict=False, assign=True)
    lacking = [name for name in missing if name not in plain.all_tied_weights_keys]
    if lacking or unexpected:
        raise ValueError(f"cannot export: missing {lacking}, no place for {unexpected}")
    plain.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
