"""Whether the fake kernel of an operator says what the real one returns."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.sharding.proof.examples import Example, first_line


def check_fake(example: Example, results: Sequence[Tensor]) -> None:
    """Refuse an operator whose results DTensor cannot know, or knows wrongly.

    Raises:
        ValueError: with what the fake kernel says.
    """
    name = example.op._name
    try:
        problem = misfit(example, example.tensors, results)
    except Exception as error:
        raise ValueError(
            f"{name} does not work on meta tensors, from which DTensor learns the shapes of results. "
            f"Give it a fake kernel with register_fake ({first_line(error)})"
        ) from error
    if problem:
        given = ", ".join(f"{n} {_show(t)}" for n, t in zip(example.names, example.tensors, strict=True))
        raise ValueError(f"{name}: its fake kernel is wrong for {given}: {problem}. Correct its register_fake")


def misfit(example: Example, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> str:
    """How results differ in shape or dtype from what the fake kernel says for these tensors; "" if they do not."""
    key = tuple((t.shape, t.dtype) for t in tensors)
    if key not in example.fakes:
        metas = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors]
        example.fakes[key] = tuple((r.shape, r.dtype) for r in example.run(metas))
    fakes = example.fakes[key]
    if len(fakes) != len(results):
        return f"it makes {len(fakes)} results, the operator {len(results)}"
    for i, ((shape, dtype), result) in enumerate(zip(fakes, results, strict=True)):
        if (shape, dtype) != (result.shape, result.dtype):
            which = f"result {i} " if len(results) > 1 else ""
            return f"it says {which}is {_show(torch.empty(shape, dtype=dtype, device='meta'))}, it is {_show(result)}"
    return ""


def _show(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
