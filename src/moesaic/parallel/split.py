"""Cut a transformers causal language model into the stages of a pipeline, and keep those of this rank."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesaic import ranks
from moesaic.layers.initial import OfAWhole, init_as_
from moesaic.layers.packed import PackedWeight
from moesaic.parallel.decoder import LAYERS, Elsewhere, decoder_layers, leaves_shards_alone
from moesaic.parallel.mesh import Meshes, check_meshes
from moesaic.parallel.same import check_same, describe
from moesaic.parallel.schedules import SCHEDULES, check_schedule
from moesaic.parallel.stage import Stage
from moesaic.parallel.wrapped import decoders, language_models
from moesaic.sharding.parts import local_part


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How a model is cut into stages, and in which order they compute.

    Attributes:
        schedule: ``"gpipe"``, ``"1f1b"``, ``"interleaved"``, ``"zero-bubble"`` or ``"zbv"``: see ``docs/pipelines.md``.
        stages_per_rank: None for 1 with ``"gpipe"`` and ``"1f1b"``, and for 2 with the others.
        layers: how many layers each stage has, the first stage first. None: as equal as they can be, with what does not
            divide in the middle, for the ends have the embedding and the head.
    """

    schedule: str = "1f1b"
    stages_per_rank: int | None = None
    layers: Sequence[int] | None = None

    def stages_on_a_rank(self) -> int:
        """How many stages a rank has."""
        return self.stages_per_rank or SCHEDULES[self.schedule].stages_per_rank


def layers_of_stages(num_layers: int, num_stages: int, given: Sequence[int] | None = None) -> list[range]:
    """Which layers each stage has.

    Raises:
        ValueError: there are more stages than layers, or the ``given`` numbers are not of all layers.
    """
    if given is not None:
        if len(given) != num_stages or sum(given) != num_layers or min(given) < 1:
            raise ValueError(
                f"layers: expected {num_stages} numbers of at least 1, one for each stage, that add up to the "
                f"{num_layers} layers of the model, got {list(given)}"
            )
        sizes = list(given)
    else:
        if num_stages > num_layers:
            raise ValueError(
                f"pp: {num_stages} stages are more than the {num_layers} layers of the model; choose pp * "
                f"stages_per_rank up to {num_layers}"
            )
        size, rest = divmod(num_layers, num_stages)
        # The last stage has the head, and the first the embedding.
        middle_first = [*range(1, num_stages - 1), 0, num_stages - 1]
        sizes = [size + (stage in middle_first[:rest]) for stage in range(num_stages)]
    ends = [sum(sizes[: i + 1]) for i in range(num_stages)]
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


class Stages(OfAWhole):
    """The stages of a model that this rank has a part of. :func:`split_into_stages` makes it.

    Call it as the model, to evaluate: without gradients, it takes ``input_ids`` of any size and gives the logits on the
    ranks of the last stage, and None elsewhere. To train there is :class:`moesaic.parallel.Pipeline`.

    Attributes:
        parts: the stages, the first ones first.
        skeleton: the whole model on the meta device, for names, shapes and the config. It is no submodule.
        meshes: those of this rank's stages.
        options: how the model was cut.
        shared: names of the embedding and of the head, where these are one weight that two stages have; else None.
    """

    def __init__(
        self,
        parts: Sequence[Stage],
        skeleton: Any,
        meshes: Meshes,
        options: PipelineConfig,
        shared: tuple[str, str] | None,
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        # In a tuple, for it is no submodule.
        self._whole = (skeleton,)
        self.meshes, self.options, self.shared = meshes, options, shared

    @property
    def skeleton(self) -> Any:
        """The whole model, on the meta device."""
        return self._whole[0]

    @property
    def config(self) -> Any:
        """That of the model."""
        return self.skeleton.config

    @property
    def stages(self) -> list[Stage]:
        """The stages, typed."""
        return [part for part in self.parts if isinstance(part, Stage)]

    @property
    def has_last(self) -> bool:
        """Whether the last stage is here, which gives the logits."""
        return any(stage.is_last for stage in self.stages)

    def get_output_embeddings(self) -> nn.Module | None:
        """The head, if it is here: as of a transformers model, for what treats it apart."""
        return self.stages[-1].whole.get_output_embeddings() if self.has_last else None

    def shared_weight(self, *, of_head: bool = False) -> nn.Parameter | None:
        """The embedding, or with ``of_head`` the head, if it is here and another stage has the same weight."""
        if self.shared is None:
            return None
        names = {name_in_whole(name): parameter for name, parameter in self.named_parameters()}
        return names.get(self.shared[of_head])

    @torch.no_grad()
    def init_parts_(self, std: float | None, seed: int) -> None:
        """See :func:`moesaic.layers.init_weights_`."""
        known_as = {} if self.shared is None else {self.shared[1]: self.shared[0]}
        for stage in self.stages:
            init_as_(stage.whole, std, seed, known_as)
        # In the whole model the head is the last to set the weight: an embedding alone has zeros for padding.
        if (head := self.shared_weight(of_head=True)) is not None:
            dist.send(local_part(head)[0].contiguous(), group=self.meshes.stages, group_dst=self.rank_of(0))
        elif (embedding := self.shared_weight()) is not None:
            local, _ = local_part(embedding)
            received = torch.empty_like(local, memory_format=torch.contiguous_format)
            dist.recv(received, group=self.meshes.stages, group_src=self.rank_of(self.stages[0].count - 1))
            local.copy_(received)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, *, everywhere: bool = False, **kwargs: Any) -> Tensor | None:
        """The logits ``[B, s, V]`` of this rank's shard of the sequences, on the ranks of the last stage.

        Args:
            input_ids: ``[B, S]``, the same on all stages.
            everywhere: on the ranks of the other stages, too.
            kwargs: see :meth:`Stage.forward`.
        """
        result: Tensor | None = None
        last, head = self.stages[0].count - 1, self.skeleton.get_output_embeddings()
        # Autocast may change dtypes, and who receives expects those of the weights.
        dtype = self.skeleton.get_input_embeddings().weight.dtype
        for stage in self.stages:
            x = input_ids if stage.is_first else self._from_stage(stage.number - 1, input_ids, result)
            result = x = stage(x, input_ids=input_ids, **kwargs)
            if not stage.is_last and (peer := self.rank_of(stage.number + 1)) != self.meshes.pp_rank:
                dist.send(x.to(dtype).contiguous(), group=self.meshes.stages, group_dst=peer)
        if not everywhere:
            return result if self.has_last else None
        if not self.has_last:
            B, S = input_ids.shape
            length = len(self.meshes.sequence_positions(S))
            result = torch.empty(B, length, head.weight.shape[0], dtype=head.weight.dtype, device=input_ids.device)
        assert result is not None
        result = result.to(head.weight.dtype).contiguous()
        dist.broadcast(result, group=self.meshes.stages, group_src=self.rank_of(last))
        return result

    def rank_of(self, stage: int) -> int:
        """Which rank along pp has a stage."""
        return SCHEDULES[self.options.schedule].rank_of(stage, self.meshes.pp_size)

    def hidden_like(self, input_ids: Tensor) -> Tensor:
        """Uninitialised: what a stage gives to the next one for these tokens."""
        B, S = input_ids.shape
        embedding = self.skeleton.get_input_embeddings().weight
        length = len(self.meshes.sequence_positions(S))
        return torch.empty(B, length, embedding.shape[1], dtype=embedding.dtype, device=input_ids.device)

    def _from_stage(self, number: int, input_ids: Tensor, here: Tensor | None) -> Tensor:
        peer = self.rank_of(number)
        if peer == self.meshes.pp_rank:
            assert here is not None
            return here
        received = self.hidden_like(input_ids)
        dist.recv(received, group=self.meshes.stages, group_src=peer)
        return received


def whole_of(model: Any) -> Any:
    """The whole model, for names and shapes: of stages their skeleton on the meta device, else the model itself."""
    return model.skeleton if isinstance(model, Stages) else model


def name_in_whole(name: str) -> str:
    """The name that a parameter, a buffer or a module of :class:`Stages` has in the whole model."""
    return name.split(".", 3)[3]


def module_in_whole(model: nn.Module, name: str) -> Any:
    """The module that has a name in the whole model; of :class:`Stages` None where another rank has it."""
    if not isinstance(model, Stages):
        return model.get_submodule(name)
    for stage in model.stages:
        # Below a module that another stage has there is nothing.
        module = functools.reduce(lambda found, part: getattr(found, part, None), name.split("."), stage.whole)
        if module is not None and not isinstance(module, Elsewhere):
            return module
    return None


def modules_in_whole(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that are here, with their names in the whole model."""
    for whole in [stage.whole for stage in model.stages] if isinstance(model, Stages) else [model]:
        for name, module in whole.named_modules():
            if not isinstance(module, Elsewhere):
                yield name, module


def names_in_whole(model: nn.Module) -> dict[str, str]:
    """Of each entry of a model's state, its name in the whole model: another one in stages, elsewhere the same."""
    stages = isinstance(model, Stages)
    return {name: name_in_whole(name) if stages else name for name in model.state_dict(keep_vars=True)}


def split_into_stages(model: nn.Module, meshes: Meshes, config: PipelineConfig | None = None) -> Stages:
    """Cut a transformers causal language model by its layers, and keep the stages of this rank.

    The embedding goes to the first stage, the last norm and the head to the last. Where embedding and head are one
    weight, both stages have it, and its gradients are added. Layers keep their numbers, so names of parameters, and
    with them checkpoints and exports, do not depend on how a model is cut. Collective. Let go of ``model`` then: the
    stages have its parameters.

    Args:
        model: a causal language model whose MoE blocks have been replaced
            (:func:`moesaic.integrations.transformers.swap_moe`), before :func:`moesaic.parallelize`; on the meta device
            or not.
        meshes: from :func:`moesaic.build_meshes` with ``pp``.
        config: the schedule, and how many layers each stage has.

    Returns:
        The stages, for :func:`moesaic.parallelize` and then :class:`moesaic.parallel.Pipeline`.

    Raises:
        ValueError: more stages than layers; a model that is no causal language model, whose balance loss is over all
            layers together, or that has modules that belong to no stage; a schedule that does not fit. On all ranks,
            before anything is sent.

    Example:
        >>> meshes = moesaic.build_meshes(pp=2, ep=2)
        >>> stages = moesaic.parallelize(split_into_stages(model, meshes), meshes)
    """
    check_meshes(meshes)
    config = config or PipelineConfig()
    if meshes.stages is None:
        raise ValueError("meshes: they have no axis pp; build them with build_meshes(pp=...), or leave the model whole")

    def check() -> tuple[str, list[range]]:
        check_schedule(config.schedule, meshes.layout, config.stages_per_rank)
        decoder = _check_model(model)
        if (shared := _shared(model)) is not None and SCHEDULES[config.schedule].is_v:
            raise ValueError(
                f"schedule: with {config.schedule!r} the first and the last stage are on one rank, and '{shared[0]}' "
                f"and '{shared[1]}' are one weight, which both would have; choose another schedule"
            )
        layers = len(decoder_layers(model.get_submodule(decoder)))
        return decoder, layers_of_stages(layers, meshes.pp_size * config.stages_on_a_rank(), config.layers)

    decoder, layers = ranks.together(check)[ranks.rank()]
    check_same([*describe(model), ("how it is cut", str(layers)), ("schedule", config.schedule)], meshes.stages)
    skeleton = copy.deepcopy(model, {id(t): _on_meta(t) for t in _tensors(model)})
    rank_of = SCHEDULES[config.schedule].rank_of
    parts = []
    for number, own in enumerate(layers):
        if rank_of(number, meshes.pp_size) == meshes.pp_rank:
            # Everything but the weights is the stage's own. Quantised ones are buffers.
            packed = (b for m in model.modules() if isinstance(m, PackedWeight) for b in m.buffers())
            whole = copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *packed]})
            parts.append(Stage(whole, decoder, number, len(layers), own))
    return Stages(parts, skeleton, meshes, config, _shared(model))


def _check_model(model: Any) -> str:
    """The name of a model's decoder. Raises ``ValueError`` unless the model can be cut."""
    placed = next((name for name, p in model.named_parameters() if isinstance(p, DTensor)), None)
    if placed is not None:
        raise ValueError(f"model: parameter '{placed}' is a DTensor; split a model before parallelize")
    found = decoders(model)
    if len(found) != 1 or not leaves_shards_alone(model, found[0]):
        if inside := [m for m in language_models(model) if m is not model]:
            raise ValueError(
                f"model: {type(model).__name__} is a wrapper around {type(inside[0]).__name__}; give that one, which "
                "keeps the adapters that peft has put into it (get_base_model() of a PeftModel)"
            )
        raise ValueError(
            f"model: {type(model).__name__} is no causal language model of one decoder with MoE layers, which is what "
            "a pipeline is cut from; call swap_moe first, and use pp=1 for other models"
        )
    decoder = found[0]
    embedding = model.get_input_embeddings()
    for name, module in decoder.named_children():
        known = name == LAYERS or module is embedding or "norm" in name
        if not known and any(True for _ in module.parameters()):
            raise ValueError(f"model: '{name}' of {type(decoder).__name__} is not known to belong to a stage; use pp=1")
    if own := [name for name, _ in decoder.named_parameters(recurse=False)]:
        raise ValueError(f"model: '{own[0]}' of {type(decoder).__name__} is not known to belong to a stage; use pp=1")
    if getattr(decoder, "pooled_balance_coefficient", 0) or getattr(model.config, "output_router_logits", False):
        raise ValueError(
            "model: its balance loss is over all layers together (aux_loss='pooled', output_router_logits), and a "
            "stage has some of them; take aux_loss='batch' or 'sequence', a loss of each layer"
        )
    return next(name for name, module in model.named_modules() if module is decoder)


def _shared(model: Any) -> tuple[str, str] | None:
    """The names of embedding and head, if they are one weight. Raises ``ValueError`` if others are."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter, (first, *others) in names.items():
        if others and (parameter is not embedding or head is not embedding or len(others) > 1):
            raise ValueError(f"model: '{others[0]}' and '{first}' are one weight, which stages cannot share; use pp=1")
    return (names[embedding][0], names[embedding][1]) if embedding is head else None


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
