"""Context parallelism: the ranks of cp have parts of the same sequences, and attention sees the whole of each.

A decoder is called with whole sequences. It embeds its rank's positions only, and everything but attention works on
those. Attention computes its rank's queries, and gathers the keys and values of all ranks. Their gradients go back the
same way, as a reduce-scatter. Masks and positions are made of whole sequences, and then cut.

How attention is told which queries it has depends on whose decoder it is: a decoder brings that along, as
``decoder.attention_of_parts`` (:class:`AttentionOfParts`).
"""

import inspect
from collections.abc import Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from moesaic.parallel.collectives import all_gather_rows
from moesaic.parallel.decoder import check_decoder
from moesaic.parallel.sequence import head_tail_slices


@runtime_checkable
class AttentionOfParts(Protocol):
    """How the attention of somebody's decoders computes with a part of the queries."""

    def check(self, decoder: nn.Module) -> None:
        """Raise ``ValueError`` unless the attention of every layer can."""
        ...

    def take_over(self, decoder: nn.Module) -> None:
        """Let it do so, in calls for which :func:`part_of_call` knows the part."""
        ...

    def check_call(self, decoder: nn.Module) -> None:
        """Raise ``ValueError`` if somebody has changed that since."""
        ...


class Part(NamedTuple):
    """What a rank has of sequences of ``length`` tokens.

    Attributes:
        length: of the whole sequences.
        group: the ranks that have the other parts.
    """

    length: int
    group: dist.ProcessGroup

    @property
    def chunks(self) -> tuple[slice, ...]:
        """The positions that are here, as slices that follow each other."""
        return head_tail_slices(self.length, self.group.size())[self.group.rank()]

    @property
    def sizes(self) -> list[int]:
        """How many positions there are in each chunk."""
        return [chunk.stop - chunk.start for chunk in self.chunks]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is here: there are more chunks than tokens."""
        return sum(self.sizes) == 0

    def of(self, whole: Tensor, dim: int) -> Tensor:
        """What is here of a tensor with a dim of all positions."""
        return torch.cat([whole.narrow(dim, c.start, c.stop - c.start) for c in self.chunks], dim)

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Tensors ``[B, H, s, .]`` of this part, of the whole sequences: ``[B, H, S, .]``. One collective."""
        widths = [part.shape[3] for part in parts]
        rows = torch.cat(list(parts), 3).permute(2, 0, 1, 3)
        everyone = head_tail_slices(self.length, self.group.size())
        sizes = [[chunk.stop - chunk.start for chunk in chunks] for chunks in everyone]
        of_ranks = [sum(of_rank) for of_rank in sizes]
        gathered = all_gather_rows(rows, of_ranks, self.group, even=min(of_ranks) == max(of_ranks))
        # From the order of ranks to that of positions: all heads, and then the tails of the last rank and so on.
        chunks = gathered.split([size for of_rank in sizes for size in of_rank])
        whole = torch.cat([*chunks[::2], *reversed(chunks[1::2])]) if len(everyone) > 1 else gathered
        return list(whole.permute(1, 2, 0, 3).split(widths, 3))


@dataclass(frozen=True)
class PartMask:
    """What layers get in place of a mask.

    Attributes:
        part: of the sequences.
        of_chunks: for each chunk which keys its queries meet, and the mask of both, in the form that the
            function which computes it takes. None means causal attention of equally many queries and keys.
    """

    part: Part
    of_chunks: tuple[tuple[slice, Any], ...]


_PART: ContextVar[Part | None] = ContextVar("moesaic_part_of_sequences", default=None)


def part_of_call() -> Part | None:
    """What the decoder that is being called has of its sequences; None outside of such a call."""
    return _PART.get()


def check_all_are_decoders(model: nn.Module, decoders: Sequence[nn.Module]) -> None:
    """Raise ``ValueError`` if layers of a model somewhere else could need the rest of a sequence."""
    for module in model.modules():
        if hasattr(module, "attention_of_parts") and module not in decoders:
            raise ValueError(
                f"cp: the layers of {type(module).__name__} have no self_attn, so it is not known what in them needs "
                "the whole sequence; use cp=1"
            )


def check_context(decoder: Any) -> None:
    """Raise ``ValueError`` unless a decoder can compute with a part of each sequence, its attention too."""
    check_decoder(decoder, "cp")
    attention: AttentionOfParts | None = getattr(decoder, "attention_of_parts", None)
    if attention is None:
        raise ValueError(
            f"cp: it is not known how the attention of {type(decoder).__name__} is computed with a part of the "
            "queries. For a transformers model call moesaic.integrations.transformers.swap_moe first; or use cp=1"
        )
    attention.check(decoder)


def add_context_parallelism(decoder: Any, layers: Sequence[nn.Module], group: dist.ProcessGroup) -> None:
    """Let a decoder take whole sequences, and compute the part of each that this rank has."""
    axis = _ContextAxis(decoder.attention_of_parts, group)
    decoder.attention_of_parts.take_over(decoder)
    decoder.register_forward_pre_hook(axis.cut, with_kwargs=True)
    decoder.register_forward_hook(axis.end, always_call=True)
    for layer in layers:
        layer.register_forward_pre_hook(axis.cut_positions, with_kwargs=True)


def spare_attention_of_nothing(layers: Sequence[Any]) -> None:
    """Give attention one row where a rank has no token, and cut it off again: transformers cannot compute with none.

    After :func:`add_sequence_parallelism`, which looks at how many rows there are.
    """
    for layer in layers:
        layer.self_attn.register_forward_pre_hook(_fill, with_kwargs=True)
        layer.self_attn.register_forward_hook(_empty_again, with_kwargs=True)


def _fill(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not _has_none(kwargs):
        return args, kwargs
    changed = dict(kwargs)
    for name in ("hidden_states", "position_embeddings"):
        if name in kwargs:
            changed[name] = tree_map(_with_a_row, kwargs[name])
    if kwargs.get("position_ids") is not None:
        changed["position_ids"] = F.pad(kwargs["position_ids"], (0, 1))
    return tuple(map(_with_a_row, args)), changed


def _empty_again(attention: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    return (output[0][:, :0], *output[1:]) if _has_none(kwargs) else output


def _has_none(kwargs: dict[str, Any]) -> bool:
    mask = kwargs.get("attention_mask")
    return isinstance(mask, PartMask) and mask.part.is_empty


def _with_a_row(t: Tensor) -> Tensor:
    return torch.cat([t, t.new_zeros(t.shape[0], 1, *t.shape[2:])], 1)


class _ContextAxis:
    """The hooks of a decoder and of its layers."""

    def __init__(self, attention: AttentionOfParts, group: dist.ProcessGroup) -> None:
        self._attention, self._group = attention, group
        # Of calls that have begun and not ended. Only between the hooks of one call.
        self._tokens: list[Token[Part | None]] = []

    def cut(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Tokens and padding become those of the part; positions and masks stay whole, for masks are made of them."""
        given = _by_name(decoder, args, kwargs)
        name = "input_ids" if given.get("inputs_embeds") is None else "inputs_embeds"
        if given.get(name) is None:
            return args, kwargs  # the decoder says what is wrong
        length = given[name].shape[1]
        self._attention.check_call(decoder)
        _check_call(decoder, given, length)
        part = Part(length, self._group)
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=given[name].device).unsqueeze(0)
        changed = {"position_ids": positions, name: part.of(given[name], 1)}
        if given.get("token_mask") is not None:
            changed["token_mask"] = part.of(given["token_mask"], 1)
        self._tokens.append(_PART.set(part))
        return (), {**given, **changed}

    def end(self, decoder: nn.Module, args: Any, output: Any) -> None:
        if self._tokens:
            _PART.reset(self._tokens.pop())

    def cut_positions(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Layers get what was made of all positions beside hidden states of their part."""
        changed = dict(kwargs)
        ids, embeddings = kwargs.get("position_ids"), kwargs.get("position_embeddings")
        if ids is not None:
            changed["position_ids"] = Part(ids.shape[-1], self._group).of(ids, ids.ndim - 1)
        if isinstance(embeddings, Tensor):  # complex numbers
            changed["position_embeddings"] = Part(embeddings.shape[1], self._group).of(embeddings, 1)
        elif embeddings is not None:  # cosines and sines
            changed["position_embeddings"] = tuple(Part(t.shape[1], self._group).of(t, 1) for t in embeddings)
        return args, changed


def _by_name(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(type(decoder).forward)
    bound = signature.bind(decoder, *args, **kwargs)
    given: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        others = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        given |= value if others else {name: value}
    return given


def _check_call(decoder: Any, given: dict[str, Any], length: int) -> None:
    """Raise ``ValueError`` for arguments that would not mean what they say. The same on all ranks."""
    if given.get("past_key_values") is not None:
        raise ValueError(
            "past_key_values: with cp > 1 a cache would have the keys of a rank's own part only; leave it out"
        )
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        shape = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"attention_mask: with cp > 1 expected [B, S], the padding of whole sequences, got {shape}; several "
            "documents in a row are kept apart by position_ids that begin anew with each"
        )
    wholes = {name: given.get(name) for name in ("attention_mask", "token_mask", "position_ids")}
    for name, whole in wholes.items():
        if whole is not None and whole.shape[-1] != length:
            raise ValueError(
                f"{name}: with cp > 1 expected whole sequences of {length} tokens like the tokens, got "
                f"{list(whole.shape)}"
            )
    asked = given.get("output_attentions")
    if getattr(decoder.config, "output_attentions", False) if asked is None else asked:
        raise ValueError("output_attentions: with cp > 1 a rank has those of its own queries only; set it to False")
