"""Dropout of what adapters are applied to: peft's linear layers with the same masks, and the masks themselves."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.layers.dropout import Holders, copy_keys
from moesaic.ops import experts_lora
from moesaic.ops.experts_lora.dropout import HIDDEN, TOKENS, dropped, kept
from moesaic.ops.quantized import quantize
from moesaic.parallel.sequence import positions_of_parts
from tests.ops.test_experts_lora import FACTORS, computed, problem

T, K, E, P = 12, 2, 4, 0.4
IDS = torch.randint(-1, E, (T, K), generator=torch.Generator().manual_seed(2))
KEYS = torch.randint(2**62, (T, K), generator=torch.Generator().manual_seed(3))
COLUMNS = torch.arange(1000)


class Given(nn.Module):
    """A dropout whose mask is given, in the place of that of peft."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self.which, self.key = which, None

    def forward(self, x: Tensor) -> Tensor:
        return dropped(x, kept(self.key.view(1), COLUMNS[: x.shape[-1]], self.which, P)[0], P)


def by_peft(p: dict[str, Any]) -> Tensor:
    """The experts as linear layers of peft, copy by copy, with the weights, factors and masks of ``p``."""
    lora = pytest.importorskip("peft").tuners.lora
    layers: dict[tuple[int, str], Any] = {}
    for e in range(E):
        for name, which in {"w1": TOKENS, "w3": TOKENS, "w2": HIDDEN}.items():
            a, b = (t[e] for t in p[f"lora{name[1]}"])
            base = nn.Linear(*p[name][e].shape, dtype=torch.float64)
            config = lora.LoraConfig(r=a.shape[1], lora_alpha=a.shape[1], lora_dropout=P)
            layer = layers[e, name] = lora.Linear(base, "x", config, r=a.shape[1], lora_alpha=a.shape[1])
            assert isinstance(layer.lora_dropout["x"], nn.Dropout)
            layer.lora_dropout["x"] = Given(which)
            # Not parameters, so that gradients reach those of the experts.
            for linear, weight in ((base, p[name][e]), (layer.lora_A["x"], a), (layer.lora_B["x"], b)):
                del linear.weight
                linear.weight = weight.mT
            del base.bias
            base.bias = p[f"b{name[1]}"][e]
    rows = []
    for t in range(T):
        z = torch.zeros_like(p["x"][t])
        for k, e in enumerate(p["topk_ids"][t].tolist()):
            if e < 0:
                continue
            for name in ("w1", "w3", "w2"):
                layers[e, name].lora_dropout["x"].key = KEYS[t, k]
            h = nn.functional.silu(layers[e, "w1"](p["x"][t])) * layers[e, "w3"](p["x"][t])
            z = z + p["topk_weights"][t, k] * layers[e, "w2"](h)
        rows.append(z)
    return torch.stack(rows)


def test_it_is_what_layers_of_peft_compute_with_these_masks():
    p = problem(IDS, E, (17, 9, 3))
    wanted = [p["x"], p["topk_weights"], *(t for name in FACTORS for t in p[name])]
    for t in wanted:
        t.requires_grad_()
    z = by_peft(p)
    grad = torch.linspace(-1, 2, z.numel(), dtype=torch.float64).view(z.shape)
    expected = [z.detach(), *torch.autograd.grad(z, wanted, grad)]
    options = {"dropout": P, "keys": KEYS}
    without = computed(p)
    for impl in (None, "reference", "torch"):
        for found, true, plain in zip(computed(p, impl=impl, **options), expected, without, strict=True):
            torch.testing.assert_close(found, true, rtol=1e-11, atol=1e-11)
            assert (found - plain).norm() > 0.1 * plain.norm()


def test_one_copy_of_a_token_in_each_of_two_blocks_has_the_same_mask():
    """As ranks have it: a row for each copy, and a part of the hidden columns."""
    p = problem(IDS, E, (17, 9, 3))
    expected = experts_lora(**p, dropout=P, keys=KEYS)
    here = (IDS >= 0).nonzero()
    rows = {"x": p["x"][here[:, 0]], "topk_ids": IDS[IDS >= 0].view(-1, 1)}
    rows["topk_weights"], keys = p["topk_weights"][IDS >= 0].view(-1, 1), KEYS[IDS >= 0].view(-1, 1)
    total = torch.zeros_like(expected)
    for part in (slice(0, 5), slice(5, 9)):
        cut = {n: p[n][..., part] for n in ("w1", "w3", "b1", "b3")} | {"w2": p["w2"][:, part]}
        cut |= {n: (p[n][0], p[n][1][..., part]) for n in ("lora1", "lora3")}
        cut |= {"lora2": (p["lora2"][0][:, part], p["lora2"][1]), "b2": p["b2"] * (part.start == 0)}
        z = experts_lora(**(p | cut | rows), dropout=P, keys=keys, columns=torch.arange(9)[part])
        total.index_add_(0, here[:, 0], z)
    torch.testing.assert_close(total, expected)


def test_quantised_experts():
    p = problem(IDS, E, (64, 64, 3), share=True)
    packed = {name: quantize(p[name].float(), "nf4") for name in ("w1", "w3", "w2")}
    decoded = {name: torch.stack([w[e] for e in range(E)]).double() for name, w in packed.items()}
    options = {"dropout": P, "keys": KEYS}
    for found, true in zip(computed(p | packed, **options), computed(p | decoded, **options), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-11, atol=1e-11)


def test_masks_look_drawn():
    keys = copy_keys(torch.Size([50, 10]), 2, torch.device("cpu")).flatten()
    assert len(keys.unique()) == len(keys)
    for p in (0.05, 0.5, 0.9):
        masks = {which: kept(keys, COLUMNS, which, p).double() for which in (TOKENS, HIDDEN)}
        for mask in masks.values():
            # In all, of each row and of each column: within five standard deviations.
            for dim, n in ((None, mask.numel()), (1, 1000), (0, 1000)):
                share = mask.mean() if dim is None else mask.mean(dim)
                assert (share - (1 - p)).abs().max() < 5 * (p * (1 - p) / n) ** 0.5
            # No two neighbours, of rows or of columns, and no two kinds go together.
            centred = mask - (1 - p)
            for one, other in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
                assert ((one * other).mean() / (p * (1 - p))).abs() < 0.01
        together = (masks[TOKENS] - (1 - p)) * (masks[HIDDEN] - (1 - p))
        assert (together.mean() / (p * (1 - p))).abs() < 0.01


def test_a_part_of_the_rows_and_columns_has_its_part_of_the_mask():
    whole = kept(KEYS.flatten(), COLUMNS, TOKENS, P)
    assert torch.equal(kept(KEYS.flatten()[3:7], COLUMNS[100:], TOKENS, P), whole[3:7, 100:])
    # What was drawn once stays what it is: a resumed run goes on with the same masks.
    assert kept(torch.tensor([1, -2]), COLUMNS[:12], HIDDEN, 0.5).int().tolist() == GOLDEN


GOLDEN = [[1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize("leading", [(6, 5), (2, 3, 5), (30,)], ids=str)
def test_ranks_with_parts_of_the_tokens_have_their_parts_of_the_keys(leading):
    """On (dp 2, tp 2), unevenly."""
    torch.manual_seed(1)
    whole = copy_keys(torch.Size(leading), K, torch.device("cpu")).view(*leading, K)
    parts = whole.tensor_split([leading[0] // 3], 0)
    parts = [q for part in parts for q in part.tensor_split([2], len(leading) - 1)]
    sizes = torch.tensor([[q[..., 0, 0].numel() if len(leading) > 1 else 1, q.shape[-2]] for q in parts])
    for rank, part in enumerate(parts):
        torch.manual_seed(1 if rank == 0 else 5)

        def gather(own: Tensor) -> Tensor:
            torch.manual_seed(1)
            drawn = torch.randint(2**62, (1,))
            return torch.stack([torch.cat([drawn, of_one]) for of_one in sizes])

        found = copy_keys(part.shape[:-1], K, torch.device("cpu"), Holders(gather, rank, 2))
        assert torch.equal(found.view(part.shape), part)


@pytest.mark.parametrize(("cp", "tp", "length"), [(2, 1, 7), (2, 2, 11), (4, 1, 3), (3, 2, 12)])
def test_ranks_of_cp_have_their_parts_of_the_keys(cp, tp, length):
    """On (dp 2, cp, tp): parts from the head and the tail of the same sequences."""
    torch.manual_seed(1)
    whole = copy_keys(torch.Size([3, length]), K, torch.device("cpu")).view(3, length, K)
    places = [(rows, at) for rows in (slice(0, 1), slice(1, 3)) for at in positions_of_parts(length, cp, tp)]
    parts = [whole[rows][:, at] for rows, at in places]

    def gather(own: Tensor) -> Tensor:
        torch.manual_seed(1)
        drawn = torch.randint(2**62, (1,))
        return torch.stack([torch.cat([drawn, torch.tensor(part.shape[:2])]) for part in parts])

    for rank, part in enumerate(parts):
        torch.manual_seed(5)
        found = copy_keys(part.shape[:-1], K, torch.device("cpu"), Holders(gather, rank, cp * tp, cp))
        assert torch.equal(found.view(part.shape), part)
