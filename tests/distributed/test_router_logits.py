"""Router logits of a parallelized model, and transformers' balance loss over all layers, as on one process."""

import copy

import pytest
import torch
import torch.distributed as dist

import moesaic
from moesaic.integrations.transformers import swap_moe
from tests.distributed.parity import assert_close, assert_gradients_close, meshes_of
from tests.distributed.test_families import BATCH, LENGTH, PLANNED, labels_of, padding_of
from tests.integrations.families import VOCAB, make_model


def check_balance_loss() -> None:
    """transformers' balance loss over all layers: in the loss of labels, and as one of balance_losses()."""
    sizes = {**PLANNED["Mixtral"], "use_cache": False, "router_aux_loss_coef": 0.7}
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = padding_of(ids)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels_of(ids).masked_fill(mask == 0, -100)}
    asked = swap_moe(make_model("Mixtral", **sizes, output_router_logits=True)).train()
    collected = swap_moe(make_model("Mixtral", **sizes), aux_loss_coef=0.7, aux_loss="pooled").train()
    reference = copy.deepcopy(asked)
    expected = reference(**batch)
    expected.loss.backward()
    for layout in [{"tp": 4, "ep": 2}, {"tp": 2, "ep": 2, "etp": 2}, {"dp_replicate": 2, "ep": 4}]:
        meshes = meshes_of(layout)
        size = BATCH // meshes.dp_size
        rows = slice(meshes.dp_rank * size, (meshes.dp_rank + 1) * size)
        for plain in (asked, collected):
            model = moesaic.parallelize(copy.deepcopy(plain), meshes)
            with moesaic.balance_losses() as losses:
                out = model(**{name: t[rows] for name, t in batch.items()})
            assert len(losses) == (plain is collected)
            loss = out.loss + sum(losses)
            loss.backward()
            dist.all_reduce(loss := loss.detach())
            assert_close(f"loss, {layout}", loss, expected.loss.detach())
            assert_gradients_close(model, {n: p.grad for n, p in reference.named_parameters()}, f", {layout}")
            if plain is asked:
                dist.all_reduce(aux_loss := out.aux_loss.detach())
                assert_close(f"aux_loss, {layout}", aux_loss, expected.aux_loss.detach())
                here = (rows, meshes.sequence_slice(LENGTH))
                for mine, theirs in zip(out.router_logits, expected.router_logits, strict=True):
                    theirs = theirs.detach().view(BATCH, LENGTH, -1)[here]
                    assert_close(f"router_logits, {layout}", mine.detach().view(theirs.shape), theirs)


@pytest.mark.slow
def test_the_balance_loss_of_transformers(same_ranks):
    same_ranks(check_balance_loss, 4)


def check_the_decoder_alone() -> None:
    plain = swap_moe(make_model("Mixtral", **PLANNED["Mixtral"])).model
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = plain(input_ids=ids, output_router_logits=True).router_logits
    meshes = moesaic.build_meshes(ep=2, device_type="cpu")
    model = moesaic.parallelize(plain, meshes)
    rows = slice(meshes.dp_rank * BATCH // 2, (meshes.dp_rank + 1) * BATCH // 2)
    actual = model(input_ids=ids[rows], output_router_logits=True).router_logits
    for mine, theirs in zip(actual, expected, strict=True):
        assert_close("router_logits", mine.detach(), theirs.detach().view(BATCH, LENGTH, -1)[rows].flatten(0, 1))


def test_router_logits_of_the_decoder_alone(same_ranks):
    same_ranks(check_the_decoder_alone, 2)
