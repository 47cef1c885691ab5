"""Lay a model over the meshes: the one function a user calls."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moesaic import ranks
from moesaic.layers import GroupedExperts, MoE
from moesaic.parallel.adapted import holders_of, share_dropout
from moesaic.parallel.afterwards import guard
from moesaic.parallel.capacity import check_capacity
from moesaic.parallel.context import (
    add_context_parallelism,
    check_all_are_decoders,
    check_context,
    spare_attention_of_nothing,
)
from moesaic.parallel.decoder import (
    add_sequence_parallelism,
    attention_shard_dims,
    check_decoder,
    check_split,
    decoder_layers,
)
from moesaic.parallel.experts import ComputeOn, adapter_parameters, check_experts, distribute_experts
from moesaic.parallel.fsdp import shard_data_parallel
from moesaic.parallel.gradients import sum_partial_gradients
from moesaic.parallel.local import compute_on_local
from moesaic.parallel.loss import LossOverRanks
from moesaic.parallel.mesh import Meshes, check_meshes
from moesaic.parallel.meta import check_resets, is_on_meta, materialize, refuse_offloaded
from moesaic.parallel.recompute import Recompute, add_recomputation, check_recompute
from moesaic.parallel.same import check_same, describe, share_choices
from moesaic.parallel.split import Stages
from moesaic.parallel.stage import Stage
from moesaic.parallel.wrapped import check_no_other_plan, check_whole_sequences, decoders, language_models

Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: Model,
    meshes: Meshes,
    *,
    compute: ComputeOn = "dtensor",
    capacity: int | None = None,
    recompute: Recompute = "none",
    reshard_after_forward: bool = True,
) -> Model:
    """Lay a model over the meshes, in place.

    Experts become DTensors on ``(ep, etp)``: w1, w3 ``[Shard(0), Shard(2)]``, w2 ``[Shard(0), Shard(1)]``. Dense
    parameters are tensor-parallel over tp, tokens sequence-parallel: every rank routes its own. Ranks of cp have parts
    of the same sequences, and the attention of a decoder gathers keys and values over them. FSDP2 shards the dense
    parameters over dp and cp, and the experts over edp. Neither experts nor their hidden dim have to divide by an axis:
    the last ranks have what is left, with edp 1 possibly nothing.

    Gradients are sums over all ranks. Divide the loss once, by the number of tokens of *all* ranks, and call backward
    on this rank's part; after it every gradient is that of the whole. No other factor is applied anywhere. Gradients
    of gradients are refused.

    Without ``impl=`` all ranks compute with the same implementations: on the CPU the choice of the first rank is that
    of all, where ``moesaic tune`` or another kind of processor would make it another.

    All ranks run the same passes, in the same mode, on inputs that alike do or do not require gradients: each pass is
    a sequence of collectives, and a rank that leaves one out keeps the others waiting.

    How to call the result:

    * a :class:`moesaic.MoE`, or a stack of layers that treat each token alone: with this rank's tokens, any number of
      them, or with a DTensor sharded over tp on a dim of tokens; the result is placed alike.
      ``token_mask`` is of the same tokens, and placed as they are;
    * a transformers causal language model, or a wrapper around one (peft's, or your own): with its dp rank's whole
      ``input_ids [B, S]``, the same on every cp and tp rank. The logits are those of this rank's part of the sequence,
      ``meshes.sequence_positions(S)``. With ``labels=``, its dp rank's whole ``[B, S]`` too, the loss is this rank's
      part of the mean over the labels of all ranks that are not -100: call backward on it; the sum of it over the ranks
      is the mean. ``num_items_in_batch=`` takes the place of their number, as for several forward passes before a step.
      ``attention_mask [B, S]`` is of whole sequences, too. A loss that a wrapper makes of logits itself is not known:
      divide it by the number of tokens of all ranks.

    Add adapters and other modules before. A parallelized model loads whole tensors (``load_state_dict``) and, with cp
    and tp 1, generates; to copy, pickle or resize it is refused.

    Args:
        model: a :class:`moesaic.MoE`, a transformers decoder whose MoE blocks have been replaced
            (:func:`moesaic.integrations.transformers.swap_moe`), a wrapper around one that has no parameters of its
            own, or, with tp 1, any module with MoE layers. In a pipeline the stages of
            :func:`moesaic.parallel.split_into_stages`, or a stage of your own.
            On the mesh's device: parameters and buffers are taken from the first rank of the meshes. Or with all its
            parameters on the meta device: every rank then gets memory for its shards, uninitialised, and the caller
            fills them, with :func:`moesaic.layers.init_weights_` for a new model; buffers that are not on the meta
            device stay as they are.
        meshes: from :func:`moesaic.build_meshes`; all their ranks bring the same model.
        compute: how experts compute: ``"dtensor"``: on DTensors, through the operators' sharding rules; ``"local"``: on
            local tensors, with less overhead. The numbers are the same.
        capacity: room for so many copies of tokens from each rank to the experts of each other, in every layer. Then
            nothing of the routing is read to the host and all sizes are known before, and padding travels. A rank
            that routes more gets NaN for its tokens; :func:`moesaic.parallel.skip_overflowed_steps` lets such a step
            change no weight, and :func:`moesaic.parallel.most_copies` says how many there were. None: exact sizes, from
            counts that each layer reads to the host once.
        recompute: what is not kept for the backward pass, which computes it again (activation checkpointing):
            ``"none"``: all is kept. ``"experts"``: of the experts the tokens and the routing are kept, and not the
            hidden rows. ``"selective"``: of each layer products with dense weights, attention, and tokens that have
            come from other ranks and gone back are kept; all else is computed again, the experts too, and no token is
            sent twice. ``"full"``: the input of each layer is kept. A layer is one of a transformers decoder, or else
            a :class:`moesaic.MoE`. Gradients are those of ``"none"``. A cache of keys and values is not kept.
        reshard_after_forward: whether FSDP2 lets go of gathered weights after the forward pass of a layer, and gathers
            them again for its backward pass. False keeps them until then: more memory, and less is sent.

    Returns:
        ``model``.

    Raises:
        TypeError: ``meshes`` is not the result of :func:`moesaic.build_meshes`.
        ValueError: sizes that cannot be laid over the axes, with the legal ones; a model that the plan does not know;
            ranks of the meshes that bring models of other names, shapes, dtypes or configs. On all ranks of the meshes,
            before anything of the model is sent.
        RuntimeError: the first rank computes with the CPU kernels, and a rank has none. On all ranks.

    Example:
        >>> meshes = moesaic.build_meshes(tp=2, ep=2, etp=2)
        >>> moe = moesaic.parallelize(moesaic.MoE(config), meshes)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_meshes(meshes)
    if isinstance(model, Stages):
        for stage in model.stages:
            parallelize(
                stage,
                meshes,
                compute=compute,
                capacity=capacity,
                recompute=recompute,
                reshard_after_forward=reshard_after_forward,
            )
        return model
    moes = {name: m for name, m in model.named_modules() if isinstance(m, MoE)}
    found = decoders(model)

    def check() -> None:
        if compute not in ("dtensor", "local"):
            raise ValueError(f"compute: got {compute!r}; choose 'dtensor' or 'local'")
        check_capacity(capacity)
        check_recompute(recompute, model)
        for moe in moes.values():
            meshes.nodes.exchange(moe.config, capacity)
        _check(model, moes, found, meshes, compute)

    layers = [layer for decoder in found for layer in decoder_layers(decoder)]
    inside = {module for layer in layers for module in layer.modules()}
    blocks = layers + [moe for moe in moes.values() if moe not in inside]
    if not meshes.is_distributed:
        check()
        add_recomputation(recompute, blocks, moes.values(), [])
        return model

    all_ranks = meshes.all_ranks()
    # A rank that raised alone would leave the others waiting.
    ranks.together(check, group=all_ranks)
    asked = {"capacity": capacity, "recompute": recompute, "reshard_after_forward": reshard_after_forward}
    for name, *given in zip(asked, *(each.values() for each in ranks.gather(asked, all_ranks)), strict=True):
        if len(set(given)) > 1:
            raise ValueError(f"{name}: ranks ask for different ones, {given}; give all ranks the same")
    check_same(describe(model), all_ranks)
    if meshes.device_type in (None, "cpu"):
        share_choices(all_ranks)
    is_empty = is_on_meta(model)
    if not is_empty:
        _take_from_first_rank(model, all_ranks)
    holders = holders_of(meshes)
    for moe in moes.values():
        distribute_experts(moe, meshes, holders, compute, capacity)
    share_dropout(model, holders)
    for decoder in found if meshes.cp_size > 1 else []:
        # First, for tp cuts what cp has left.
        add_context_parallelism(decoder, decoder_layers(decoder), meshes.dense.get_group("cp"))
    if meshes.tp_size > 1:
        tp_mesh = meshes.dense["tp"]
        dims = {p: dim for decoder in found for p, dim in attention_shard_dims(decoder).items()}
        _distribute_dense(model, tp_mesh, dims)
        for decoder in found:
            add_sequence_parallelism(decoder, tp_mesh)
    for decoder in found if meshes.cp_size > 1 else []:
        spare_attention_of_nothing(decoder_layers(decoder))
    takers = language_models(model)
    loss = LossOverRanks(meshes, all_ranks)
    for language_model in takers:
        loss.take_over(language_model)
    dense_groups = [meshes.dense.get_group(axis).group_name for axis in meshes.sequence_axes]
    add_recomputation(recompute, blocks, moes.values(), dense_groups)
    if isinstance(model, MoE):
        _accept_dtensors(model)
    shard_data_parallel(model, blocks, meshes, reshard_after_forward)
    check_resets(model)
    if is_empty:
        materialize(model, torch.device(meshes.dense.device_type))
    if not meshes.has_own_tokens:
        # On the parameters that stay: memory makes new ones.
        sum_partial_gradients(_dense_parameters(model))
    if meshes.layout.edp == 1:
        # Where etp cuts a weight, one factor of its adapter is whole, and meets a part of the hidden dim on every rank.
        sum_partial_gradients(p for moe in moes.values() for p in adapter_parameters(moe.experts))
    guard(model, takers, meshes)
    return model


def _check(model: nn.Module, moes: dict[str, MoE], found: list[nn.Module], meshes: Meshes, compute: ComputeOn) -> None:
    check_no_other_plan(model)
    refuse_offloaded(model)
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta is not None and not is_on_meta(model):
        raise ValueError(
            f"model: parameter '{meta}' is on the meta device and others are not; materialise all of them, or none"
        )
    device = meshes.device_type
    places = {name: p.device.type for name, p in model.named_parameters() if device is not None}
    elsewhere = next((name for name, place in places.items() if place not in (device, "meta")), None)
    if elsewhere is not None:
        raise ValueError(
            f"model: parameter '{elsewhere}' is not on the meshes' device; call model.to('{device}') first"
        )
    placed = next((name for name, p in model.named_parameters() if isinstance(p, DTensor)), None)
    if placed is not None:
        raise ValueError(f"model: parameter '{placed}' is already a DTensor; call parallelize once for each model")
    if not meshes.is_distributed and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"meshes: built before the process group of {dist.get_world_size()} ranks; call build_meshes() after "
            "torch.distributed.init_process_group()"
        )
    if meshes.pp_size > 1 and not isinstance(model, Stage) and found and any(language_models(model)):
        raise ValueError(
            f"model: meshes has pp {meshes.pp_size}, and this {type(model).__name__} is whole; give the stages that "
            "moesaic.parallel.split_into_stages(model, meshes) makes of it"
        )
    # Of a model whose first layers are dense a stage may have no other ones.
    if not moes and not isinstance(model, Stage):
        raise ValueError(
            "model: it has no moesaic.MoE layer; for a transformers model call "
            "moesaic.integrations.transformers.swap_moe first"
        )
    if meshes.tp_size > 1 and not isinstance(model, MoE):
        _check_tensor_parallel(model, moes, found, meshes.tp_size)
    if meshes.cp_size > 1:
        check_all_are_decoders(model, found)
    for decoder in found if meshes.cp_size > 1 else []:
        check_whole_sequences(model, decoder, "cp")
        check_context(decoder)
    for name, moe in moes.items():
        check_experts(name or type(moe).__name__, moe, meshes.layout, compute)


def _check_tensor_parallel(model: nn.Module, moes: dict[str, MoE], found: list[nn.Module], tp: int) -> None:
    inside = {module for decoder in found for module in decoder.modules()}
    if not all(moe in inside for moe in moes.values()):
        raise ValueError(
            f"model: tp > 1 works for a moesaic.MoE or a transformers decoder, not for {type(model).__name__}; use tp=1"
        )
    for decoder in found:
        check_whole_sequences(model, decoder, "tp")
        check_decoder(decoder, "tp")
        check_split(decoder, tp)


@torch.no_grad()
def _take_from_first_rank(model: nn.Module, group: dist.ProcessGroup) -> None:
    source = dist.get_global_rank(group, 0)
    for tensor in [*model.parameters(), *model.buffers()]:
        whole = tensor.detach().contiguous()  # NCCL sends nothing else
        dist.broadcast(whole, src=source, group=group)
        tensor.copy_(whole)


def _dense_parameters(model: nn.Module) -> list[nn.Parameter]:
    expert_parameters = {p for m in model.modules() if isinstance(m, GroupedExperts) for p in m.parameters()}
    return [p for p in model.parameters() if p not in expert_parameters]


def _distribute_dense(model: nn.Module, mesh: DeviceMesh, shard_dims: dict[nn.Parameter, int]) -> None:
    """Make every parameter but the experts' a DTensor on tp, and let its module compute with the local part."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay tied
    of_experts = {m for experts in model.modules() if isinstance(experts, GroupedExperts) for m in experts.modules()}
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if module in of_experts or not own:
            continue
        for name, parameter in own.items():
            if parameter not in made:
                placement = Shard(shard_dims[parameter]) if parameter in shard_dims else Replicate()
                shard = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None).clone()
                made[parameter] = nn.Parameter(shard, requires_grad=parameter.requires_grad)
            setattr(module, name, made[parameter])
        compute_on_local(module)


def _accept_dtensors(moe: MoE) -> None:
    """Let a bare layer take its tokens as a DTensor, and give the result back placed alike."""
    inner = moe.forward

    def forward(x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        if not isinstance(x, DTensor):
            return inner(x, token_mask)
        for placement in x.placements:
            if type(placement) is not Shard or placement.dim == x.ndim - 1:
                raise ValueError(
                    f"x: tokens must be sharded on a dim of tokens, got {list(x.placements)}; "
                    f"x.redistribute(placements=[Shard({x.ndim - 2})]) gets there"
                )
        if token_mask is not None and (not isinstance(token_mask, DTensor) or token_mask.placements != x.placements):
            placed = list(token_mask.placements) if isinstance(token_mask, DTensor) else "a plain tensor"
            raise ValueError(f"token_mask: expected a DTensor placed {list(x.placements)} like x, got {placed}")
        y = inner(x.to_local(grad_placements=x.placements), None if token_mask is None else token_mask.to_local())
        contiguous = torch.empty(x.shape, device="meta").stride()
        return DTensor.from_local(y, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=contiguous)

    moe.forward = forward
