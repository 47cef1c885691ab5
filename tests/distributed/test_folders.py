"""Depth 3 for every folder of transformers that has a depth 2: four ranks against one process, with tp and without."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic.integrations.transformers import swap_moe
from tests.distributed.parity import assert_close, assert_gradients_close, meshes_of
from tests.integrations.families import VOCAB
from tests.integrations.folders import forward, make
from tests.integrations.test_folders import SWAPPED

# tests/distributed/test_families.py has those that stand for them.
pytestmark = pytest.mark.long
BATCH, LENGTH = 4, 10
# Of these, tests/distributed/test_families.py has more tests.
WITH_TP = [
    "beam",
    "cohere2_moe",
    "deepseek_ocr2",
    "dots1",
    "exaone_moe",
    "flex_olmo",
    "glm4_moe_lite",
    "glm4v_moe",
    "granitemoe_swa",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "laguna",
    "mellum",
    "mimo_v2_flash",
    "mistral4",
    "qwen3_omni_moe",
    "qwen3_vl_moe",
    "solar_open",
    "unlimited_ocr",
]


def run(model: Any, ids: Tensor, cotangent: Tensor) -> Tensor:
    """The output. Calls backward on its product with ``cotangent``, and gives every parameter a gradient."""
    y = forward(model, ids)
    (y * cotangent[:, :, : y.shape[2]]).sum().backward()
    return y.detach()


def check_folder(folder: str, layout: dict[str, int]) -> None:
    plain = swap_moe(make(folder))
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    cotangent = torch.randn(BATCH, LENGTH, 4096, generator=torch.Generator().manual_seed(2))
    meshes = meshes_of(layout)
    model = moesaic.parallelize(copy.deepcopy(plain), meshes)
    expected = run(plain, ids, cotangent)
    rows = slice(meshes.dp_rank * BATCH // meshes.dp_size, (meshes.dp_rank + 1) * BATCH // meshes.dp_size)
    part = meshes.sequence_slice(LENGTH)
    actual = run(model, ids[rows], cotangent[rows, part])
    assert_close("output", actual, expected[rows, part])
    assert_gradients_close(model, {name: p.grad for name, p in plain.named_parameters()})


@pytest.mark.parametrize("folder", SWAPPED)
def test_without_tp(same_ranks, folder):
    same_ranks(check_folder, 4, folder, {"ep": 2, "etp": 2})


@pytest.mark.parametrize("folder", WITH_TP)
def test_with_tp(same_ranks, folder):
    same_ranks(check_folder, 4, folder, {"tp": 2, "ep": 2, "etp": 2})
