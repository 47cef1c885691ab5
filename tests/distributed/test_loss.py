"""The loss of a parallelized language model from ``labels=``: in every layout a part of the mean over all ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig, Qwen3MoeForSequenceClassification

import moesaic
from moesaic.integrations.transformers import swap_moe
from tests.distributed.parity import assert_close, assert_gradients_close
from tests.distributed.test_families import labels_of
from tests.distributed.test_qwen3_parity import BATCH, LENGTH, VOCAB, make_model

LAYOUTS = [{}, {"tp": 2}, {"tp": 4, "ep": 2}, {"dp_replicate": 2, "ep": 4}]


def check_loss() -> None:
    plain = make_model(tied=False)
    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = labels_of(ids)
    # Two halves of a batch, a step after both: the mean of all is not the mean of their means.
    halves, num_items = [slice(0, BATCH // 2), slice(BATCH // 2, BATCH)], (labels[:, 1:] != -100).sum()
    mean, summed = copy.deepcopy(plain), copy.deepcopy(plain)
    expected = mean(input_ids=ids, labels=labels).loss
    expected.backward()
    for half in halves:
        summed(input_ids=ids[half], labels=labels[half], num_items_in_batch=num_items).loss.backward()
    for layout in LAYOUTS:
        meshes = moesaic.build_meshes(**layout, device_type="cpu")
        size = BATCH // meshes.dp_size
        rows = slice(meshes.dp_rank * size, (meshes.dp_rank + 1) * size)
        model = moesaic.parallelize(copy.deepcopy(plain), meshes)
        part = model(input_ids=ids[rows], labels=labels[rows]).loss
        part.backward()
        dist.all_reduce(loss := part.detach())
        assert_close(f"loss, {layout}", loss, expected.detach())
        assert_gradients_close(model, {n: p.grad for n, p in mean.named_parameters()}, f", {layout}")

        model.zero_grad()
        for items in (num_items, int(num_items)):
            rows = slice(meshes.dp_rank * size // 2, (meshes.dp_rank + 1) * size // 2)
            half = halves[0] if items is num_items else halves[1]
            # The labels of an input may have been shifted by whoever made the batch.
            given = {"labels": labels} if items is num_items else {"shift_labels": shifted(labels), "labels": labels}
            given = {name: t[half][rows] for name, t in given.items()}
            model(input_ids=ids[half][rows], **given, num_items_in_batch=items).loss.backward()
        assert_gradients_close(model, {n: p.grad for n, p in summed.named_parameters()}, f", {layout}, accumulated")


def shifted(labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]


@pytest.mark.slow
def test_every_layout_gives_the_global_mean(same_ranks):
    same_ranks(check_loss, 4)


def check_refusals() -> None:
    meshes = moesaic.build_meshes(tp=2, device_type="cpu")
    model = moesaic.parallelize(make_model(tied=False), meshes)
    ids = torch.randint(VOCAB, (2, 6))
    with pytest.raises(
        ValueError, match=r"labels: expected \[2, 6\], the whole sequences like input_ids, got \[2, 3\]"
    ):
        model(input_ids=ids, labels=ids[:, meshes.sequence_slice(6)])
    # A part of a sequence, cut over ranks by hand. Padding on the left is none, and packed rows begin at 0.
    for positions in ([1, 1, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2]):
        model(input_ids=ids, labels=ids, position_ids=torch.tensor([positions]))
    part = torch.arange(6, 12).unsqueeze(0)
    with pytest.raises(ValueError, match="labels: position_ids begin at 6, so this is a part.*shift_labels"):
        model(input_ids=ids, labels=ids, position_ids=part)
    model(input_ids=ids, labels=ids, shift_labels=ids, position_ids=part)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    classifier = moesaic.parallelize(swap_moe(Qwen3MoeForSequenceClassification(config)), moesaic.build_meshes())
    with pytest.raises(ValueError, match="labels: only the loss of a causal .*not that of .*SequenceClassification"):
        classifier(input_ids=ids, labels=ids[:, 0])


def test_what_would_be_another_loss_is_refused(same_ranks):
    same_ranks(check_refusals, 2)
