"""How many tokens the experts of a whole model got, and the aux-loss-free bias that evens it out.

Legend: E experts.
"""

import torch
from torch import Tensor, nn

from moesaic.layers.router import TopKRouter


def routers(model: nn.Module) -> dict[str, TopKRouter]:
    """Every router of a model, by its module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TopKRouter)}


@torch.no_grad()
def expert_load(model: nn.Module) -> dict[str, Tensor]:
    """Tokens each expert got since the last :func:`reset_expert_load`, over all processes: ``{router name: [E]}``.

    Collective: every process calls it. Costs one small reduction a router and no host synchronisation.
    """
    return {name: router.reduce_counts(router.load) for name, router in routers(model).items()}


@torch.no_grad()
def reset_expert_load(model: nn.Module) -> None:
    """Start counting from zero."""
    for router in routers(model).values():
        router.load.zero_()


@torch.no_grad()
def update_expert_bias(model: nn.Module) -> None:
    """One step of aux-loss-free balance: ``bias += speed * sign(mean load - load)``, centred.

    Uses the load since the last reset; call it once an optimizer step, then :func:`reset_expert_load`. Collective.
    Routers without a bias are left alone. From DeepSeek-V3 (arXiv 2408.15664).
    """
    for router in routers(model).values():
        if router.bias is None:
            continue
        load_E = router.reduce_counts(router.load).to(torch.float32)
        step_E = router.config.bias_update_speed * torch.sign(load_E.mean() - load_E)
        router.bias += step_E - step_E.mean()
