"""Router logits of swapped layers, and the one balance loss over all layers that transformers makes of them.

``output_router_logits``, as an argument or in the config, gives what it gives in transformers, parallelized or not. The
logits are of a rank's own tokens, and what transformers' function would make of those is left to
:func:`moesaic.layers.pooled_balance.pooled_balance_loss`, which counts over all ranks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import output_capturing

from moesaic.integrations.transformers import hooks
from moesaic.integrations.transformers.calls import bind, models_with_labels, parameter_names, stacks_of
from moesaic.layers import Routing
from moesaic.layers.balance import attach_loss, record_loss
from moesaic.layers.load import routers
from moesaic.layers.pooled_balance import pooled_balance_loss


class _Call(NamedTuple):
    """A call that takes the routings of all layers: with gradients or not, and whether it gives back a tuple."""

    routings: list[Routing]
    with_gradients: bool
    as_tuple: bool


class Collector:
    """The hooks that take the routings of a model's layers while something wants them. A copy of the model has its own.

    Args:
        model: with swapped layers.
        coefficient: of the loss over all layers that goes to :func:`moesaic.balance_losses`; 0 for none.
    """

    def __init__(self, model: Any, coefficient: float) -> None:
        self.coefficient = coefficient
        # The innermost last; None for a call that wants nothing.
        self._running: list[_Call | None] = []
        for decoder, _ in stacks_of(model):
            # A pipeline asks for it: its stages have some of the layers each.
            decoder.__dict__["pooled_balance_coefficient"] = coefficient
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
            decoder.register_forward_hook(self._after_decoder, always_call=True)
        for inner in _adding_balance_loss(model):
            inner.register_forward_pre_hook(self._before_model, with_kwargs=True)
            inner.register_forward_hook(self._after_model, always_call=True)
        for router in routers(model).values():
            router.register_forward_hook(self._take)

    def _take(self, router: nn.Module, args: Any, routing: Routing) -> None:
        for call in filter(None, self._running):
            if call.with_gradients and not torch.is_grad_enabled():
                raise RuntimeError(
                    "the balance loss over all layers has no gradient through reentrant activation checkpointing; "
                    "checkpoint with use_reentrant=False"
                )
            call.routings.append(routing)

    # The loss over all layers for balance_losses(), and the logits that a decoder gives back.

    def _before_decoder(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.append(_begin() if self.coefficient and decoder.training else None)
        if kwargs.get("output_router_logits", getattr(decoder.config, "output_router_logits", False)):
            _let_transformers_record(decoder)

    def _after_decoder(self, decoder: nn.Module, args: Any, output: Any) -> None:
        call = self._running.pop()
        if call is None or output is None:
            return
        loss = self.coefficient * _pooled(decoder, call.routings)
        scale = next(iter(routers(decoder).values())).loss_scale
        if scale is None:
            record_loss(loss, loss)
        else:
            output.last_hidden_state = attach_loss(loss, output.last_hidden_state, scale)

    # The loss of a causal language model with the loss over all layers in it.

    def _before_model(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not wants_router_logits(model, args, kwargs):
            self._running.append(None)
            return args, kwargs
        given = kwargs.get("return_dict")
        self._running.append(_begin(as_tuple=not (model.config.return_dict if given is None else given)))
        bound = bind(model, args, {**kwargs, "return_dict": True})
        bound.arguments["output_router_logits"] = False
        return bound.args[1:], bound.kwargs

    def _after_model(self, model: Any, args: Any, output: Any) -> Any:
        call = self._running.pop()
        if call is None or output is None:
            return output
        aux_loss = _pooled(model, call.routings)
        values = {**output, "aux_loss": aux_loss, "router_logits": tuple(routing.logits for routing in call.routings)}
        if output.loss is not None:
            values["loss"] = output.loss + model.router_aux_loss_coef * aux_loss
        result = type(output)(**values)
        return result.to_tuple() if call.as_tuple else result


def install(model: Any, aux_loss_coef: float | None, is_pooled: bool) -> None:
    """Let a model with swapped layers give router logits, and add up the loss over all layers.

    A coefficient takes the place of the config's, which is for the loss of labels.
    """
    Collector(model, aux_loss_coef if aux_loss_coef and is_pooled else 0.0)
    for inner in _adding_balance_loss(model) if aux_loss_coef is not None else []:
        inner.router_aux_loss_coef = 0.0


def remove(model: Any) -> None:
    """Undo :func:`install`."""
    hooks.take_off(model, lambda hook: isinstance(getattr(hook, "__self__", None), Collector))
    for decoder, _ in stacks_of(model):
        decoder.__dict__.pop("pooled_balance_coefficient", None)
    for inner in _adding_balance_loss(model):
        inner.router_aux_loss_coef = inner.config.get_text_config().router_aux_loss_coef


def _adding_balance_loss(model: nn.Module) -> list[Any]:
    """Those models in it whose class adds a balance loss to the loss of labels."""
    asked = [inner for inner in models_with_labels(model) if "output_router_logits" in parameter_names(type(inner))]
    return [inner for inner in asked if hasattr(inner, "router_aux_loss_coef")]


def balance_coefficient(config: Any) -> float | None:
    """What a causal language model of a config multiplies its own balance loss by; None where it adds none."""
    text = config.get_text_config()
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    if not getattr(text, "output_router_logits", False) or model is None:
        return None
    return text.router_aux_loss_coef if "output_router_logits" in parameter_names(model) else None


def wants_router_logits(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for router logits, or leaves it to a config that does."""
    given = bind(model, args, kwargs).arguments
    asked = given.get("output_router_logits", given.get("kwargs", {}).get("output_router_logits"))
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False) if asked is None else asked)


def _begin(as_tuple: bool = False) -> _Call:
    return _Call([], torch.is_grad_enabled(), as_tuple)


def _pooled(model: nn.Module, routings: list[Routing]) -> Tensor:
    router = next(iter(routers(model).values()))
    return pooled_balance_loss(routings, router.config.top_k, router.reduce_counts)


def _let_transformers_record(decoder: Any) -> None:
    """transformers looks for its own routers, and for hooks by the class of the model, which FSDP changes."""
    for router in routers(decoder).values():
        if not getattr(router, "is_recorded", False):
            index = Routing._fields.index("logits")
            output_capturing.install_output_capuring_hook(router, "router_logits", index=index)
            router.is_recorded = True  # type: ignore[assignment]
    if not output_capturing._CAN_RECORD_REGISTRY.get(decoder):
        output_capturing._CAN_RECORD_REGISTRY[decoder] = decoder._can_record_outputs
