"""One pass of each kernel on a GPU in few rows, some and many, for a tool that looks for memory errors.

Forward and backward, main gradients too, of the forms of experts and of the grouped products, in every dtype, each
compared with ``impl="torch"``, in memory filled with NaN. Times nothing. Sizes are such that masks are needed. With
``--quick``, bf16 and two forms only: all forms and dtypes are some 260 kernels, which take minutes to compile.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.gpu.one_pass [--quick]
    python -m benchmarks.gpu.one_pass --dry-run
"""

import sys
from typing import Any

import torch
from benchmarks.gpu import common
from benchmarks.gpu.common import DEVICE, DRY_RUN
from benchmarks.gpu.shapes import Shape, route
from torch import Tensor

from moesaic.ops import Activation, accumulate_weight_grad, experts_mlp, grouped_mm

SHAPE = Shape("one pass", D=200, F=328, E=5, K=2, kind="")
TOKENS = (9, 150, 1500)
DTYPES = {torch.bfloat16: 3e-2, torch.float16: 3e-2, torch.float32: 1e-4}
# Activation, gated, biased.
FORMS: tuple[tuple[Activation, bool, bool], ...] = (
    ("silu", True, False),
    ("silu", True, True),
    ("gelu", False, False),
    ("clamped_swiglu", True, True),
)
if DRY_RUN:
    SHAPE = Shape("one pass", D=24, F=40, E=3, K=2, kind="")
    TOKENS, DTYPES, FORMS = (9,), {torch.bfloat16: 3e-2}, FORMS[-1:]


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * shape[-2] ** -0.5).to(dtype)


def compare(what: str, ours: list[Tensor], base: list[Tensor], allowed: float) -> None:
    for i, (a, b) in enumerate(zip(ours, base, strict=True)):
        wrong = common.error(a, b)
        assert wrong < allowed, f"{what}, result {i}: relative difference {wrong:.2g}"


def check_experts(tokens: int, dtype: torch.dtype, form: tuple[Activation, bool, bool]) -> None:
    activation, is_gated, is_biased = form
    E, D, F = SHAPE.E, SHAPE.D, SHAPE.F
    torch.manual_seed(0)
    x, grad = (random(tokens, D, dtype=dtype) * D**0.5 for _ in range(2))
    ids, weights = route(SHAPE, tokens, "zipf")
    w1, w3, w2 = random(E, D, F, dtype=dtype), random(E, D, F, dtype=dtype), random(E, F, D, dtype=dtype)
    b1, b3 = (random(E, F, dtype=dtype) for _ in range(2))
    named = {"x": x, "weights": weights, "w1": w1, "w3": w3, "w2": w2, "b1": b1, "b3": b3}
    if not is_gated:
        del named["w3"], named["b3"]
    if not is_biased:
        named = {name: t for name, t in named.items() if name not in ("b1", "b3")}

    def run(impl: str, main: bool = False) -> list[Tensor]:
        leaf = {name: t.detach().requires_grad_() for name, t in named.items()}
        projections = (leaf["w1"], leaf.get("w3"), leaf["w2"])
        buffers = tuple(None if w is None else torch.zeros_like(w, dtype=torch.float32) for w in projections)
        biases = {name: leaf.get(name) for name in ("b1", "b3")}
        z = experts_mlp(
            leaf["x"], ids, leaf["weights"], *projections,
            activation=activation, impl=impl, main_grads=buffers if main else None, **biases,
        )  # fmt: skip
        z.backward(grad)
        others = [t.grad for t in leaf.values() if t.grad is not None and all(t is not w for w in projections)]
        found = buffers if main else [None if w is None else w.grad for w in projections]
        return [z.detach(), *others, *(t for t in found if t is not None)]

    base = run("torch")
    for main in (False, True):
        with common.poisoned():
            ours = run("triton", main)
        compare(f"experts, {tokens} tokens, {dtype}, {form}, main gradients {main}", ours, base, DTYPES[dtype])
        assert all(map(torch.equal, ours, run("triton", main))), f"{form}, {dtype}: two runs differ"


def check_products(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ids, _ = route(SHAPE, tokens, "zipf")
    sizes = torch.bincount(ids.flatten(), minlength=SHAPE.E)
    x, grad = (random(ids.numel(), n, dtype=dtype) for n in (SHAPE.D, SHAPE.F))
    weight = random(SHAPE.E, SHAPE.D, SHAPE.F, dtype=dtype)

    def run(impl: str) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        y = grouped_mm(*leaves, sizes, impl=impl)
        y.backward(grad)
        into = torch.zeros_like(weight, dtype=torch.float32)
        accumulate_weight_grad(into, x, grad, sizes, impl=impl)
        return [y.detach(), *(t.grad for t in leaves if t.grad is not None), into]

    with common.poisoned():
        ours = run("triton")
    compare(f"grouped_mm, {tokens} tokens, {dtype}", ours, run("torch"), DTYPES[dtype])


def measure(row: dict[str, Any], is_quick: bool = True) -> None:
    """Fill the row with what was found right; raises at the first thing that is not."""
    dtypes = list(DTYPES)[:1] if is_quick else list(DTYPES)
    forms = (FORMS[0], FORMS[-1]) if is_quick and not DRY_RUN else FORMS
    for dtype in dtypes:
        for tokens in TOKENS:
            for form in forms:
                check_experts(tokens, dtype, form)
            check_products(tokens, dtype)
    row["checked"] = f"every kernel right: {len(dtypes)} dtypes, {len(forms)} forms, {len(TOKENS)} numbers of tokens"


def main() -> None:
    common.require_gpu()
    row: dict[str, Any] = {}
    measure(row, "--quick" in sys.argv)
    print(f"one pass: {row['checked']}")


if __name__ == "__main__":
    main()
