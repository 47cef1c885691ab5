"""One rank tunes the Triton kernels, all use what it found, and none tunes within a step."""

import os
from dataclasses import dataclass

import pytest
import torch

from moesaic import ranks as shared
from moesaic.parallel import tune_kernels

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Config:
    """What the tuner changes."""

    BM: int = 32
    BN: int = 32
    BK: int = 32
    GROUP_M: int = 2
    warps: int = 4
    stages: int = 3
    ctas: int = 1
    specialized: bool = False


def check_one_tunes_for_all(folder: str) -> tuple[int, dict, Config]:
    from moesaic.ops.triton import tuner

    os.environ["MOESAIC_CACHE_DIR"] = f"{folder}/{shared.rank()}"
    launches = []
    entries = tune_kernels(lambda: tuner.best("a launch", Config(), CPU, launches.append))
    timed = len(launches)
    # Known or not, nothing is timed from now on.
    found = tuner.best("a launch", Config(), CPU, launches.append)
    assert tuner.best("another launch", Config(), CPU, launches.append) == Config()
    assert len(launches) == timed
    with pytest.raises(KeyError, match="out of ideas"):
        tune_kernels(lambda: {}["out of ideas"])
    return timed, entries, found


def test_rank_0_tunes_for_all(same_ranks, tmp_path):
    pytest.importorskip("triton")
    (timed, *first), (other, *second) = same_ranks(check_one_tunes_for_all, 2, str(tmp_path))
    assert timed > 10
    assert other == 0
    assert first == second
    assert list(first[0]) == ["a launch"]


def check_unlike_gpus_are_refused() -> None:
    from moesaic.ops.triton import tuner

    name = tuner.device_name
    tuner.device_name = lambda device: f"GPU {shared.rank()}"
    try:
        with pytest.raises(ValueError, match="different GPUs or versions: GPU is 'GPU 0' and 'GPU 1'"):
            tune_kernels(lambda: pytest.fail("tuned"))
    finally:
        tuner.device_name = name


def test_ranks_with_other_gpus_cannot_share_a_table(same_ranks):
    pytest.importorskip("triton")
    same_ranks(check_unlike_gpus_are_refused, 2)
