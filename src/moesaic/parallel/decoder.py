"""Tensor and sequence parallelism for the dense parts of a decoder in the layout of Hugging Face transformers.

Between layers every rank holds its shard of the sequence. Attention gathers the sequence, computes this rank's heads,
and reduce-scatters the result; everything else works on the shard with replicated weights. Sequences of any length:
shards may be uneven or empty.

=====================================  ==============  =============================
parameter                              on the tp axis  its gradient
=====================================  ==============  =============================
q, k, v projections                    ``Shard(0)``    the same
output projection                      ``Shard(1)``    the same
q and k norms                          Replicate       Partial: every rank's heads
norms, embedding, head, router, shared Replicate       Partial: every rank's tokens
=====================================  ==============  =============================
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moesaic.parallel.collectives import all_gather_rows, reduce_scatter_rows
from moesaic.parallel.mesh import sequence_slices

_COLUMN = ("q_proj", "k_proj", "v_proj")
_ROW = "o_proj"


def find_decoder(model: nn.Module) -> nn.Module | None:
    """The backbone of a transformers causal language model, or None where ``model`` is something else."""
    backbone = getattr(model, "model", model)
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not layers or not hasattr(layers[0], "self_attn"):
        return None
    return backbone


def decoder_layers(decoder: nn.Module) -> list[Any]:
    """Its layers, each with a ``self_attn``."""
    return list(decoder.get_submodule("layers").children())


def check_attention(decoder: nn.Module, tp: int) -> None:
    """Raise ``ValueError`` unless every layer's heads can be split over ``tp`` ranks."""
    for i, layer in enumerate(decoder_layers(decoder)):
        attention = getattr(layer, "self_attn", None)
        if attention is None:
            raise ValueError(f"tp: layer {i} ({type(layer).__name__}) has no self_attn to split; use tp=1")
        missing = [name for name in (*_COLUMN, _ROW) if not isinstance(getattr(attention, name, None), nn.Linear)]
        if missing:
            raise ValueError(
                f"tp: layer {i}'s attention ({type(attention).__name__}) has no linear {missing}; use tp=1"
            )
        if attention.o_proj.bias is not None:
            raise ValueError(f"tp: layer {i}'s output projection has a bias, which tp > 1 does not support; use tp=1")
        if not hasattr(attention, "head_dim"):
            raise ValueError(f"tp: layer {i}'s attention ({type(attention).__name__}) does not say head_dim; use tp=1")
        for name in _COLUMN:
            heads = getattr(attention, name).out_features // attention.head_dim
            if heads % tp:
                legal = [n for n in range(1, heads + 1) if heads % n == 0]
                raise ValueError(
                    f"tp: {tp} does not divide the {heads} heads of layer {i}'s {name}; choose from {legal}"
                )


def attention_shard_dims(decoder: nn.Module) -> dict[nn.Parameter, int]:
    """Which dim of each attention parameter is sharded over tp; all others are replicated."""
    dims: dict[nn.Parameter, int] = {}
    for layer in decoder_layers(decoder):
        for name in _COLUMN:
            for parameter in getattr(layer.self_attn, name).parameters():
                dims[parameter] = 0
        dims[layer.self_attn.o_proj.weight] = 1
    return dims


def add_sequence_parallelism(decoder: nn.Module, tp_mesh: DeviceMesh) -> None:
    """Cut the sequence at the first layer, gather it before every attention, scatter it after."""
    tp = _SequenceAxis(tp_mesh)
    decoder_layers(decoder)[0].register_forward_pre_hook(tp.cut, with_kwargs=True)
    for layer in decoder_layers(decoder):
        layer.self_attn.register_forward_pre_hook(tp.gather, with_kwargs=True)
        layer.self_attn.o_proj.register_forward_hook(tp.scatter)


class _SequenceAxis:
    """Hooks that move hidden states ``[B, S, D]`` between whole sequences and this rank's shards of them.

    They keep nothing between calls: with activation checkpointing an older forward may run again after a newer one.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group = mesh.get_group()

    def cut(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def shard(hidden: Tensor) -> Tensor:
            return hidden[:, sequence_slices(hidden.shape[1], self.group.size())[self.group.rank()]]

        return _replace_hidden_states(shard, args, kwargs)

    def gather(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sizes = self._sizes(_sequence_length(kwargs))

        def whole(hidden: Tensor) -> Tensor:
            return all_gather_rows(hidden.transpose(0, 1), sizes, self.group).transpose(0, 1)

        return _replace_hidden_states(whole, args, kwargs)

    def scatter(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        sizes = self._sizes(output.shape[1])
        return reduce_scatter_rows(output.transpose(0, 1), sizes, self.group).transpose(0, 1)

    def _sizes(self, length: int) -> list[int]:
        return [s.stop - s.start for s in sequence_slices(length, self.group.size())]


def _sequence_length(kwargs: dict[str, Any]) -> int:
    """The length of the whole sequence, from the positions that attention gets beside its shard of hidden states."""
    embeddings = kwargs.get("position_embeddings")
    if embeddings is None:
        raise ValueError("tp > 1 needs attention to be given position_embeddings=, as transformers 5 does; use tp=1")
    return embeddings[0].shape[1]


def refuse_whole_sequence_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise for arguments of a causal language model that mean the whole sequence, where a rank has a shard of it."""
    for name in ("labels", "logits_to_keep", "past_key_values"):
        value = kwargs.get(name)
        if value is not None and not (isinstance(value, int) and value == 0):
            raise ValueError(
                f"{name}: with tp > 1 the logits are those of this rank's shard of the sequence; leave it out, and "
                "take what you need of the logits at meshes.sequence_slice(S)"
            )


def _replace_hidden_states(change: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
    return (change(args[0]), *args[1:]), kwargs
