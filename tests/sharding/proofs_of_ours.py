"""Proofs of moesaic's own operators, as a program: without run-time type checks they take a fraction of the time.

Takes a name of CALLS. Prints JSON: records by kind, each the placements of inputs and results as text; and notes.
"""

import json
import sys

import torch
from torch import Tensor

import moesaic
from moesaic.ops import sort_by_expert
from moesaic.sharding.rule import short

ops = torch.ops.moesaic
SIZES = torch.tensor([[2, 0, 3], [0, 0, 0], [1, 1, 1], [0, 6, 0]])
FEWER = torch.tensor([[2, 0, 3], [0, 6, 0], [1, 1, 1], [4, 0, 0]])
FLAT = torch.tensor([3, 0, 4, 2])
IDS = torch.tensor([[0, 2], [2, 1], [1, -1], [2, 0], [0, -1]])
K, N = 13, 14
SILU = "silu"
MESHES: dict = {"axes": (2, 3, 4), "meshes": [(2, 2)]}
ALONE: dict = {"backward": False}
# Of forms with lines that other forms prove on 4 ranks too. The long tests have all of them on all meshes.
FEWER_MESHES: dict = {"axes": (2, 3), "meshes": [(2, 2)]}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def grouped() -> dict:
    """The three grouped operators, each in its forms: group sizes, rows, weights."""
    forms = {"flat": (FLAT, 11, 4), "own": (SIZES, 24, 12), "fewer": (FEWER, 24, 10), "shared": (SIZES, 24, 3)}
    calls = {}
    for form, (sizes, rows, num_weights) in forms.items():
        x, w, grad = random(rows, K), random(num_weights, K, N), random(rows, N)
        calls[f"grouped_mm, {form}"] = ops.grouped_mm, (x, w, sizes, None), MESHES
        if form == "fewer":
            continue  # its gradients have the rules of "own"
        # The gradients of gradients are tested with those of the operators they are made of.
        calls[f"input_grad, {form}"] = ops.grouped_mm_input_grad, (grad, w, sizes, None), MESHES | ALONE
        calls[f"weight_grad, {form}"] = ops.grouped_mm_weight_grad, (x, grad, sizes, w, None), MESHES | ALONE
    return calls


def permuting() -> dict:
    """5 tokens, two copies each but for one that has one, as rows of 3 experts."""
    slots, positions, _ = sort_by_expert(IDS, 3, num_rows=11)
    tokens, rows, weights = random(5, K), random(11, K), random(5, 2)
    return {
        "permute": (ops.permute, (tokens, slots, positions), MESHES),
        "permute, weighted": (ops.permute, (tokens, slots, positions, weights), MESHES),
        "combine": (ops.combine, (rows, slots, positions), MESHES),
        "combine, weighted": (ops.combine, (rows, slots, positions, weights), MESHES),
        "combine_weight_grad": (ops.combine_weight_grad, (rows, tokens, slots, positions), MESHES),
        "sort_by_expert": (ops.sort_by_expert, (IDS, 3, 11), MESHES),
    }


def fused() -> dict:
    """experts_mlp and its backward: 2 or 4 blocks of 5 tokens, 3 copies each, of 3 experts a block or fewer.

    Of 4 blocks, each axis of a mesh of 2 x 2 can cut some.
    """
    calls = {}
    forms = {"biased": (2, 6), "plain": (2, 6), "fewer": (4, 11)}
    for form, (B, W) in forms.items():
        args = operands(B, W, gated=form != "plain", biased=form == "biased")
        meshes = MESHES if form == "fewer" else FEWER_MESHES
        calls[f"experts_mlp, {form}"] = ops.experts_mlp, (*args, SILU, None), meshes
        calls[f"inference, {form}"] = ops.experts_mlp_inference, (*args, SILU, None), meshes | ALONE
        if form == "biased":
            _, h1, h3 = ops.experts_mlp(*args, SILU, None)
            # It has no gradient.
            everything = (random(*args[0].shape).flip(0), *args, h1, h3, SILU, None, [True] * 8)
            calls["experts_backward, biased"] = ops.experts_mlp_backward, everything, MESHES | ALONE
    args = operands(2, 6)
    calls["inference, listed"] = (
        ops.experts_mlp_inference,
        (*args, SILU, None, listed(args[1])),
        {"axes": (2,), "meshes": [], "backward": False},
    )
    return calls


def with_lists() -> dict:
    """The same of listed copies, in a forward pass that keeps what the backward pass needs, and in that one."""
    args, grad = operands(2, 6, biased=True), random(2, 5, 6).flip(0)
    copies = listed(args[1])
    _, h1, h3 = ops.experts_mlp(*args, SILU, None, copies)
    return {
        "experts_mlp, listed": (ops.experts_mlp, (*args, SILU, None, copies), MESHES),
        "experts_backward, listed": (
            ops.experts_mlp_backward,
            (grad, *args, h1, h3, SILU, None, [True] * 8, copies),
            MESHES | ALONE,
        ),
    }


def operands(B: int, W: int, *, gated: bool = True, biased: bool = False) -> tuple:
    """What experts_mlp takes, for ``W`` experts in ``B`` blocks."""
    N, C, G, D, F = 5, 3, 3, 6, 7
    ids = torch.randint(-1, G, (B, N, C), generator=torch.Generator().manual_seed(1))
    if W < B * G:  # the expert that is missing is the last block's last
        ids = torch.cat([ids[:-1], torch.where(ids[-1:] == G - 1, -1, ids[-1:])])
    w3, b1 = random(W, D, F) + 1 if gated else None, random(W, F) if biased else None
    b3 = random(W, F) + 1 if gated and biased else None
    b2 = random(W, D) if biased else None
    weights, experts = random(B, N, C), random(B, G)
    return (random(B, N, D), ids, weights, experts, random(W, D, F), w3, random(W, F, D), b1, b3, b2)


def listed(ids: Tensor) -> Tensor:
    """The copies that are here, in as many lines a block as the fullest has, and one more."""
    slots = [(block.flatten() >= 0).nonzero().squeeze(1) for block in ids]
    longest = max(map(len, slots)) + 1
    return torch.stack([torch.nn.functional.pad(s, (0, longest - len(s)), value=-1) for s in slots])


def as_text(records) -> list:
    return [
        [[" ".join(map(short, p)) for p in r.inputs], [" ".join(map(short, p)) for p in r.outputs], r.error]
        for r in records
    ]


CALLS = grouped() | permuting() | fused()

if __name__ == "__main__":
    op, args, options = CALLS[sys.argv[1]]
    report = moesaic.prove(op, *args, make_up=False, **options)
    kinds = ("admitted", "wrong", "missing", "hidden")
    print(json.dumps({k: as_text(getattr(report, k)) for k in kinds} | {"notes": report.notes + report.untried}))
