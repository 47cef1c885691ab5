"""One stage of a pipeline: a transformers causal language model of which only some layers are here.

The model's own code runs on every stage, so each makes its own rotary embeddings and masks, from whole sequences.
Modules that another stage has are stood for by :class:`Elsewhere`, under the same names: names of parameters do not
depend on how a model is split.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from moesaic.parallel.decoder import LAYERS, Elsewhere

_PLAIN = (bool, int, float, str, tuple, type(None))


def _standing_in(placeholder: Elsewhere, module: nn.Module) -> Elsewhere:
    """The placeholder with the plain values of a module: decoders ask their layers for the kind of attention."""
    own = vars(module).items()
    placeholder.__dict__ |= {n: v for n, v in own if isinstance(v, _PLAIN) and n not in placeholder.__dict__}
    return placeholder


def _replace(whole: nn.Module, module: nn.Module | None) -> None:
    """Let a placeholder stand for a module of a model, wherever the model has it."""
    for name, child in list(whole.named_modules(remove_duplicate=False)):
        if module is not None and child is module:
            whole.set_submodule(name, _standing_in(Elsewhere(), module))


class _Inlet(Elsewhere):
    """In the place of the layer before the first one here: gives on what the stage before has sent."""

    def __init__(self) -> None:
        super().__init__()
        self.received: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        assert self.received is not None
        received, self.received = self.received, None
        return received


class _Outlet(Elsewhere):
    """In the place of the layer after the last one here: keeps what is for the next stage."""

    def __init__(self) -> None:
        super().__init__()
        self.result: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        self.result = hidden_states
        return hidden_states

    def take(self) -> Tensor:
        """What came, once."""
        assert self.result is not None
        result, self.result = self.result, None
        return result


class Stage(nn.Module):
    """Some layers of a model: with the embedding if they are the first, with the last norm and the head if the last.

    Args:
        whole: the model; its modules that are not of this stage are replaced.
        decoder: the name of its decoder.
        number, count: which stage this is, and of how many.
        layers: which layers are here.
    """

    def __init__(self, whole: Any, decoder: str, number: int, count: int, layers: range) -> None:
        super().__init__()
        self.whole = whole
        self.number, self.count, self.layers = number, count, layers
        self.computing: Callable[[], AbstractContextManager[Any]] = nullcontext
        """The context in which the forward pass computes, such as autocast. The backward pass is outside of it."""
        self._decoder = decoder
        embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
        inside: Any = whole.get_submodule(decoder)
        everything: nn.ModuleList = inside.get_submodule(LAYERS)
        inlet = None if self.is_first else _Inlet()
        outlet = None if self.is_last else _Outlet()
        at = {layers.start - 1: inlet, layers.stop: outlet}
        for index, layer in enumerate(everything):
            if index not in layers:
                everything[index] = _standing_in(at.get(index) or Elsewhere(), layer)
        others = [
            m for m in inside.children() if m not in (everything, embedding) and any(True for _ in m.parameters())
        ]
        for module in [*([] if self.is_first else [embedding]), *([] if self.is_last else [head, *others])]:
            _replace(whole, module)
        # In a tuple, for they are modules of the decoder, and not of this one.
        self._ends = inlet, outlet

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1

    def forward(self, x: Tensor, *, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """What the next stage gets, or, from the last one, the logits.

        Args:
            x: ``input_ids`` in the first stage; in the others what the stage before gave, ``[B, s, D]``.
            input_ids: ``[B, S]``, whole sequences. Stages after the first take from it how long these are.
            kwargs: what the model takes beside, the same on all stages: ``position_ids``, ``attention_mask``,
                ``token_mask``.
        """
        inlet, outlet = self._ends
        with self.computing():
            if inlet is None:
                given: dict[str, Any] = {"input_ids": x}
            else:
                inlet.received = x
                # The decoder asks it for shape, dtype and device only. Nothing that it does to embeddings counts.
                B, S = input_ids.shape
                given = {"inputs_embeds": x.detach().new_zeros(()).expand(B, S, x.shape[-1])}
            if outlet is None:
                return self.whole(**given, use_cache=False, **kwargs).logits
            self.whole.get_submodule(self._decoder)(**given, use_cache=False, **kwargs)
            return outlet.take()
