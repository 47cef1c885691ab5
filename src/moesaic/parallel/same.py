"""Ranks that share a model hold the same one. That is compared before one rank's numbers overwrite another's."""

import hashlib

import torch.distributed as dist
from torch import Tensor, nn

from moesaic import ranks
from moesaic.layers import MoE
from moesaic.layers.dropout import KeyedDropout
from moesaic.layers.lora import ExpertsAdapter, RouterAdapter
from moesaic.ops import fastest

# Parts of adapters, whose settings are no tensors.
_OF_ADAPTERS = ExpertsAdapter | RouterAdapter | KeyedDropout
# What stands under a name, in words, in the order of the model.
Description = list[tuple[str, str]]


def describe(model: nn.Module) -> Description:
    """What has to be the same on all ranks: each parameter, buffer and :class:`moesaic.MoE`, by name."""
    seen: dict[int, str] = {}
    said: Description = []
    for kind, named in (("parameter", model.named_parameters), ("buffer", model.named_buffers)):
        for name, tensor in named(remove_duplicate=False):
            first = seen.setdefault(id(tensor), name)
            said.append((f"{kind} '{name}'", _form(tensor) if first == name else f"the same as '{first}'"))
    moes = ((name, module) for name, module in model.named_modules() if isinstance(module, MoE))
    said += [(f"layer '{name}'", str(moe.config)) for name, moe in moes]
    adapters = ((n, m) for n, m in model.named_modules() if isinstance(m, _OF_ADAPTERS))
    said += [(f"adapter '{name}'", adapter.extra_repr()) for name, adapter in adapters]
    return said


def _form(tensor: Tensor) -> str:
    frozen = ", frozen" if isinstance(tensor, nn.Parameter) and not tensor.requires_grad else ""
    meta = ", on the meta device" if tensor.is_meta else ""
    return f"{list(tensor.shape)} {tensor.dtype}{frozen}{meta}"


def check_same(mine: Description, group: dist.ProcessGroup) -> None:
    """Raise ``ValueError`` on every rank of ``group`` unless all of them bring the same description. Collective."""
    # Descriptions are long for large models, and nearly always equal.
    digests = ranks.gather(hashlib.sha256(repr(mine).encode()).digest(), group)
    if len(set(digests)) == 1:
        return
    everyone = ranks.gather(mine, group)
    other = next(i for i, digest in enumerate(digests) if digest != digests[0])
    one, two = (dist.get_global_rank(group, i) for i in (0, other))
    raise ValueError(
        f"model: ranks {one} and {two} share meshes and bring different models: "
        f"{_difference(everyone[0], everyone[other], one, two)}. Give both the same model; or, if they hold "
        "other layers, as pipeline stages do, give each stage meshes of its own: build_meshes(mesh=...)"
    )


def _difference(one: Description, two: Description, first: int, second: int) -> str:
    forms, others = dict(one), dict(two)
    for name in forms | others:
        here, there = forms.get(name, "missing"), others.get(name, "missing")
        if here != there:
            return f"{name} is {here} on rank {first}, and {there} on rank {second}"
    here, there = next((a, b) for (a, _), (b, _) in zip(one, two, strict=True) if a != b)
    return f"where rank {first} has {here}, rank {second} has {there}"


def share_choices(group: dist.ProcessGroup) -> None:
    """All ranks of ``group`` go by the first one's choice of implementations on the CPU. Collective.

    Raises:
        RuntimeError: on all of them, where one has no kernels for that.
    """
    choices = ranks.gather(fastest.in_force(), group)
    if all(theirs == choices[0] for theirs in choices):
        return

    def take() -> None:
        fastest.check_runs(choices[0], f"rank {dist.get_global_rank(group, 0)}")
        fastest.use(choices[0])

    ranks.together(take, group=group)
