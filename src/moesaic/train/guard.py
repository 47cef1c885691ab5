"""Find numbers that are not finite before the optimizer step, and the layer where they began.

Forward hooks record in a tensor on the device whether the output of each layer was finite, so nothing waits. The step
sends that tensor along with the loss, so all ranks get to know together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesaic import ranks
from moesaic.parallel.decoder import Elsewhere
from moesaic.parallel.split import Stages, names_in_whole, whole_of


class ForwardGuard:
    """Watches the embedding, the decoder layers, the last norm and the head of a transformers model.

    `flags[i]` counts outputs of `names[i]` since `reset` that were not finite. Names are in the order of computation.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        stages = model.stages if isinstance(model, Stages) else []
        # Of stages, too, all names are the same on all ranks.
        self.names = [name for name, _ in _layers(whole_of(model))]
        self.flags = torch.zeros(len(self.names), device=device)
        self._handles = [
            module.register_forward_hook(self._hook(index))
            for part in ([stage.whole for stage in stages] or [model])
            for index, (_, module) in enumerate(_layers(part))
            if not isinstance(module, Elsewhere)
        ]

    def reset(self) -> None:
        """Forget what was seen."""
        self.flags.zero_()

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int) -> Callable[..., None]:
        # A compiler would take each index for another program.
        return torch.compiler.disable(lambda _module, _args, output: self._note(index, output))

    @torch.no_grad()
    def _note(self, index: int, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        self.flags[index] += (~torch.isfinite(_local(tensor.detach()))).any()


def first_bad_gradient(model: nn.Module) -> str | None:
    """The parameter at which gradients stopped being finite, the same on all ranks; None if all are finite.

    Backward goes from the last layer to the first, so if there are several, it is the last one.
    """
    names = names_in_whole(model)
    own = {names[name] for name, parameter in model.named_parameters() if _bad(parameter.grad)}
    bad = set().union(*ranks.gather(own))
    return next((name for name, _ in reversed(list(whole_of(model).named_parameters())) if name in bad), None)


def first_flagged(names: Sequence[str], counts: Sequence[float]) -> str | None:
    """The first name with a count."""
    return next((name for name, count in zip(names, counts, strict=True) if count), None)


def _layers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Also those that are on another stage, which compute nothing here."""
    names = {id(module): name for name, module in model.named_modules()}
    body = model.base_model
    found = [model.get_input_embeddings(), *body.layers, getattr(body, "norm", None), model.get_output_embeddings()]
    for module in found:
        if module is not None:
            yield names[id(module)], module


def _bad(gradient: Tensor | None) -> Tensor:
    return torch.tensor(False) if gradient is None else (~torch.isfinite(_local(gradient))).any()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local(grad_placements=tensor.placements) if isinstance(tensor, DTensor) else tensor
