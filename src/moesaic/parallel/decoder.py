"""Tensor and sequence parallelism for the dense parts of a decoder in the layout of Hugging Face transformers.

Between layers every rank holds its shard of the sequence. Attention gathers the sequence, computes this rank's heads
(:mod:`moesaic.parallel.attention`), and reduce-scatters the result; everything else works on the shard with replicated
weights, whose gradients are Partial, for every rank has other tokens. Sequences may have any length, and shards may be
uneven or empty.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moesaic.layers import MoE
from moesaic.parallel.attention import Part, check_heads, parts_of, shard_dims, split_by_heads
from moesaic.parallel.collectives import all_gather_rows, reduce_scatter_rows
from moesaic.parallel.sequence import sequence_slices

_ATTENTION = "self_attn"
LAYERS = "layers"


class Elsewhere(nn.Module):
    """Stands where another stage of a pipeline has a module. It gives back what it is given, and has no parameters."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def has_attention(module: nn.Module) -> bool:
    """Whether a module is the backbone of a language model: it has decoder layers with attention."""
    layers = getattr(module, LAYERS, None)
    return isinstance(layers, nn.ModuleList) and any(hasattr(layer, _ATTENTION) for layer in layers)


def leaves_shards_alone(model: Any, decoder: nn.Module) -> bool:
    """Whether a transformers model around a decoder treats what the decoder gives token by token."""
    is_causal = getattr(model, "loss_type", None) == "ForCausalLM"
    return is_causal and all(child in (decoder, model.get_output_embeddings()) for child in model.children())


def decoder_layers(decoder: nn.Module) -> list[Any]:
    """Its layers, without those that another stage has."""
    return [layer for _, layer in _numbered(decoder)]


def _numbered(decoder: nn.Module) -> list[tuple[int, Any]]:
    """Its layers with their places among all layers, also those that another stage has."""
    layers = enumerate(decoder.get_submodule(LAYERS).children())
    return [(i, layer) for i, layer in layers if not isinstance(layer, Elsewhere)]


def check_decoder(decoder: nn.Module, axis: str) -> None:
    """Raise ``ValueError`` unless the plan knows every module: ranks of ``axis`` will have parts of sequences."""
    for name, module in decoder.named_children():
        if name != LAYERS:
            _check_works_on_tokens(name, module, axis)
    for i, layer in _numbered(decoder):
        for name, module in layer.named_children():
            if name != _ATTENTION:
                _check_works_on_tokens(f"layer {i}'s {name}", module, axis)
        if not hasattr(layer, _ATTENTION):
            raise ValueError(f"{axis}: layer {i} ({type(layer).__name__}) has no {_ATTENTION} to split; use {axis}=1")


def check_split(decoder: nn.Module, tp: int) -> None:
    """Raise ``ValueError`` unless the plan knows every part of every attention, whose heads ``tp`` ranks can share."""
    for i, layer in _numbered(decoder):
        try:
            check_heads(layer.self_attn, attention_parts(decoder, layer), tp)
        except ValueError as error:
            raise ValueError(f"tp: layer {i}'s attention: {error}; or use tp=1") from error


def _check_works_on_tokens(where: str, module: nn.Module, axis: str) -> None:
    if not works_on_tokens(module):
        raise ValueError(
            f"{axis}: {where} ({type(module).__name__}) is not known to the plan. It may need the whole sequence, and "
            f"with {axis} > 1 a rank has only a part of it; use {axis}=1"
        )


def works_on_tokens(module: nn.Module) -> bool:
    """Whether it treats every token alone, as norms, embeddings, experts and linear layers do."""
    if isinstance(module, MoE | nn.Linear | nn.Embedding):
        return True
    vectors_only = all(p.ndim == 1 for p in module.parameters(recurse=False))
    return vectors_only and all(map(works_on_tokens, module.children()))


def attention_parts(decoder: nn.Module, layer: Any) -> list[Part]:
    """The parts of a layer's attention, by transformers' plan and our own."""
    prefix = f"layers.*.{_ATTENTION}."
    plan: dict[str, str] = getattr(decoder, "_tp_plan", None) or {}
    return parts_of(layer.self_attn, {n.removeprefix(prefix): s for n, s in plan.items() if n.startswith(prefix)})


def attention_shard_dims(decoder: nn.Module) -> dict[nn.Parameter, int]:
    """Which dim of each attention parameter is sharded over tp; all others are replicated."""
    dims: dict[nn.Parameter, int] = {}
    for layer in decoder_layers(decoder):
        dims |= shard_dims(attention_parts(decoder, layer))
    return dims


def add_sequence_parallelism(decoder: nn.Module, tp_mesh: DeviceMesh) -> None:
    """Cut the sequence at the first layer, gather it before every attention, scatter it after."""
    tp = _SequenceAxis(tp_mesh)
    decoder.register_forward_pre_hook(tp.cut_mask, with_kwargs=True)
    # On the first layer of all. Where another stage has that, what comes in by a stage's first layer is cut already.
    next(decoder.get_submodule(LAYERS).children()).register_forward_pre_hook(tp.cut, with_kwargs=True)
    for layer in decoder_layers(decoder):
        layer.self_attn.register_forward_pre_hook(tp.gather, with_kwargs=True)
        split_by_heads(attention_parts(decoder, layer), tp.scatter, tp.group)


class _SequenceAxis:
    """Moves hidden states ``[B, S, D]`` between whole sequences and this rank's shards of them.

    Keeps nothing between calls: with activation checkpointing an older forward may run again after a newer one.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group = mesh.get_group()

    def cut(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def shard(hidden: Tensor) -> Tensor:
            return hidden[:, self._slice(hidden.shape[1])]

        return _replace_hidden_states(shard, args, kwargs)

    def cut_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Of the whole sequences' padding, which layers get beside hidden states, what is in this rank's shard."""
        mask = kwargs.get("token_mask")
        if mask is None:
            return args, kwargs
        return args, {**kwargs, "token_mask": mask[:, self._slice(mask.shape[1])]}

    def gather(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sizes, even = self._sizes(_sequence_length(kwargs))

        def whole(hidden: Tensor) -> Tensor:
            return all_gather_rows(hidden.transpose(0, 1), sizes, self.group, even=even).transpose(0, 1)

        return _replace_hidden_states(whole, args, kwargs)

    def scatter(self, hidden: Tensor) -> Tensor:
        sizes, even = self._sizes(hidden.shape[1])
        return reduce_scatter_rows(hidden.transpose(0, 1), sizes, self.group, even=even).transpose(0, 1)

    def _slice(self, length: int) -> slice:
        return sequence_slices(length, self.group.size())[self.group.rank()]

    def _sizes(self, length: int) -> tuple[list[int], bool]:
        """How many tokens each rank has, and whether all have as many."""
        ranks = self.group.size()
        return [s.stop - s.start for s in sequence_slices(length, ranks)], length % ranks == 0


def _sequence_length(kwargs: dict[str, Any]) -> int:
    """The length of the whole sequence, from the positions that attention gets beside its shard of hidden states."""
    embeddings, ids = kwargs.get("position_embeddings"), kwargs.get("position_ids")
    if embeddings is not None:
        # Cosines and sines, or complex numbers.
        return (embeddings if isinstance(embeddings, Tensor) else embeddings[0]).shape[1]
    if ids is not None:  # a layer without rotary embedding
        return ids.shape[-1]
    raise ValueError(
        "tp > 1 needs attention to be given position_embeddings= or position_ids=, as transformers 5 does; use tp=1"
    )


def _replace_hidden_states(change: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
    return (change(args[0]), *args[1:]), kwargs
