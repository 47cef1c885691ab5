"""The public weight gradient: what autograd gives for the weight of grouped_mm, differentiable itself."""

import pytest
import torch

from moesaic.ops import grouped_mm, grouped_mm_weight_grad


def gradient_of(w: torch.Tensor, x: torch.Tensor, grad: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    w = w.detach().requires_grad_()
    return torch.autograd.grad(grouped_mm(x, w, sizes), w, grad)[0]


@pytest.mark.parametrize(
    ("sizes", "experts"),
    [([2, 0, 3], 3), ([[1, 2], [0, 3]], 4), ([[1, 2], [0, 3]], 2), ([[1, 2], [3, 0]], 3)],
    ids=["flat", "own experts", "shared experts", "a block with fewer experts"],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_it_is_the_gradient_of_the_weight(sizes, experts, transposed):
    torch.manual_seed(0)
    x, grad, sizes = torch.randn(6, 4), torch.randn(6, 5), torch.tensor(sizes)
    w = torch.randn(experts, 5, 4).mT if transposed else torch.randn(experts, 4, 5)
    gw = grouped_mm_weight_grad(x, grad, sizes, like=w)
    assert gw.equal(gradient_of(w, x, grad, sizes))
    assert gw.stride() == w.stride()
    if sizes.numel() == experts:
        assert grouped_mm_weight_grad(x, grad, sizes).equal(gw)


def test_gradients_of_any_order():
    torch.manual_seed(0)
    x, grad = (torch.randn(5, n, dtype=torch.float64, requires_grad=True) for n in (3, 2))
    sizes = torch.tensor([2, 0, 2])
    torch.autograd.gradcheck(lambda x, grad: grouped_mm_weight_grad(x, grad, sizes), (x, grad))
    torch.autograd.gradgradcheck(lambda x, grad: grouped_mm_weight_grad(x, grad, sizes), (x, grad))


def test_under_autocast():
    x, grad = torch.randn(5, 3), torch.randn(5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_mm_weight_grad(x, grad, torch.tensor([5])).dtype == torch.bfloat16


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(6)}, ValueError, r"x: expected \[R, K\], got \[6\]"),
        ({"grad": torch.ones(5, 5)}, ValueError, r"grad: expected \[6, N\] to match x, got \[5, 5\]"),
        ({"grad": torch.ones(6, 5).half()}, TypeError, "grad: dtype torch.float16 differs from x's torch.float32"),
        ({"like": torch.ones(3, 5, 4)}, ValueError, "like: .* looks transposed, pass like.mT"),
        ({"like": torch.ones(3, 4, 6)}, ValueError, r"like: expected \[E, 4, 5\] to match grad, got \[3, 4, 6\]"),
        (
            {"like": torch.ones(2, 4, 5)},
            ValueError,
            "expected one size for each of the 2 matrices of like",
        ),
        ({"group_sizes": torch.ones(3)}, TypeError, "group_sizes: dtype torch.float32 is not supported"),
        ({"impl": "fast"}, ValueError, "impl: unknown implementation 'fast'"),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    operands = {"x": torch.ones(6, 4), "grad": torch.ones(6, 5), "group_sizes": torch.tensor([2, 0, 3])}
    with pytest.raises(error, match=message):
        grouped_mm_weight_grad(**{**operands, **changes})
