"""torchtitan's MoE layers on moesaic, through torchtitan's own overrides: no fork, one flag.

``--override.imports moesaic.integrations.torchtitan.experts`` (or another function of this module) on the command line
of torchtitan replaces parts of every MoE layer of the model. Options follow the name as JSON:
``'moesaic.integrations.torchtitan.routed_experts={"etp": 2}'``.

Needs the extra: ``pip install '.[torchtitan]'`` in a checkout of moesaic.

torchtitan finds a function by the module that it is written in. So these stand here, and no module of this package may
have the name of one of them.
"""

from moesaic.integrations.torchtitan.seams import check_seams

check_seams()

from torchtitan.config import override
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts, GptOssMoE
from torchtitan.protocols.sharding import LocalMapConfig, ShardingConfig

from moesaic.integrations.torchtitan.known import derived, is_lora
from moesaic.integrations.torchtitan.layer import MeshMoE, token_mask
from moesaic.integrations.torchtitan.products import GptOssProductExperts, ProductExperts
from moesaic.integrations.torchtitan.routed import GptOssExperts, MeshRoutedExperts, SwiGLUExperts
from moesaic.integrations.torchtitan.routing import Choice, Gate, Router, UnbiasedChoice
from moesaic.integrations.torchtitan.saved import save_our_operators
from moesaic.layers.config import AuxLoss, MoEConfig
from moesaic.ops.arguments import check_int
from moesaic.ops.experts_mlp.activation import CLAMPED_SWIGLU_LIMIT

__all__ = ["experts", "moe", "routed_experts", "token_mask"]

save_our_operators()

PRODUCTS = {
    GroupedExperts.Config: ProductExperts.Config,
    GptOssGroupedExperts.Config: GptOssProductExperts.Config,
}
ON_MESH = {GroupedExperts.Config: SwiGLUExperts.Config, GptOssGroupedExperts.Config: GptOssExperts.Config}


@override(target=GroupedExperts.Config, description="products of moesaic.grouped_mm, in the dtype of the weights")
def experts(config: GroupedExperts.Config) -> GroupedExperts.Config:
    """Compute the experts with :func:`moesaic.grouped_mm`. All else stays torchtitan's.

    Parameters, their names and shardings, dispatchers and backends are as before. The products are in the dtype of the
    weights, which FSDP's mixed precision chooses; torchtitan computes them in bf16 whatever it is. Any number of rows
    works, with any alignment.

    Raises:
        ValueError: experts of a class that is not known here, such as those that a converter makes.
    """
    return derived("experts", config, PRODUCTS)


@override(target=RoutedExperts.Config, description="moesaic's exchange of tokens and experts_mlp, over ep x etp")
def routed_experts(config: RoutedExperts.Config, *, etp: int = 1) -> RoutedExperts.Config:
    """Exchange tokens, and compute the experts, as :func:`moesaic.parallelize` does.

    A token goes once to each rank that has some of its experts, however many they are, and one sum comes back. The
    experts are one call of :func:`moesaic.experts_mlp`.

    Args:
        config: what torchtitan hands over.
        etp: ranks among which each expert's hidden dim is cut. torchtitan's ``expert_parallel_degree`` is then
            ``ep * etp``: neighbouring ranks share experts. The weights are DTensors on the mesh ``(ep, etp)``,
            ``w1_EFD`` and ``w3_EFD`` placed ``[Shard(0), Shard(1)]`` and ``w2_EDF`` ``[Shard(0), Shard(2)]``, in the
            forward pass too. More than 1 needs the backend ``partial_dtensor``: FSDP2 takes a parameter on a mesh of
            its own of at most two axes.

    Raises:
        TypeError: ``etp`` is no integer.
        ValueError: experts or a dispatcher of a class that is not known here; ``etp`` below 1, or one that does not
            divide the hidden dim. When ranks are laid out: an ``etp`` that does not divide ``expert_parallel_degree``,
            or a backend in which it cannot be more than 1.
    """
    check_int("etp", etp)
    if etp < 1:
        raise ValueError(f"etp: must be at least 1, got {etp}")
    dispatcher, inner = config.token_dispatcher, config.inner_experts
    ours = derived("routed_experts", inner, ON_MESH, etp=etp)
    if type(dispatcher) not in (LocalTokenDispatcher.Config, AllToAllTokenDispatcher.Config):
        raise ValueError(
            f"routed_experts: would replace {type(dispatcher).__qualname__}, which was chosen for this model; build "
            "the model with moe_comm_backend='standard', or use moesaic.integrations.torchtitan.experts, which keeps "
            "every dispatcher"
        )
    if inner.hidden_dim % etp:
        raise ValueError(f"etp: {etp} does not divide the experts' hidden_dim {inner.hidden_dim}; choose a divisor")
    if isinstance(inner, GptOssGroupedExperts.Config) and inner.swiglu_limit != CLAMPED_SWIGLU_LIMIT:
        raise ValueError(
            f"routed_experts: swiglu_limit {inner.swiglu_limit} is not the {CLAMPED_SWIGLU_LIMIT} of "
            "moesaic.experts_mlp; use moesaic.integrations.torchtitan.experts, which takes any"
        )
    return derived("routed_experts", config, {RoutedExperts.Config: MeshRoutedExperts.Config}, inner_experts=ours)


@override(target=MoE.Config, description="moesaic's router, with balance losses and masks, exchange and experts")
def moe(
    config: MoE.Config,
    *,
    etp: int = 1,
    aux_loss_coef: float = 0.0,
    aux_loss: AuxLoss = "batch",
    z_loss_coef: float = 0.0,
    forwards_per_step: int = 1,
) -> MoE.Config:
    """Route as :class:`moesaic.TopKRouter` does, and all that :func:`routed_experts` does.

    The gate computes in fp32 on every device. The gradients of the balance losses come with those of the layer's
    output, as with :func:`moesaic.layers.attach_balance_losses`: torchtitan's loss, and what it logs, is the main loss
    alone. Inside :func:`moesaic.balance_losses` the values are collected. torchtitan's counters of tokens, and its
    update of the bias by them, work as before. :func:`token_mask` marks padding.

    Args:
        config: what torchtitan hands over.
        etp: see :func:`routed_experts`.
        aux_loss_coef, aux_loss, z_loss_coef: see :class:`moesaic.MoEConfig`. Sums and counts are over the tokens of all
            ranks, or for ``aux_loss="sequence"`` over all parts of a sequence.
        forwards_per_step: how many forward passes of the layer a step has: steps of gradient accumulation times
            microbatches of the pipeline. Each has a balance loss, and they are divided by this number.

    Raises:
        TypeError, ValueError: as :func:`routed_experts` and :class:`moesaic.MoEConfig`; a gate, router or layer of a
            class that is not known here. In the first step of an optimizer: another number of forward passes.
    """
    router, gate = config.router, config.router.gate
    check_int("forwards_per_step", forwards_per_step)
    if forwards_per_step < 1:
        raise ValueError(f"forwards_per_step: must be at least 1, got {forwards_per_step}")
    if router.num_expert_groups is not None and router.num_limited_groups is None:
        raise ValueError("num_limited_groups: None, though there are num_expert_groups; set it in the router's config")
    ours = MoEConfig(
        dim=gate.in_features,
        hidden_dim=config.routed_experts.inner_experts.hidden_dim,
        num_experts=router.num_experts,
        top_k=router.top_k,
        score=router.score_func,
        normalize_top_k=router.route_norm,
        route_scale=router.route_scale,
        num_groups=router.num_expert_groups or 1,
        top_groups=router.num_limited_groups or 1,
        aux_loss_coef=aux_loss_coef,
        aux_loss=aux_loss,
        z_loss_coef=z_loss_coef,
    )
    choice = (UnbiasedChoice if config.load_balance_coeff is None else Choice).Config(
        router=ours,
        force_balance=router._debug_force_load_balance,
        forwards_per_step=forwards_per_step,
    )
    choice.sharding_config = _sharding_of_choice(config)
    if not is_lora(gate):
        gate = derived("moe", gate, {Linear.Config: Gate.Config})
    return derived(
        "moe",
        config,
        dict.fromkeys((MoE.Config, GptOssMoE.Config), MeshMoE.Config),
        router=derived("moe", router, {TokenChoiceTopKRouter.Config: Router.Config}, gate=gate, choice=choice),
        routed_experts=routed_experts(config.routed_experts, etp=etp),
    )


def _sharding_of_choice(config: MoE.Config) -> ShardingConfig | None:
    """Where what follows the gate gets its tensors: where the routed experts get theirs."""
    routed = config.routed_experts.sharding_config
    if routed is None or config.sharding_config is None:
        return None
    tokens = routed.in_dst_shardings["topk_scores_BLK"]
    inputs = {"logits_BLE": tokens}
    if config.load_balance_coeff is not None:
        inputs["expert_bias_E"] = config.sharding_config.state_shardings["expert_bias_E"]
    return ShardingConfig(
        in_src_shardings=inputs,
        in_dst_shardings=inputs,
        out_src_shardings=(tokens, tokens, routed.in_dst_shardings["num_local_tokens_per_expert_E"]),
        local_map=LocalMapConfig(in_grad_placements=tuple(inputs.values())),
    )
