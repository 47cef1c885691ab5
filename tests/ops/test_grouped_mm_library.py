"""The way through torch._grouped_mm, which only CUDA tensors take: its arithmetic on CPU, and when it is taken."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.ops.grouped_mm.groups import as_blocks
from moesaic.ops.grouped_mm.impl import torch as impl
from tests.ops.oracle import check, exact, run, run_operators
from tests.ops.strategies import Layout, layout, layouts, problem, with_strides, without_last

BF16 = torch.bfloat16
FLAT = layout("flat", [[3, 0, 6]], slack=7)
BLOCKS = layout("own", [[3, 0], [1, 4]], slack=1)


@given(
    layout=layouts(),
    K=st.sampled_from((8, 16, 40)),
    # The rows of the result have to be padded where N is odd, which is fine with w transposed.
    N_and_strides=st.sampled_from(((8, "contiguous"), (24, "contiguous"), (16, "transposed"), (5, "transposed"))),
)
def test_values(layout: Layout, K, N_and_strides):
    N, strides = N_and_strides
    p = problem(layout, K, N, BF16, strides=("contiguous", strides, "contiguous"))
    sizes = as_blocks(p.group_sizes)
    results = run("torch", p)
    if len(p.x):
        results = results._replace(y=impl._library_forward(p.x, p.w, sizes))
        # As the fake says.
        assert results.y.is_contiguous()
    if len(p.x) and len(sizes) == 1 and N % 8 == 0:
        results = results._replace(gw=impl._library_weight_grad(p.x, p.grad, sizes, len(p.w)))
        assert results.gw.is_contiguous()
    check(p, results)


@pytest.mark.parametrize("missing", range(7))
def test_groups_without_expert(missing):
    layout = replace(BLOCKS, sizes=without_last(((3, 2), (1, 4), (2, 2)), missing), missing=missing)
    p = problem(layout, 8, 16, BF16)
    check(p, run_operators("torch", p)._replace(y=impl._library_forward(p.x, p.w, p.group_sizes)))


@pytest.mark.parametrize("missing", [1, 3, 5, 6])
def test_rows_of_groups_without_expert_are_zero(missing):
    p = problem(replace(BLOCKS, sizes=((3, 2), (1, 4), (2, 2))), 8, 16, BF16)
    w = p.w[: 6 - missing]
    fewer = replace(p, w=w, experts=[e if e < len(w) else -1 for e in p.experts])
    check(fewer, run("tiled", fewer)._replace(y=impl._library_forward(p.x, w, p.group_sizes)))


@pytest.mark.parametrize("num_matrices", [1, 2])
def test_weight_gradient_of_fewer_matrices_than_groups(num_matrices):
    p = problem(FLAT, 8, 16, BF16)
    gw = impl._library_weight_grad(p.x, p.grad, as_blocks(p.group_sizes), num_matrices)
    assert torch.equal(gw, exact(p).gw[:num_matrices].to(BF16))


@pytest.mark.parametrize("layout", [FLAT, BLOCKS], ids=["flat", "blocks"])
def test_group_sizes_are_never_read_to_the_host(layout):
    # A fake tensor has no values: reading one raises.
    p = problem(layout, 8, 16, BF16)
    with FakeTensorMode() as mode:
        x, w, sizes, grad = map(mode.from_tensor, (p.x, p.w, p.group_sizes, p.grad))
        sizes = as_blocks(sizes)
        impl._library_forward(x, w, sizes)
        if layout is FLAT:
            impl._library_weight_grad(x, grad, sizes, len(w))


def operands(layout=FLAT, K=16, N=8, dtype=BF16, x="contiguous", w="contiguous"):
    p = problem(layout, K, N, dtype)
    return with_strides(p.x, x), with_strides(p.w, w), as_blocks(p.group_sizes)


def gaps_between_matrices():
    x, w, sizes = operands()
    gaps = torch.empty(len(w), w[0].numel() + 1, dtype=BF16)[:, :-1]
    return x, gaps.unflatten(1, w.shape[1:]), sizes


def offset_by_one_element():
    x, w, sizes = operands()
    return torch.empty(x.numel() + 1, dtype=BF16)[1:].view(x.shape), w, sizes


TAKEN = {
    "aligned": operands,
    "w transposed": lambda: operands(w="transposed"),
    "w transposed, N odd": lambda: operands(w="transposed", N=5),
    "blocks": lambda: operands(BLOCKS),
    "1,023 groups": lambda: operands(layout("flat", [[1] * 1023])),
}
NOT_TAKEN = {
    "fp32": lambda: operands(dtype=torch.float32),
    "fp16": lambda: operands(dtype=torch.float16),
    "fp64": lambda: operands(dtype=torch.float64),
    "1,024 groups": lambda: operands(layout("flat", [[1] * 1024])),
    "no groups": lambda: operands(layout("own", [[], []], slack=2)),
    "no rows": lambda: operands(layout("flat", [[0, 0]])),
    "K is 0": lambda: operands(K=0),
    "N is 0": lambda: operands(N=0),
    "K odd": lambda: operands(K=7),
    "N odd": lambda: operands(N=7),
    # Aligned as a whole, but its groups start anywhere.
    "x by columns": lambda: operands(x="transposed"),
    "x sliced": lambda: operands(x="sliced"),
    "x stepped": lambda: operands(x="stepped"),
    "x of stride 0": lambda: operands(x="expanded"),
    "x offset by one element": offset_by_one_element,
    "w stepped": lambda: operands(w="stepped"),
    "w with gaps between matrices": gaps_between_matrices,
}


@pytest.mark.parametrize("case", TAKEN | NOT_TAKEN)
def test_which_operands_it_takes(case, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    x, w, sizes = (TAKEN | NOT_TAKEN)[case]()
    assert impl._library_takes(x, w, sizes) == (case in TAKEN)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert not impl._library_takes(x, w, sizes)


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("layout", [FLAT, BLOCKS], ids=["flat", "blocks"])
def test_what_runs_where_the_sizes_must_not_be_read(layout, taken, monkeypatch):
    called = []

    def recorder(name):
        return lambda first, *others: called.append(name) or first

    monkeypatch.setattr(impl, "_library_takes", lambda *operands: taken and all(t.is_contiguous() for t in operands))
    for module, name in (
        (impl, "_library_forward"),
        (impl, "_library_weight_grad"),
        (impl.tiled, "forward"),
        (impl.tiled, "weight_grad"),
    ):
        monkeypatch.setattr(module, name, recorder(name))
    p = problem(layout, 8, 16, BF16)
    x, w, sizes, grad = (t.to("meta") for t in (p.x, p.w, as_blocks(p.group_sizes), p.grad))
    grad = with_strides(grad, "expanded")
    impl.forward(x, w, sizes, BF16)
    impl.forward(x, w, sizes, torch.float32)
    # torch._grouped_mm sums over one ragged dim: blocks have as many as there are blocks.
    impl.weight_grad(x, grad, sizes, len(w))
    assert called == [
        "_library_forward" if taken else "forward",
        "forward",
        "_library_weight_grad" if taken and layout is FLAT else "weight_grad",
    ]
