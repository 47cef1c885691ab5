"""The number of tokens that each expert of a model got, and the bias that balances it without an auxiliary loss.

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
    """The number of tokens that each expert got since the last :func:`reset_expert_load`: ``{router name: [E]}``.

    The tokens of all processes count. Collective: every process calls it. It costs one small reduction for each router,
    and the host does not wait for the device.
    """
    return {name: router.reduce_counts(router.load) for name, router in routers(model).items()}


@torch.no_grad()
def reset_expert_load(model: nn.Module) -> None:
    """Set the counts of all routers to zero."""
    for router in routers(model).values():
        router.load.zero_()


@torch.no_grad()
def update_expert_bias(model: nn.Module) -> None:
    """Balance the load by one step, without an auxiliary loss: ``bias += speed * sign(mean load - load)``, centred.

    The load is that since the last reset. Call this once in each optimizer step, and then :func:`reset_expert_load`.
    Collective. Routers without a bias do not change. From DeepSeek-V3 (arXiv 2408.15664).
    """
    for router in routers(model).values():
        if router.bias is None:
            continue
        load_E = router.reduce_counts(router.load).to(torch.float32)
        step_E = router.config.bias_update_speed * torch.sign(load_E.mean() - load_E)
        router.bias += step_E - step_E.mean()
