"""experts_mlp and its kin of listed copies: the numbers of the same call without absent copies, and less kept."""

import pytest
import torch
from torch import Tensor

from moesaic.ops import experts_lora, experts_mlp, quantize
from tests.ops.cpu_isa import CPU
from tests.ops.experts_oracle import Experts, cast, check, experts, loop, run

ANYWHERE = ("reference", "torch", *CPU)
T, K, E, D, F = 23, 4, 5, 17, 24
WEIGHTS = ("w1", "w3", "w2")


def listed(ids: Tensor, num_experts: int, *, room: int = 3, shuffled: bool = False) -> Tensor:
    """The slots of the copies that are here, and some lines of none."""
    slots = ((ids >= 0) & (ids < num_experts)).flatten().nonzero().squeeze(1)
    slots = torch.cat([slots, slots.new_full((room,), -1)])
    return slots[torch.randperm(len(slots), generator=torch.Generator().manual_seed(0))] if shuffled else slots


@pytest.mark.parametrize("impl", ANYWHERE)
@pytest.mark.parametrize("form", ["plain", "biased", "without gate", "bf16", "one", "none", "shuffled"])
def test_right_by_the_oracle(impl, form):
    dtype = torch.bfloat16 if form == "bf16" else torch.float32
    gated, routing = form != "without gate", form if form in ("one", "none") else "random"
    p = experts(T, K, E, D, F, dtype, gated=gated, biased=form == "biased", routing=routing)
    check(p, run(impl, p, listed(p.ids, E, shuffled=form == "shuffled")))


@pytest.mark.parametrize("impl", ANYWHERE)
def test_the_bits_of_all_copies(impl):
    p = experts(T, K, E, D, F, torch.float32, biased=True)
    of_all, of_listed = run(impl, p, None), run(impl, p, listed(p.ids, E).to(torch.int32))
    for name, t in of_all.items():
        assert torch.equal(of_listed[name], t), name
    with torch.no_grad():
        tensors = (p.x, p.ids, p.weights, p.w1, p.w3, p.w2)
        z = experts_mlp(*tensors, b1=p.b1, b3=p.b3, b2=p.b2, copies=listed(p.ids, E), impl=impl)
    assert torch.equal(z, of_listed["z"])


@pytest.mark.parametrize("impl", ANYWHERE)
def test_what_is_not_listed_is_not_here(impl):
    p = experts(T, K, E, D, F, torch.float32, biased=True)
    copies = listed(p.ids, E)[::2]
    flat = torch.full((T * K,), -1)
    flat[copies[copies >= 0]] = p.ids.flatten()[copies[copies >= 0]]
    fewer = Experts(**(vars(p) | {"ids": flat.view(T, K)}))
    found, expected = run(impl, p, copies), loop(cast(fewer, torch.float64))
    for name, t in expected.items():
        torch.testing.assert_close(found[name].double(), t, rtol=1e-4, atol=1e-4, msg=name)
    # A number that is none's is no copy.
    wild = torch.cat([copies, torch.tensor([T * K, T * K + 7, -5])])
    assert torch.equal(run(impl, p, wild)["z"], found["z"])


@pytest.mark.parametrize("impl", ANYWHERE)
@pytest.mark.parametrize(("tokens", "lines"), [(0, 0), (0, 2), (3, 0)])
def test_nothing_listed(impl, tokens, lines):
    p = experts(tokens, K, E, D, F, torch.float32, biased=True)
    for name, t in run(impl, p, torch.full((lines,), -1)).items():
        assert not t.any(), name


@pytest.mark.parametrize("impl", ANYWHERE)
def test_blocks(impl):
    p = experts(2 * T, K, 2 * E, D, F, torch.float32, biased=True)
    ids = p.ids.unflatten(0, (2, T)) % (E + 1)  # E: a copy that is not here
    lists = [listed(block, E, room=0) for block in ids]
    longest = max(map(len, lists)) + 2
    copies = torch.stack([torch.nn.functional.pad(one, (0, longest - len(one)), value=-1) for one in lists])
    blocks = {"x": p.x, "ids": ids, "weights": p.weights, "grad": p.grad}
    in_blocks = {name: t.reshape(2, T, -1) for name, t in blocks.items()}
    q = Experts(**(vars(p) | in_blocks))
    of_all, of_listed = run(impl, q, None), run(impl, q, copies)
    for name, t in of_all.items():
        assert torch.equal(of_listed[name], t), name


@pytest.mark.parametrize("impl", ANYWHERE)
def test_it_keeps_lines_of_listed_copies_alone(impl):
    p = experts(T, K, E, D, F, torch.float32)
    few = torch.where(torch.arange(K) == 0, p.ids.clamp(0, E - 1), -1)
    copies, kept = listed(few, E, room=2), []
    x = p.x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        experts_mlp(x, few, p.weights, p.w1, p.w3, p.w2, copies=copies, impl=impl).sum().backward()
    shapes = [tuple(t.shape) for t in kept if t.is_floating_point() and t.shape[-1] == F and t.shape[-2] != D]
    assert shapes == [(1, len(copies), F)] * 2


@pytest.mark.parametrize("impl", ANYWHERE)
def test_quantized(impl):
    p = experts(T, K, E, 64, 64, torch.float32)
    w = {name: quantize(getattr(p, name), "int8") for name in WEIGHTS}
    results = []
    for copies in (None, listed(p.ids, E)):
        x, weights = p.x.detach().requires_grad_(), p.weights.detach().requires_grad_()
        z = experts_mlp(x, p.ids, weights, *w.values(), copies=copies, impl=impl)
        results.append((z, *torch.autograd.grad(z, (x, weights), p.grad)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("impl", ["reference", None])
@pytest.mark.parametrize("quantized", [False, True])
def test_adapters(impl, quantized):
    p = experts(T, K, E, 64, 64, torch.float32)
    w = [quantize(getattr(p, n), "nf4") if quantized else getattr(p, n) for n in WEIGHTS]
    results = []
    for copies in (None, listed(p.ids, E)):
        leaves = [t.detach().requires_grad_() for t in (p.x, p.weights)]
        factors = [torch.randn(E, 64, 3).requires_grad_(), torch.randn(E, 3, 64).requires_grad_()]
        for i, t in enumerate(factors):
            torch.nn.init.normal_(t, generator=torch.Generator().manual_seed(i))
        z = experts_lora(leaves[0], p.ids, leaves[1], *w, lora1=factors, lora2=factors, copies=copies, impl=impl)
        results.append((z, *torch.autograd.grad(z, [*leaves, *factors], p.grad)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_main_grads():
    p = experts(T, K, E, D, F, torch.float32)
    found = []
    for copies in (None, listed(p.ids, E)):
        buffers = tuple(torch.zeros_like(getattr(p, name)) for name in WEIGHTS)
        weights = [getattr(p, name).detach().requires_grad_() for name in WEIGHTS]
        experts_mlp(p.x, p.ids, p.weights, *weights, main_grads=buffers, copies=copies).backward(p.grad)
        found.append(buffers)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("copies", "error", "said"),
    [
        (torch.zeros(3), TypeError, "copies: dtype torch.float32 is not supported"),
        (torch.zeros(1, 3, dtype=torch.int64), ValueError, r"copies: expected \[C\] for topk_ids \[23, 4\]"),
        ([1], TypeError, "copies: expected"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_lists_that_do_not_fit(copies, error, said):
    p = experts(T, K, E, D, F, torch.float32)
    with pytest.raises(error, match=said):
        experts_mlp(p.x, p.ids, p.weights, p.w1, p.w3, p.w2, copies=copies)
