"""`python compiled.py BACKEND|IMPLEMENTATION`: compiled, operators are one graph for all sizes and have the eager bits.

A program and not a test module, since the run-time checks of the other tests break compilation. Values are small
integers, so every sum is exact whatever the compiler does to its order.

Legend: T tokens, K copies a token, R rows, D model dim, E experts.
"""

import sys
from collections.abc import Callable, Sequence

import torch
import torch._inductor.config
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from moesaic.ops import combine, experts_mlp, grouped_mm, permute, sort_by_expert

D, E = 8, 4
IMPLEMENTATIONS = ("reference", "torch", "cpu", "triton")


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-4, 5, shape).to(dtype).requires_grad_()


def flat(impl: str | None) -> tuple[Callable, Callable]:
    w = integers(E, 6, D)

    def inputs(R: int) -> tuple[Tensor, ...]:
        return integers(R, D), w, torch.tensor([R // 4, 0, R // 2, R // 8], dtype=torch.int32)

    return lambda x, w, sizes: 2 * grouped_mm(x, w.mT, sizes, impl=impl), inputs


def blocked(num_weights: int) -> tuple[Callable, Callable]:
    w = integers(num_weights, D, 6)

    def inputs(R: int) -> tuple[Tensor, ...]:
        return integers(2 * R, D), w, torch.tensor([[R // 4, R // 2], [R, 0]])

    return lambda x, w, sizes: 2 * grouped_mm(x, w, sizes), inputs


def fp32_result() -> tuple[Callable, Callable]:
    w = integers(E, D, 6, dtype=torch.bfloat16)

    def inputs(R: int) -> tuple[Tensor, ...]:
        return integers(R, D, dtype=torch.bfloat16), w, torch.tensor([R // 4, 0, R // 2, R // 8])

    return lambda x, w, sizes: 2 * grouped_mm(x, w, sizes, out_dtype=torch.float32), inputs


def autocast() -> tuple[Callable, Callable]:
    _, inputs = flat(None)

    def function(x: Tensor, w: Tensor, sizes: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return grouped_mm(x, w.mT, sizes)

    return function, inputs


def layer() -> tuple[Callable, Callable]:
    w = integers(E, D, D)

    def inputs(T: int) -> tuple[Tensor, ...]:
        return integers(T, D), w, torch.randint(0, E + 1, (T, 2)), integers(T, 2)

    def function(x: Tensor, w: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        permutation = sort_by_expert(ids, E)
        return combine(grouped_mm(permute(x, permutation), w, permutation.group_sizes), permutation, weights)

    return function, inputs


def experts(impl: str, *, listed: bool) -> tuple[Callable, Callable]:
    w1, w3, w2 = integers(E, D, 6), integers(E, D, 6), integers(E, 6, D)

    def inputs(T: int) -> tuple[Tensor, ...]:
        ids = torch.randint(0, E + 1, (T, 2)) - 1
        # The copies that are there, and a list that is longer.
        copies = torch.cat([(ids.flatten() >= 0).nonzero().flatten(), torch.full((2 * T,), -1)])[: 2 * T]
        return integers(T, D), w1, w3, w2, ids, integers(T, 2), copies

    def function(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, copies: Tensor) -> Tensor:
        return 2 * experts_mlp(x, ids, weights, w1, w3, w2, copies=copies if listed else None, impl=impl)

    return function, inputs


def check(function: Callable, inputs: Callable, backend: str, *, dynamic: bool | None, sizes: Sequence[int]) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic)
    for size in sizes:
        arguments = inputs(size)
        leaves = [t for t in arguments if t.requires_grad]
        # The gradient of a sum has stride 0; that of the squares has not.
        for loss in (lambda y: y.sum(), lambda y: y.square().sum()):
            ours, theirs = compiled(*arguments), function(*arguments)
            assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
            assert torch.equal(ours, theirs)
            gradients = (torch.autograd.grad(loss(y), leaves) for y in (ours, theirs))
            for a, b in zip(*gradients, strict=True):
                assert torch.equal(a, b)
    # One graph for the first size, and one for all others.
    graphs = 1 if dynamic else 2
    assert counter.frame_count == graphs, f"{counter.frame_count} graphs for {len(sizes)} sizes"


def main(backend: str) -> None:
    """All cases in one backend, or in aot_eager those of one implementation."""
    torch.manual_seed(0)
    if backend == "inductor":
        # What is cached on disk may call operators as they were then: their gradients are not part of its key.
        torch._inductor.config.force_disable_caches = True
        # It checks the strides of what an operator returns against those of its fake.
        return check(*layer(), backend, dynamic=True, sizes=(16, 9))
    if backend in IMPLEMENTATIONS:
        print(backend, flush=True)
        cases = [experts(backend, listed=True), flat(backend), experts(backend, listed=False)]
        # Interpreted kernels take seconds.
        for case in cases[:1] if backend == "triton" else cases:
            check(*case, "aot_eager", dynamic=True, sizes=(16, 9))
        return None
    named = {
        "flat": flat(None),
        "own experts": blocked(4),
        "fewer experts": blocked(3),
        "shared experts": blocked(2),
        "fp32 result": fp32_result(),
        "autocast": autocast(),
        "layer": layer(),
    }
    for name, case in named.items():
        print(name, flush=True)
        check(*case, backend, dynamic=None, sizes=(16, 9, 40, 33))
        check(*case, backend, dynamic=True, sizes=(16, 9))


if __name__ == "__main__":
    main(sys.argv[1])
