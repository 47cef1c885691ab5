"""Which parameters are for Muon, and which for AdamW."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from moesaic.layers import GroupedExperts, TopKRouter
from moesaic.layers.lora import ExpertsAdapter
from moesaic.parallel.split import whole_of


def param_groups(model: nn.Module, *, adamw: Iterable[nn.Module] = ()) -> list[dict[str, Any]]:
    """Groups of all trainable parameters of a model, for :class:`moesaic.optim.Muon`.

    Muon gets the matrices of hidden layers: the weights of ``nn.Linear`` and of experts, and the factors of adapters on
    them, which are matrices, too. AdamW gets what is left: embeddings, the output head, routers, norms, biases, and
    parameters of modules that are not known here. It gets matrices of one row or column, too. AdamW applies no weight
    decay to vectors, nor to the experts' biases, which are one vector for each expert. Frozen parameters are in no
    group, and the weights of quantised experts are no parameters.

    Call it after :func:`moesaic.parallelize`, as one makes an optimizer. AdamW has a group for each mesh, for its fused
    step takes tensors of one mesh only.

    Args:
        model: the model. Its output head is what ``model.get_output_embeddings()`` returns, if it has such a method.
        adamw: modules whose parameters are also for AdamW, such as the output head of another model.

    Raises:
        ValueError: no parameter of the model requires a gradient; of stages, of none of them.

    Example:
        >>> [group["algorithm"] for group in param_groups(MoE(MoEConfig(dim=8, hidden_dim=16, num_experts=4, top_k=2)))]
        ['muon', 'adamw']
    """
    matrices = {id(parameter) for module in model.modules() for parameter in _matrices_of(module)}
    for module in [*_outside(model), *adamw]:
        matrices -= {id(parameter) for parameter in module.parameters()}
    biases = {id(b) for m in model.modules() if isinstance(m, GroupedExperts) for b in (m.b1, m.b3, m.b2)}
    muon: list[nn.Parameter] = []
    others: dict[tuple[bool, DeviceMesh | None], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in matrices:
            muon.append(parameter)
        else:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            decays = parameter.ndim >= 2 and id(parameter) not in biases
            others.setdefault((decays, mesh), []).append(parameter)
    if not any(parameter.requires_grad for parameter in whole_of(model).parameters()):
        raise ValueError("model: none of its parameters requires a gradient, so there is nothing to optimize")
    groups: list[dict[str, Any]] = [{"params": muon, "algorithm": "muon"}] if muon else []
    for (decays, _), parameters in others.items():
        decay = {} if decays else {"weight_decay": 0.0}
        groups.append({"params": parameters, "algorithm": "adamw", "fused": True, **decay})
    # A stage of a pipeline may be frozen, and torch's optimizers want a group.
    return groups or [{"params": [], "algorithm": "adamw", "fused": True}]


def _matrices_of(module: nn.Module) -> list[Tensor]:
    """The parameters of a module by itself that are matrices of a hidden layer."""
    if isinstance(module, nn.Linear):
        own = [module.weight]
    elif isinstance(module, GroupedExperts):
        own = [p for name, p in module.named_parameters(recurse=False) if name.startswith("w")]
    elif isinstance(module, ExpertsAdapter):
        own = list(module.parameters(recurse=False))
    else:
        own = []
    return [parameter for parameter in own if parameter.ndim in (2, 3) and min(parameter.shape[-2:]) > 1]


def _outside(model: nn.Module) -> list[nn.Module]:
    """Modules whose matrices are of no hidden layer. Adapters on them are within them."""
    found: list[nn.Module] = [m for m in model.modules() if isinstance(m, TopKRouter | nn.Embedding)]
    output = getattr(model, "get_output_embeddings", None)
    head = output() if callable(output) else None
    return found if head is None else [*found, head]
