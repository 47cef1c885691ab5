"""experts_lora is experts_mlp with the products of the factors added to the weights."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import moesaic
from moesaic.ops import ACTIVATIONS, experts_lora, experts_mlp

ops = torch.ops.moesaic
FACTORS = ("lora1", "lora3", "lora2")
# Errors relative in norm, over those of a loop that rounds every intermediate to the same dtype.
MARGINS = {torch.float64: 4.0, torch.float32: 4.0, torch.bfloat16: 1.5}


def problem(
    ids: torch.Tensor,
    experts: int,
    sizes: tuple[int, int, int] = (6, 5, 3),
    gated: bool = True,
    biased: bool = True,
    adapted: tuple[str, ...] = FACTORS,
    share: bool = False,
) -> dict[str, Any]:
    """Operands in fp64; factors as pairs."""
    (T, K), (D, F, r) = ids.shape, sizes
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / 2

    E = experts
    p: dict[str, Any] = {"x": draw(T, D), "topk_ids": ids, "topk_weights": draw(T, K)}
    p |= {"w1": draw(E, D, F), "w3": draw(E, D, F) if gated else None, "w2": draw(E, F, D)}
    p |= {"b1": draw(E, F), "b3": draw(E, F) if gated else None, "b2": draw(E, D)} if biased else {}
    pairs = {"lora1": (draw(E, D, r), draw(E, r, F)), "lora2": (draw(E, F, r + 1), draw(E, r + 1, D))}
    if gated:
        pairs["lora3"] = (pairs["lora1"][0] if share else draw(E, D, r), draw(E, r, F))
    return p | {name: pairs[name] for name in adapted if name in pairs}


def computed(p: dict[str, Any], dtype: torch.dtype = torch.float64, impl: str | None = None, **options: Any) -> Any:
    """The result, and the gradients of tokens, routing weights and factors. ``impl="summed"`` is by experts_mlp."""
    leaves: dict[Any, torch.Tensor] = {}

    def take(t: Any) -> Any:
        if isinstance(t, tuple):
            return tuple(map(take, t))
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        return leaves.setdefault(id(t), t.detach().to(dtype).clone())

    args = {name: take(t) for name, t in p.items()}
    wanted = [args["x"], args["topk_weights"]]
    wanted += {id(t): t for name in FACTORS if name in args for t in args[name]}.values()
    for t in wanted:
        t.requires_grad_()
    if impl == "summed":
        pairs = {name: args.pop(name) for name in FACTORS if name in args}
        for name, (a, b) in pairs.items():
            args[f"w{name[-1]}"] = args[f"w{name[-1]}"] + a @ b
        z = experts_mlp(**args, impl="reference", **options)
    else:
        z = experts_lora(**args, impl=impl, **options)
    grad = torch.linspace(-1, 2, z.numel(), dtype=torch.float64).view(z.shape).to(dtype)
    return [z.detach(), *torch.autograd.grad(z, wanted, grad)]


def errors(found: Any, truth: Any) -> list[float]:
    return [float((t.double() - true).norm() / (true.norm() + 1e-30)) for t, true in zip(found, truth, strict=True)]


@settings(max_examples=25)
@given(
    ids=st.integers(0, 7).flatmap(
        lambda T: st.lists(st.lists(st.integers(-1, 3), min_size=2, max_size=2), min_size=T, max_size=T)
    ),
    sizes=st.tuples(st.sampled_from((1, 6, 17)), st.sampled_from((1, 5, 16)), st.sampled_from((1, 3, 8))),
    gated=st.booleans(),
    biased=st.booleans(),
    adapted=st.sets(st.sampled_from(("lora1", "lora2")), min_size=1).map(sorted).map(tuple),
    third=st.sampled_from(("none", "own", "shared")),
)
def test_it_is_the_sum_of_weight_and_product(ids, sizes, gated, biased, adapted, third):
    ids = torch.tensor(ids, dtype=torch.int64).reshape(-1, 2)
    if third != "none":
        adapted = tuple({*adapted, "lora1", "lora3"})
    p = problem(ids, 4, sizes, gated, biased, adapted, share=third == "shared")
    expected = computed(p, impl="summed")
    for impl in (None, "reference", "torch"):
        for found, true in zip(computed(p, impl=impl), expected, strict=True):
            torch.testing.assert_close(found, true, rtol=1e-11, atol=1e-11)


IDS = torch.randint(-1, 4, (40, 2), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    p = problem(IDS, 4)
    expected = computed(p, impl="summed", activation=activation)
    assert max(errors(computed(p, activation=activation), expected)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", [None, "torch"])
def test_errors_are_those_of_a_loop(impl, dtype):
    """The loop computes in the same dtype with the summed weights."""
    p = problem(IDS, 4, (32, 24, 4))
    rounded = {n: tuple(t.to(dtype).double() for t in v) if isinstance(v, tuple) else v for n, v in p.items()}
    rounded = {
        n: v.to(dtype).double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in rounded.items()
    }
    truth = computed(rounded, impl="summed")
    ours, loop = (errors(computed(rounded, dtype, how), truth) for how in (impl, "summed"))
    eps = torch.finfo(dtype).eps
    assert all(mine <= MARGINS[dtype] * max(its, eps) for mine, its in zip(ours, loop, strict=True)), (ours, loop)


def test_blocks():
    """Two blocks of tokens, each with experts of its own; the last has one fewer."""
    p = problem(IDS, 3)
    first, second = IDS[:20] % 2, torch.where(IDS[20:] >= 0, 0, -1)
    whole = torch.cat([first, torch.where(second >= 0, second + 2, -1)])
    expected = computed(p | {"topk_ids": whole}, impl="summed")
    blocks = {name: p[name].unflatten(0, (2, 20)) for name in ("x", "topk_weights")}
    found = computed(p | blocks | {"topk_ids": torch.stack([first, second])})
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.reshape(true.shape), true)


def operands(gated: bool = True) -> tuple[Any, ...]:
    p = problem(IDS[:6], 3 + 1, gated=gated)
    base = [p["x"][None], p["topk_ids"][None], p["topk_weights"][None], torch.rand(1, 4)]
    base += [p.get(name) for name in ("w1", "w3", "w2", "b1", "b3", "b2")]
    # With dropout.
    indices = torch.arange(12).view(1, 6, 2), torch.arange(5)
    return (*base, *(t for name in FACTORS for t in p.get(name, (None, None))), *indices)


FLAGS = "silu", None, 0.3


@pytest.mark.parametrize("gated", [pytest.param(True, marks=pytest.mark.long), False])
def test_opcheck(gated):
    args = operands(gated)
    torch.library.opcheck(ops.experts_lora_inference, (*args, *FLAGS))
    _, h1, h3 = ops.experts_lora(*args, *FLAGS)
    for needs in ([True] * 8, [True, *[False] * 7]):
        torch.library.opcheck(ops.experts_lora_backward, (args[0], *args, h1, h3, *FLAGS, needs))
    wants = [i in (0, 2) or 9 < i < 16 for i in range(len(args))]
    leaves = (t.requires_grad_() if t is not None and w else t for t, w in zip(args, wants, strict=True))
    torch.library.opcheck(ops.experts_lora, (*leaves, *FLAGS))


def test_fakes_say_what_comes():
    args = operands()
    z, h1, h3 = ops.experts_lora(*args, *FLAGS)
    with FakeTensorMode() as mode:
        fake = tuple(map(mode.from_tensor, args))
        outputs = ops.experts_lora(*fake, *FLAGS)
    for needs in ([True] * 8, [True, *[False] * 7]):
        real = (z, h1, h3, *ops.experts_lora_backward(z, *args, h1, h3, *FLAGS, needs))
        with mode:
            said = (*outputs, *ops.experts_lora_backward(outputs[0], *fake, *outputs[1:], *FLAGS, needs))
        assert [(t.shape, t.dtype, t.stride()) for t in real] == [(t.shape, t.dtype, t.stride()) for t in said]


def test_autocast():
    p = {n: t.float() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in problem(IDS, 4).items()}
    p |= {name: tuple(t.float() for t in p[name]) for name in FACTORS}
    with torch.autocast("cpu", torch.bfloat16):
        z = experts_lora(**p)
    assert z.dtype == torch.bfloat16


def call(**changes: Any) -> torch.Tensor:
    return experts_lora(**(problem(IDS, 4) | changes))


@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_named():
    p = problem(IDS, 4)
    (a, b), w2 = p["lora2"], p["w2"]
    for changes, error, match in [
        (dict.fromkeys(FACTORS), ValueError, "got no factors; give some, or call moesaic.experts_mlp"),
        ({"lora2": a}, TypeError, r"lora2: expected two tensors, the factors \(a, b\), got Tensor"),
        (
            {"lora2": (a, b[:, :2])},
            ValueError,
            r"lora2: expected b \[4, 4, 6\] for w2 \[4, 5, 6\] and rank 4, got \[4, 2",
        ),
        ({"lora2": (a.mT, b)}, ValueError, r"lora2: expected a \[4, 5, 5\]"),
        ({"lora2": (a.float(), b)}, TypeError, r"w2_a: dtype torch.float32 differs from x's torch.float64"),
        ({"w3": None, "b3": None}, ValueError, "lora3: given without w3"),
        ({"w2": w2.clone().requires_grad_()}, ValueError, r"w2: requires a gradient.*w2.requires_grad_\(False\)"),
        ({"dropout": 1.0}, ValueError, "dropout: must be a number, at least 0 and below 1, got 1.0"),
        ({"dropout": 0.1}, ValueError, "keys: dropout 0.1 needs a number for each copy"),
        ({"keys": IDS}, ValueError, "keys, columns: are for a dropout, which is 0; leave them out"),
        (
            {"dropout": 0.1, "keys": IDS[1:]},
            ValueError,
            r"keys: expected int64 \[40, 2\], as topk_ids, got .*\[39, 2\]",
        ),
        (
            {"dropout": 0.1, "keys": IDS, "columns": IDS[:3, 0]},
            ValueError,
            r"columns: expected int64 \[5\], got .*\[3\]",
        ),
        ({"impl": "cuda"}, ValueError, "impl: unknown implementation 'cuda'"),
        ({"activation": "tanh"}, ValueError, "activation: unknown"),
    ]:
        with pytest.raises(error, match=match):
            call(**changes)
    x = p["x"].clone().requires_grad_()
    (first,) = torch.autograd.grad(call(x=x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="experts_lora has no second derivative"):
        first.sum().backward()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled():
    p = problem(IDS, 4)
    p["x"].requires_grad_()
    compiled = torch.compile(lambda x: moesaic.ops.experts_lora(**(p | {"x": x})), fullgraph=True)
    for x in (p["x"], p["x"].detach()[:11].requires_grad_()):
        p["topk_ids"], p["topk_weights"] = p["topk_ids"][: len(x)], p["topk_weights"][: len(x)]
        z, expected = compiled(x), moesaic.ops.experts_lora(**(p | {"x": x}))
        torch.testing.assert_close(z, expected)
        grads = [torch.autograd.grad(t.sum(), x)[0] for t in (z, expected)]
        torch.testing.assert_close(*grads)
