"""Adapters under the names that each expert has in files of transformers, and had as a linear layer in version 4.

Legend: E experts, r rank.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from moesaic.integrations.peft.targets import Target
from moesaic.integrations.transformers.plain import plain_on_meta

_PREFIX = "base_model.model."
Form = Callable[[Target, Mapping[str, Tensor]], list[tuple[str, Tensor]]]


def by_each_expert(model: nn.Module, targets: list[Target], config: Any) -> tuple[Form, Any]:
    """What gives the tensors of a target for a file, and the config that goes with it.

    Raises:
        ValueError: files of this family have no tensor for each expert; or linear layers of one name have adapters of
            two ranks.
    """
    plain = plain_on_meta(model, without_adapters=True)
    names = {target.key: _names(plain, target) for target in targets}

    def form(target: Target, factors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        if target.link is None:
            # Of a linear layer, or of the router, which was one.
            (name,) = names[target.key].values()
            a, b = (factors[n] for n in (("a", "b") if target.is_router else ("lora_a", "lora_b")))
            return _pair(name, a, b)
        tensors: list[tuple[str, Tensor]] = []
        a_EIr = factors[f"{target.weights[0]}_a"]
        for (expert, part), name in sorted(names[target.key].items()):
            b_ErO = factors[f"{target.weights[part]}_b"]
            tensors += _pair(name, a_EIr[expert].mT, b_ErO[expert].mT)
        return tensors

    return form, _config(config, targets, names)


def _pair(name: str, a: Tensor, b: Tensor) -> list[tuple[str, Tensor]]:
    return [(f"{_PREFIX}{name}.lora_A.weight", a), (f"{_PREFIX}{name}.lora_B.weight", b)]


def _names(plain: Any, target: Target) -> dict[tuple[int, int], str]:
    """The layer's name by expert and weight; one name for what is no weight of experts."""
    if target.link is None:
        (name,) = revert_weight_conversion(plain, {target.weight_in_plain: torch.empty(1, 1)})
        return {(0, 0): name.removesuffix(".weight")}
    # transformers takes such a tensor apart, and its numbers say what went where.
    parts = len(target.weights)
    numbers = torch.arange(target.experts * parts, dtype=torch.float32).view(target.experts, parts, 1)
    found = revert_weight_conversion(plain, {target.weight_in_plain: numbers})
    if len(found) != numbers.numel():
        raise ValueError(
            f"each_expert: {type(plain).__name__} has no tensor for each expert in its files; leave it out"
        )
    return {divmod(int(t.item()), parts): name.removesuffix(".weight") for name, t in found.items()}


def _config(config: Any, targets: list[Target], names: Mapping[str, Mapping[Any, str]]) -> Any:
    """Of linear layers alone. Each scale is alpha / r, for peft puts two factors together, and only this stays then."""
    ranks: dict[str, tuple[int, float]] = {}
    for target in targets:
        rank = (target.rank.r, target.rank.scale * target.rank.r)
        for name in names[target.key].values():
            leaf = name.rpartition(".")[2]
            if ranks.setdefault(leaf, rank) != rank:
                raise ValueError(
                    f"each_expert: layers called '{leaf}' have adapters of ranks {ranks[leaf][0]} and {rank[0]} or of "
                    "other scales; leave each_expert out"
                )
    result = copy.deepcopy(config)
    result.target_parameters, result.target_modules, result.use_rslora = None, set(ranks), False
    (result.r, result.lora_alpha), *_ = ranks.values()
    result.rank_pattern = {leaf: r for leaf, (r, _) in ranks.items() if r != result.r}
    result.alpha_pattern = {leaf: alpha for leaf, (_, alpha) in ranks.items() if alpha != result.lora_alpha}
    return result
