"""The shapes of a model, from its config: every parameter, where it is cut, and what a token computes.

The model itself is made on the meta device, so that nothing is counted twice in two places.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import Shard

from moesaic.layers import MoE, MoEConfig
from moesaic.parallel.attention import check_heads
from moesaic.parallel.context import check_context
from moesaic.parallel.decoder import attention_parts, attention_shard_dims, check_decoder, check_split, decoder_layers
from moesaic.parallel.mesh import MeshLayout
from moesaic.parallel.placements import WEIGHTS
from moesaic.parallel.wrapped import decoders
from moesaic.train.flops import Attention, attention_of, weight_flops


class Weight(NamedTuple):
    """A parameter.

    Attributes:
        shape: of the whole.
        itemsize: bytes of an element.
        cuts: the axes that cut it, each with the dim: ``(("ep", 0), ("etp", 2))``. FSDP's are not among them.
        of_experts: whether it is laid over the expert mesh.
    """

    shape: tuple[int, ...]
    itemsize: int
    cuts: tuple[tuple[str, int], ...]
    of_experts: bool

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def local_shape(self, layout: MeshLayout) -> tuple[int, ...]:
        """What the first rank has before FSDP cuts it: no rank has more."""
        local = list(self.shape)
        for axis, dim in self.cuts:
            local[dim] = -(-local[dim] // getattr(layout, axis))
        return tuple(local)

    def local_numel(self, layout: MeshLayout) -> int:
        return prod(self.local_shape(layout))

    def sharded_numel(self, layout: MeshLayout) -> int:
        """What FSDP leaves to the first rank: equal parts of one dim, the last ones filled up."""
        local, ranks = list(self.local_shape(layout)), data_ranks(self, layout)
        if ranks > 1:
            dim = self._data_dim(layout, ranks)
            local[dim] = -(-local[dim] // ranks)
        return prod(local)

    def _data_dim(self, layout: MeshLayout, ranks: int) -> int:
        if not self.of_experts or self.shape[0] % layout.ep == 0:
            return 0
        cut = {dim for _, dim in self.cuts}
        return next(d for d, size in enumerate(self.shape) if d not in cut and size % ranks == 0)


def data_ranks(weight: Weight, layout: MeshLayout) -> int:
    """Over how many ranks FSDP cuts a weight."""
    return layout.edp if weight.of_experts else dense_ranks(layout)


@cache
def dense_ranks(layout: MeshLayout) -> int:
    """Over how many ranks FSDP cuts the weights that are no experts': all of a stage, but for tp and dp_replicate."""
    return layout.stage_size // layout.tp // layout.dp_replicate


@dataclass(frozen=True, eq=False)
class Layer:
    """A decoder layer. Layers that are alike are one object, which has a quick hash."""

    dense: tuple[Weight, ...]
    experts: tuple[Weight, ...]
    moe: MoEConfig | None
    attention: Attention


@dataclass(frozen=True, eq=False)
class Shapes:
    """A language model.

    Attributes:
        name: for the reader.
        layers: of the decoder, in order.
        outer: the weights that are in no layer: embedding, last norm, head.
        dim, vocab: sizes.
        tied: whether the head's weight is that of the embedding.
        weight_flops: operations of a token with weights, forward and backward.
    """

    name: str
    layers: tuple[Layer, ...]
    outer: tuple[Weight, ...]
    dim: int
    vocab: int
    tied: bool
    weight_flops: float

    @property
    def kinds(self) -> Counter[Layer]:
        """How many layers there are of each kind, in the order of their first."""
        return Counter(self.layers)

    @property
    def weights(self) -> Iterable[Weight]:
        yield from self.outer
        for layer in self.layers:
            yield from layer.dense
            yield from layer.experts

    @property
    def parameters(self) -> int:
        return sum(weight.numel for weight in self.weights)

    @property
    def active_parameters(self) -> int:
        """Those that a token meets: of the experts only so many as it goes to."""
        active = sum(w.numel for w in self.weights if not w.of_experts)
        for layer in self.layers:
            if layer.moe is not None:
                active += sum(w.numel for w in layer.experts) * layer.moe.top_k // layer.moe.num_experts
        return active

    def flops(self, seq_len: int) -> float:
        """Of a token, forward and backward: what MFU counts. As :func:`moesaic.train.flops.flops_per_token`."""
        return self.weight_flops + 3 * sum(layer.attention.flops(seq_len) for layer in self.layers)


class Planned(NamedTuple):
    """The shapes of a model, and the model, on the meta device, with one layer of each kind.

    Attributes:
        shapes: of the whole model.
        model: with ``len(shapes.kinds)`` layers, in that order.
    """

    shapes: Shapes
    model: nn.Module


def read_model(name: str, dtype: torch.dtype) -> Planned:
    """A model from a config file, a folder with one, or a name on the hub.

    Raises:
        OSError: there is none.
        ValueError: it is damaged, or a model that ``swap_moe`` or ``parallelize`` does not take.
    """
    from moesaic.integrations.transformers.configs import config_for, read_config, read_values

    path = Path(name).expanduser()
    if path.suffix == ".json" or path.is_file():
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {name}")
        config = config_for(read_values(path), path)
    else:
        config, _ = read_config(str(path) if path.exists() else name)
    return planned(config, dtype, path.stem if path.stem not in ("config", "") else path.resolve().parent.name)


def planned(config: Any, dtype: torch.dtype, name: str) -> Planned:
    """A model from a config of transformers. Raises ``ValueError`` as :func:`read_model` does."""
    from transformers import AutoModelForCausalLM

    from moesaic.integrations.transformers import swap_moe

    with torch.device("meta"):
        # Of its own, for it will have fewer layers.
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
    model = swap_moe(model)
    found = decoders(model)
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} has {len(found)} decoders with MoE layers, and the planner knows one")
    [decoder] = found
    layers = decoder_layers(decoder)
    cuts = _tensor_parallel_dims(decoder)
    one_of_each: dict[tuple[Any, ...], Layer] = {}
    kinds = tuple(_layer(layer, i, model.config, cuts, one_of_each) for i, layer in enumerate(layers))
    inside = {p for layer in layers for p in layer.parameters()}
    outer = tuple(_weight(p, cuts) for p in model.parameters() if p not in inside)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    flops = weight_flops(model)
    shapes = Shapes(name, kinds, outer, embedding.shape[1], embedding.shape[0], head is embedding, flops)
    _keep_one_of_each(model, decoder, kinds)
    return Planned(shapes, model)


def problem(planned: Planned, *, tp: int = 1, cp: int = 1) -> str | None:
    """Why the dense part cannot be laid over so many ranks, if so; in the words of ``parallelize``."""
    [decoder] = decoders(planned.model)
    try:
        if tp > 1:
            check_decoder(decoder, "tp")
            check_split(decoder, tp)
        if cp > 1:
            check_context(decoder)
    except ValueError as error:
        return str(error)
    return None


def _tensor_parallel_dims(decoder: nn.Module) -> dict[nn.Parameter, int]:
    """Empty for an attention that tp does not cut; :func:`problem` then says so."""
    try:
        for layer in decoder_layers(decoder):
            check_heads(layer.self_attn, attention_parts(decoder, layer), 1)
        return attention_shard_dims(decoder)
    except (AttributeError, ValueError):
        return {}


def _weight(parameter: nn.Parameter, cuts: dict[nn.Parameter, int]) -> Weight:
    places = (("tp", cuts[parameter]),) if parameter in cuts else ()
    return Weight(tuple(parameter.shape), parameter.element_size(), places, False)


def _layer(
    layer: Any, index: int, config: Any, cuts: dict[nn.Parameter, int], known: dict[tuple[Any, ...], Layer]
) -> Layer:
    [moe] = [m for m in layer.modules() if isinstance(m, MoE)] or [None]
    experts: dict[nn.Parameter, Weight] = {}
    if moe is not None:
        for name, p in moe.experts.named_parameters(recurse=False):
            on_axes = zip(("ep", "etp"), WEIGHTS[name], strict=True)
            places = tuple((axis, place.dim) for axis, place in on_axes if isinstance(place, Shard))
            experts[p] = Weight(tuple(p.shape), p.element_size(), places, True)
    dense = tuple(_weight(p, cuts) for p in layer.parameters() if p not in experts)
    parts = dense, tuple(experts.values()), None if moe is None else moe.config, attention_of(config, index)
    return known.setdefault(parts, Layer(*parts))


def _keep_one_of_each(model: Any, decoder: Any, kinds: tuple[Layer, ...]) -> None:
    first = sorted({kind: kinds.index(kind) for kind in kinds}.values())
    decoder.layers = nn.ModuleList([decoder.layers[i] for i in first])
    config = decoder.config
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in first]
    config.num_hidden_layers = len(first)
