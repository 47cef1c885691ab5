"""How the attention of a transformers decoder is split by heads over the tp ranks.

For most families transformers' own tensor-parallel plan is used. The table here is for families whose plan leaves
parameters out, or would have every rank compute all heads. A parameter that neither knows is refused by name.

==============  ==============  =====================  ===================================================
role            on the tp axis  its gradient           what it is
==============  ==============  =====================  ===================================================
``"column"``    ``Shard(0)``    the same               a projection to heads, or one number a head
``"row"``       ``Shard(1)``    the same               the projection of all heads to the model dim
its bias        Replicate       Partial: every         added once, to the rank's shard of the sequence
                                rank's tokens
``"wide norm"`` ``Shard(0)``    the same               a norm over the heads together
``"whole"``     Replicate       Partial: every         a norm of a single head, or what comes before heads
                                rank's heads
==============  ==============  =====================  ===================================================

A projection may have low-rank adapters of peft. The factor that meets the dim that is cut is cut with it: of a column
projection ``lora_B``, ``Shard(0)``, and of a row projection ``lora_A``, ``Shard(1)``. The other factor is whole.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.ops.arguments import divisors
from moesaic.parallel.adapted import base_of, factors, share_dropout_of_whole, tensor_parallel_problem
from moesaic.parallel.collectives import sum_over_ranks

Role = Literal["column", "row", "wide norm", "whole"]

_FORMS: dict[Role, Any] = {
    "column": (nn.Linear, nn.Parameter),
    "row": nn.Linear,
    "wide norm": nn.Module,
    "whole": nn.Module,
}

# Styles of transformers' plans that say enough. With "colwise_gather_output" every rank would compute all heads.
_STYLES: dict[str, Role] = {
    "colwise": "column",
    "rowwise": "row",
    "replicated_with_grad_allreduce": "whole",
    "mla_kv_a_proj": "whole",
}

_HEADS: dict[str, Role] = {"q_proj": "column", "k_proj": "column", "v_proj": "column", "o_proj": "row"}
_HEAD_NORMS: dict[str, Role] = {**_HEADS, "q_norm": "whole", "k_norm": "whole"}
_WIDE_NORMS: dict[str, Role] = {**_HEADS, "q_norm": "wide norm", "k_norm": "wide norm"}
_LATENT: dict[str, Role] = {
    "q_proj": "column",
    "q_a_proj": "whole",
    "q_a_layernorm": "whole",
    "q_b_proj": "column",
    "kv_a_proj_with_mqa": "whole",
    "kv_a_layernorm": "whole",
    "kv_b_proj": "column",
    "o_proj": "row",
}

# By the name of the attention's class.
TABLE: dict[str, dict[str, Role]] = {
    "DeepseekV2Attention": _LATENT,
    "DeepseekV3Attention": _LATENT,
    "FlexOlmoAttention": _WIDE_NORMS,
    "Glm4MoeAttention": _HEAD_NORMS,
    "Glm4MoeLiteAttention": _LATENT,
    "GptOssAttention": {**_HEADS, "sinks": "column"},
    "GraniteMoeAttention": _HEADS,
    "GraniteMoeSharedAttention": _HEADS,
    "HunYuanMoEV1Attention": {**_HEADS, "query_layernorm": "whole", "key_layernorm": "whole"},
    "MiniMaxM2Attention": _WIDE_NORMS,
    "Mistral4Attention": _LATENT,
    "OlmoeAttention": _WIDE_NORMS,
    "Qwen3OmniMoeThinkerTextAttention": _HEAD_NORMS,
    "Qwen3VLMoeTextAttention": _HEAD_NORMS,
}


class Part(NamedTuple):
    """A child of an attention, or a parameter of its own, and its role."""

    name: str
    what: Any
    role: Role


def parts_of(attention: nn.Module, plan: dict[str, str]) -> list[Part]:
    """Everything in an attention that has parameters.

    Args:
        attention: of a decoder layer.
        plan: transformers' plan for it, from names within the attention to styles.

    Raises:
        ValueError: one that has no role, or not the form that its role asks for.
    """
    roles = TABLE.get(type(attention).__name__) or {n: _STYLES[style] for n, style in plan.items() if style in _STYLES}
    parts = []
    for name, what in _parametrized(attention):
        role = roles.get(name)
        if role is None:
            raise ValueError(f"'{name}' ({type(what).__name__}) of {type(attention).__name__} is not known to the plan")
        if not isinstance(base_of(what), _FORMS[role]):
            raise ValueError(
                f"'{name}' ({type(what).__name__}) of {type(attention).__name__} is not a linear layer; if an adapter "
                "wraps it, merge it first (of peft: merge_and_unload())"
            )
        if problem := tensor_parallel_problem(what):
            raise ValueError(f"the adapter on '{name}' of {type(attention).__name__} {problem}")
        parts.append(Part(name, what, role))
    if not any(part.role == "row" for part in parts):
        raise ValueError(f"{type(attention).__name__} has no output projection that the plan knows")
    return parts


def _parametrized(attention: nn.Module) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    for name, child in attention.named_children():
        if any(True for _ in child.parameters()):
            yield name, child
    yield from attention.named_parameters(recurse=False)


def check_heads(attention: Any, parts: list[Part], tp: int) -> None:
    """Raise ``ValueError`` unless all heads can be split over ``tp`` ranks."""
    config = attention.config
    for name, _, role in parts:
        if role != "column":
            continue
        heads = config.num_key_value_heads if name in ("k_proj", "v_proj") else config.num_attention_heads
        if heads % tp:
            raise ValueError(f"{tp} does not divide the {heads} heads of '{name}'; choose from {divisors(heads)}")


def shard_dims(parts: list[Part]) -> dict[nn.Parameter, int]:
    """Which dim of each parameter is sharded over tp; all others are replicated."""
    dims: dict[nn.Parameter, int] = {}
    for _, what, role in parts:
        base = base_of(what)
        if role == "row":
            dims |= dict.fromkeys([base.weight, *factors(what, "lora_A")], 1)
        elif role != "whole":
            own = [what] if isinstance(what, nn.Parameter) else [*base.parameters(), *factors(what, "lora_B")]
            dims |= dict.fromkeys(own, 0)
    return dims


def split_by_heads(parts: list[Part], scatter: Callable[[Tensor], Tensor], group: dist.ProcessGroup) -> None:
    """Let the parts compute with this rank's heads.

    Args:
        parts: of one attention.
        scatter: sums over the ranks of ``group``, and keeps this rank's shard of the sequence.
        group: the tp ranks.
    """
    for _, what, role in parts:
        if isinstance(what, nn.Module):
            share_dropout_of_whole(what, group, of_heads=role == "row")
        if role == "row" and base_of(what) is not what:
            _sum_with_adapters(what, scatter, group)
        elif role == "row":
            _sum_then_add_bias(what, scatter)
        elif role == "wide norm":
            _normalize_over_ranks(what, group)


def _sum_then_add_bias(linear: Any, scatter: Callable[[Tensor], Tensor]) -> None:
    def forward(x: Tensor) -> Tensor:
        y = scatter(F.linear(x, linear.weight))
        return y if linear.bias is None else y + linear.bias

    linear.forward = forward


def _sum_with_adapters(layer: Any, scatter: Callable[[Tensor], Tensor], group: dist.ProcessGroup) -> None:
    """What an adapter adds is a part of the sum, too. So its layer sums, and the base adds its bias on one rank."""
    base, whole = layer.base_layer, layer.forward

    def product(x: Tensor) -> Tensor:
        y = F.linear(x, base.weight)
        return y if base.bias is None else y + base.bias * (group.rank() == 0)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return scatter(whole(x, *args, **kwargs))

    base.forward, layer.forward = product, forward


def _normalize_over_ranks(norm: Any, group: dist.ProcessGroup) -> None:
    """The RMS norm of OLMoE and MiniMax-M2, its mean taken over the heads of all ranks."""
    width = norm.weight.shape[0]

    def forward(x: Tensor) -> Tensor:
        x_fp32 = x.float()
        mean_square = sum_over_ranks(x_fp32.square().sum(-1, keepdim=True), group) / width
        return norm.weight * (x_fp32 * (mean_square + norm.variance_epsilon).rsqrt()).to(x.dtype)

    norm.forward = forward
