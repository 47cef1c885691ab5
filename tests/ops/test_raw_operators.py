"""Operators called without their public function: what does not fit raises, where a kernel would read past the end."""

import pytest
import torch
from torch import Tensor

from moesaic.ops import sort_by_expert
from moesaic.ops.native import kernels

ops = torch.ops.moesaic
T, K, D, F, E, R = 4, 2, 5, 6, 3, 8
IMPLEMENTATIONS = ["reference", "torch", "cpu"]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def permuted() -> tuple:
    slots, positions, _ = sort_by_expert(torch.tensor([[0, 1], [2, 0], [1, 2], [0, 0]]), E)
    return slots, positions


SIZES = torch.tensor([3, 0, 4])
BLOCKS = torch.tensor([[2, 1, 0], [1, 2, 1]])
EXPERTS = (
    random(1, T, D),
    torch.tensor([[[0, 1], [2, 0], [1, 2], [0, -1]]]),
    random(1, T, K),
    torch.empty(1, E),
    *(random(E, D, F), random(E, D, F) + 1, random(E, F, D)),
    *(random(E, F), random(E, F) + 1, random(E, D)),
)
KEPT = random(1, T, D) + 1, *EXPERTS, random(1, T, K, F), random(1, T, K, F) + 1
NEEDS = [True] * 8

ADAPTED = (
    *EXPERTS,
    *(random(E, D, 2), random(E, 2, F), random(E, D, 3), random(E, 3, F), random(E, F, 4), random(E, 4, D)),
    *(torch.arange(T * K).view(1, T, K), torch.arange(F)),
)
LORA = random(1, T, D) + 1, *ADAPTED, random(1, T, K, F), random(1, T, K, F) + 1

# Operator, tensors, other arguments, and the dims that nothing else tells: by argument.
CALLS = {
    "grouped_mm": (ops.grouped_mm, (random(R, D), random(E, D, F), SIZES), ["impl"], {(0, 0), (1, 0), (1, 2), (2, 0)}),
    "grouped_mm, blocks": (
        ops.grouped_mm,
        (random(R, D), random(2 * E, D, F), BLOCKS),
        ["impl"],
        {(1, 0), (1, 2), (2, 0), (2, 1)},
    ),
    "input_grad": (
        ops.grouped_mm_input_grad,
        (random(R, F), random(E, D, F), SIZES),
        ["impl"],
        {(0, 0), (1, 0), (1, 1), (2, 0)},
    ),
    "weight_grad": (
        ops.grouped_mm_weight_grad,
        (random(R, D), random(R, F), SIZES, random(E, D, F)),
        ["impl"],
        {(2, 0), (3, 0)},
    ),
    "accumulate": (
        ops.grouped_mm_accumulate_weight_grad,
        (torch.zeros(E, D, F), random(R, D), random(R, F), SIZES),
        ["impl"],
        {(0, 0), (3, 0)},
    ),
    "experts_mlp": (ops.experts_mlp, EXPERTS, ["silu", "impl"], {(3, 1)}),
    "inference": (ops.experts_mlp_inference, EXPERTS, ["silu", "impl"], {(3, 1)}),
    "backward": (ops.experts_mlp_backward, KEPT, ["silu", "impl", NEEDS], {(4, 1)}),
    "backward_into": (
        ops.experts_mlp_backward_into,
        (*KEPT, torch.zeros(E, D, F), torch.zeros(E, D, F), torch.zeros(E, F, D)),
        ["silu", "impl", NEEDS],
        {(4, 1)},
    ),
    "lora": (ops.experts_lora, ADAPTED, ["silu", "impl", 0.2], {(3, 1)}),
    "lora, inference": (ops.experts_lora_inference, ADAPTED, ["silu", "impl", 0.2], {(3, 1)}),
    "lora, backward": (ops.experts_lora_backward, LORA, ["silu", "impl", 0.2, NEEDS], {(4, 1)}),
    "permute": (ops.permute, (random(T, D), *permuted(), random(T, K)), [], {(0, 1), (1, 0)}),
    "combine": (ops.combine, (random(R, D), *permuted(), random(T, K)), [], {(0, 1)}),
    "combine_weight_grad": (ops.combine_weight_grad, (random(R, D), random(T, D), *permuted()), [], {(3, 1)}),
}


def smaller(t: Tensor, dim: int) -> Tensor:
    return t.narrow(dim, 0, t.shape[dim] - 1).contiguous()


@pytest.mark.parametrize("name", CALLS)
def test_an_operand_of_another_size_raises(name):
    op, tensors, flags, alone = CALLS[name]
    for impl in IMPLEMENTATIONS if "impl" in flags else [None]:
        if impl == "cpu" and isinstance(kernels(), str):
            continue
        rest = [impl if flag == "impl" else flag for flag in flags]
        op(*tensors, *rest)
        for i, t in enumerate(tensors):
            for dim in range(t.ndim):
                if (i, dim) not in alone:
                    with pytest.raises(ValueError, match=r"to match the arguments before it|not 2 equal blocks"):
                        op(*tensors[:i], smaller(t, dim), *tensors[i + 1 :], *rest)
            with pytest.raises(ValueError, match=r"expected \["):
                op(*tensors[:i], t[None, None], *tensors[i + 1 :], *rest)


@pytest.mark.parametrize("name", [name for name, (_, _, flags, _) in CALLS.items() if flags])
def test_an_operand_of_another_dtype_raises(name):
    op, tensors, flags, _ = CALLS[name]
    rest = ["torch" if flag == "impl" else flag for flag in flags]
    i = next(i for i in reversed(range(len(tensors))) if tensors[i].is_floating_point())
    with pytest.raises((TypeError, ValueError), match=r"expected torch.float32, got torch.float16|dtype of x"):
        op(*tensors[:i], tensors[i].half(), *tensors[i + 1 :], *rest)


@pytest.mark.parametrize("impl", [None, *IMPLEMENTATIONS])
def test_an_activation_that_needs_a_gate(impl):
    ungated = (*EXPERTS[:5], None, EXPERTS[6], EXPERTS[7], None, None)
    for op in (ops.experts_mlp, ops.experts_mlp_inference):
        with pytest.raises(ValueError, match="'clamped_swiglu' needs a gate"):
            op(*ungated, "clamped_swiglu", impl)
        with pytest.raises(ValueError, match="unknown activation 'swish'"):
            op(*EXPERTS, "swish", impl)
    with pytest.raises(ValueError, match="b3: given without w3"):
        ops.experts_mlp(*EXPERTS[:5], None, *EXPERTS[6:], "silu", impl)


def test_a_buffer_that_is_no_matrix_in_memory():
    *_, into = CALLS["backward_into"][1]
    apart = torch.zeros(*into.shape, 2)[..., 0]
    with pytest.raises(ValueError, match=r"the buffer for w2: has strides .*give a contiguous tensor"):
        ops.experts_mlp_backward_into(*CALLS["backward_into"][1][:-1], apart, "silu", None, NEEDS)
