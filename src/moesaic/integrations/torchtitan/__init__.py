"""torchtitan's MoE layers on moesaic, through torchtitan's own overrides: no fork, one flag.

``--override.imports moesaic.integrations.torchtitan.experts`` (or another function of this module) on the command line
of torchtitan replaces parts of every MoE layer of the model. Options follow the name as JSON:
``'moesaic.integrations.torchtitan.routed_experts={"etp": 2}'``.

Needs the extra: ``pip install moesaic[torchtitan]``.

torchtitan finds a function by the module that it is written in. So these stand here, and no module of this package may
have the name of one of them.
"""

from moesaic.integrations.torchtitan.seams import check_seams

check_seams()

from torchtitan.config import derive, override
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

from moesaic.integrations.torchtitan.products import GptOssProductExperts, ProductExperts
from moesaic.integrations.torchtitan.routed import GptOssExperts, MeshRoutedExperts, SwiGLUExperts
from moesaic.integrations.torchtitan.saved import save_our_operators
from moesaic.ops.arguments import check_int
from moesaic.ops.experts_mlp.activation import CLAMPED_SWIGLU_LIMIT

__all__ = ["experts", "routed_experts"]

save_our_operators()


@override(target=GroupedExperts.Config, description="products of moesaic.grouped_mm, in the dtype of the weights")
def experts(config: GroupedExperts.Config) -> GroupedExperts.Config:
    """Compute the experts with :func:`moesaic.grouped_mm`. All else stays torchtitan's.

    Parameters, their names and shardings, dispatchers and backends are as before. The products are in the dtype of the
    weights, which FSDP's mixed precision chooses; torchtitan computes them in bf16 whatever it is. Any number of rows
    works, with any alignment.

    Raises:
        ValueError: experts of a class that is not known here, such as those that a converter makes.
    """
    if type(config) is GroupedExperts.Config:
        return derive(config, ProductExperts.Config)
    if type(config) is GptOssGroupedExperts.Config:
        return derive(config, GptOssProductExperts.Config)
    raise ValueError(_unknown("experts", config))


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
    if type(config) is not RoutedExperts.Config:
        raise ValueError(_unknown("routed_experts", config))
    dispatcher, inner = config.token_dispatcher, config.inner_experts
    if type(dispatcher) not in (LocalTokenDispatcher.Config, AllToAllTokenDispatcher.Config):
        raise ValueError(
            f"routed_experts: would replace {type(dispatcher).__qualname__}, which was chosen for this model; build "
            "the model with moe_comm_backend='standard', or use moesaic.integrations.torchtitan.experts, which keeps "
            "every dispatcher"
        )
    if inner.hidden_dim % etp:
        raise ValueError(f"etp: {etp} does not divide the experts' hidden_dim {inner.hidden_dim}; choose a divisor")
    if type(inner) is GroupedExperts.Config:
        return derive(config, MeshRoutedExperts.Config, inner_experts=derive(inner, SwiGLUExperts.Config, etp=etp))
    if type(inner) is GptOssGroupedExperts.Config:
        if inner.swiglu_limit != CLAMPED_SWIGLU_LIMIT:
            raise ValueError(
                f"routed_experts: swiglu_limit {inner.swiglu_limit} is not the {CLAMPED_SWIGLU_LIMIT} of "
                "moesaic.experts_mlp; use moesaic.integrations.torchtitan.experts, which takes any"
            )
        return derive(config, MeshRoutedExperts.Config, inner_experts=derive(inner, GptOssExperts.Config, etp=etp))
    raise ValueError(_unknown("routed_experts", inner))


def _unknown(override_name: str, config: object) -> str:
    name = type(config).__qualname__
    return (
        f"{override_name}: {type(config).__module__}.{name} is not one of torchtitan's own classes, and what it adds "
        "would be lost; take the converter or override that made it out, or leave this override out"
    )
