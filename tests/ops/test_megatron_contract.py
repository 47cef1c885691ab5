"""The connection to Megatron's main gradients that docs/design.md shows does what Megatron asks of a weight."""

import re
from pathlib import Path

import pytest
import torch

from moesaic.layers import GroupedExperts

GUIDE = Path(__file__).parents[2] / "docs" / "design.md"
CONNECT = re.search(r"```python fragment\n(experts\.main_grads = .*?)```", GUIDE.read_text(), re.DOTALL)


def hold_gradients(weight: torch.nn.Parameter, ready: list[torch.nn.Parameter], overlaps: bool) -> None:
    """What Megatron-Core's DistributedDataParallel does with a weight: a buffer, and a hook behind its gradient."""
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    weight.grad_added_to_main_grad = False
    accumulate = weight.expand_as(weight).grad_fn.next_functions[0][0]

    def hook(*unused):
        assert weight.grad is not None or not overlaps
        if weight.grad is not None and not weight.grad_added_to_main_grad:
            weight.main_grad.add_(weight.grad)
        weight.grad = None
        ready.append(weight)

    accumulate.register_hook(hook)
    weight.accumulate = accumulate  # kept alive, and the hook with it


@pytest.mark.parametrize("overlaps", [False, True])
def test_the_guide(overlaps):
    torch.manual_seed(0)
    experts, ready = GroupedExperts(3, 8, 12, dtype=torch.bfloat16), []
    weights = (experts.w1, experts.w3, experts.w2)
    for weight in weights:
        hold_gradients(weight, ready, overlaps)
    expected = [torch.zeros_like(w.main_grad) for w in weights]
    plain = GroupedExperts(3, 8, 12, dtype=torch.bfloat16)
    plain.load_state_dict(experts.state_dict())
    plain.main_grads = tuple(expected)
    for _ in range(3):
        x, ids, p = torch.randn(7, 8).bfloat16(), torch.randint(3, (7, 2)), torch.rand(7, 2)
        plain(x, ids, p).sum().backward()
        ready.clear()
        assert CONNECT, "no example"
        exec(CONNECT[1], {"experts": experts})
        experts(x, ids, p).sum().backward()
        # Once each, so that Megatron knows when a bucket of gradients is complete.
        assert {id(w) for w in ready} == {id(w) for w in weights}
        assert len(ready) == 3
    for weight, truth in zip(weights, expected, strict=True):
        assert truth.any()
        assert torch.equal(weight.main_grad, truth)
        assert weight.grad is None
