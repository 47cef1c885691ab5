"""Our Muon beside torchtitan's DistMuon, expert by expert.

DistMuon itself runs on CUDA alone. Its arithmetic is functions on plain tensors, which run here as its step calls them.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from moesaic.optim import Muon
from tests.distributed.parity import assert_close

FOLDER = Path(sys.prefix) / "torchtitan"
if not FOLDER.exists() and importlib.util.find_spec("torchtitan") is None:
    pytest.skip("torchtitan is not installed; `make setup` does", allow_module_level=True)

OPTIONS = {"ns_coefficients": (3.4445, -4.7750, 2.0315), "ns_steps": 5, "eps": 1e-7}


def check(shape: tuple[int, int, int], adjust_lr_fn: str, nesterov: bool) -> None:
    if FOLDER.exists():
        sys.path.append(str(FOLDER))
    from torchtitan.distributed.flex_shard import dist_muon as theirs

    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    # Theirs are [E, out, in].
    weight = ours.detach().mT.contiguous()
    momentum = torch.zeros_like(weight)
    optimizer = Muon([ours], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust_lr_fn, nesterov=nesterov)
    for _ in range(3):
        ours.grad = torch.randn(shape)
        optimizer.step()
        gradient = ours.grad.mT.contiguous()
        update = torch.empty_like(gradient)
        theirs._prepare_muon_input(gradient, momentum, momentum=0.95, nesterov=nesterov, out=update)
        direction = torch.empty_like(update)
        theirs._compute_muon_direction(update, **OPTIONS, out=direction)
        theirs._apply_muon_update(
            weight,
            direction,
            lr=0.02,
            weight_decay=0.1,
            adjust_lr_fn=adjust_lr_fn,
            compute_matrix_shape=weight.shape[-2:],
        )
    for expert, (mine, other) in enumerate(zip(ours.detach(), weight.mT, strict=True)):
        assert_close(f"expert {expert}", mine, other)


@pytest.mark.slow
def test_experts_have_the_numbers_of_dist_muon(same_ranks):
    for shape in ((5, 24, 40), (3, 40, 24)):
        for nesterov in (True, False):
            for adjust_lr_fn in ("original", "match_rms_adamw"):
                same_ranks(check, 1, shape, adjust_lr_fn, nesterov)
