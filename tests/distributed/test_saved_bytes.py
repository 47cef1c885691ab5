"""What a layer keeps for its backward pass follows the copies that a rank computes, on however many ranks they are."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moesaic
from moesaic.layers.router import Routing
from tests.distributed.parity import meshes_of

T, D, F, E, K = 64, 16, 32, 32, 8


def saved(way: str, ep: int) -> tuple[int, int, int]:
    """Bytes of floats that are kept between dispatch and combine, and how many rows and copies this rank has."""
    meshes = meshes_of({"tp": 4, "ep": ep})
    moe = moesaic.parallelize(
        moesaic.MoE(moesaic.MoEConfig(dim=D, hidden_dim=F, num_experts=E, top_k=K)), meshes, compute=way
    )
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.rand(T, E, generator=generator).topk(K).indices
    x, weights = torch.randn(T, D, requires_grad=True), torch.rand(T, K, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        local = t.to_local() if hasattr(t, "to_local") else t
        if local.is_floating_point() and local.shape[-1:] in ((D,), (F,)) and local.shape[0] != E // ep:
            kept[local.data_ptr()] = local.numel() * local.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        sent = moe.dispatcher.dispatch(x, Routing(ids, weights), E)
        z = moe.dispatcher.combine(moe.experts(sent.x, sent.topk_ids, sent.topk_weights, copies=sent.copies), sent)
    z.sum().backward()
    local_ids = sent.topk_ids.to_local() if hasattr(sent.topk_ids, "to_local") else sent.topk_ids
    is_here = local_ids[0] >= 0
    return sum(kept.values()), int(is_here.any(1).sum()), int(is_here.sum())


@pytest.mark.parametrize("way", ["dtensor", "local"])
def test_saved_bytes_follow_the_copies(same_ranks, way):
    for ep in (2, 4):
        found = same_ranks(saved, 4, way, ep)
        # As DTensors all blocks are as long as the longest. Sizes are rounded up, by a sixteenth at most.
        most_rows, most_copies = (max(column) for column in list(zip(*found, strict=True))[1:])
        for size, rows, copies in found:
            if way == "dtensor":
                rows, copies = most_rows, most_copies
            # A row once, however many of its copies are here, and two pre-activations for each copy.
            least = (rows * D + copies * 2 * F) * 4
            assert least <= size <= 1.07 * least
