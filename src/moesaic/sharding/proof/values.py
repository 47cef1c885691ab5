"""Values of a proof: which were tried, and others that make it likely that a dependence on them shows."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moesaic.sharding.decide import is_tensor
from moesaic.sharding.proof.examples import Example, has_fractions
from moesaic.sharding.when import as_text, flags_of


def skewed(example: Example) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Calls with most numbers of an integer tensor the same, in words and as arguments.

    They are its smallest that is not negative: an id stays an id, and sizes of groups add up to no more than before.
    What has a capacity for each expert, say, is over it then. Where nothing but the shape is read nothing is changed.
    """
    assert example.line is not None
    tensors = example.tensors
    for i, (name, t, pattern) in enumerate(zip(example.names, tensors, example.line.inputs, strict=True)):
        if has_fractions(t) or t.dtype == torch.bool or t.numel() < 2 or pattern.shape_only or not bool((t >= 0).any()):
            continue
        # One in four is left: of a constant tensor each rank's part is like any other.
        stays = (torch.arange(t.numel(), device=t.device) % 4 == 3).view(t.shape)
        changed = torch.where(stays, t, t[t >= 0].min())
        if not torch.equal(changed, t):
            yield (
                f"most of {name} {changed.flatten()[0].item()}",
                example.arguments([*tensors[:i], changed, *tensors[i + 1 :]]),
            )


def constants(example: Example) -> list[tuple[str, int]]:
    """The flags that may be a window or a capacity: ints, by name, that a size can be around."""
    arguments = zip(example.op._schema.arguments, example.args, strict=False)
    return [(a.name, v) for a, v in arguments if type(v) is int and v > 1]


def beyond_all_sizes(examples: Sequence[Example]) -> list[str]:
    """What may change at a size that no example has: flags larger than all sizes of the calls that have them."""
    largest: dict[tuple[str, int], int] = {}
    for example in examples:
        for constant in constants(example):
            sizes = [n for shape in example.shapes for n in shape]
            largest[constant] = max(largest.get(constant, 0), *sizes, 0)
    return [
        f"{name}={value} is more than any size: what changes beyond it was not tried"
        for (name, value), n in largest.items()
        if value >= n
    ]


def tried(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """The values of each argument in the examples, once each; of a tensor only whether it is given."""
    found: dict[str, dict[Any, None]] = {}
    for example in examples:
        for name, value in flags_of(example.op, example.args, {}).items():
            found.setdefault(name, {})[value] = None
    return {name: list(values) for name, values in found.items()}


def described(examples: Sequence[Example]) -> list[str]:
    """For each flag, and each tensor whose values may be indices or sizes, what the examples had."""
    seen: dict[str, list[torch.Tensor]] = {}
    for example in examples:
        for name, t in zip(example.names, example.tensors, strict=True):
            if not has_fractions(t) and t.numel():
                seen.setdefault(name, []).append(t.flatten().to(torch.int64))
    texts = [
        as_text(argument.name, *values)
        for argument in examples[0].op._schema.arguments
        if not is_tensor(argument.type) and (values := tried(examples)[argument.name]) != [None]
    ]
    for name, of_name in seen.items():
        values = torch.cat(of_name)
        texts.append(f"{name} from {values.min().item()} to {values.max().item()}, {values.unique().numel()} values")
    return texts
