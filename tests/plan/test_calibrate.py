"""``moesaic plan --calibrate``: what it measures, alone and on ranks, and what is made of it."""

import dataclasses
from collections.abc import Mapping

import pytest
import torch

from moesaic import cli
from moesaic.plan import calibrate
from moesaic.plan.hardware import as_toml, read_hardware
from moesaic.plan.time import pipeline_bubble

TINY = calibrate.Sizes(0.0, 16, (2, 8, 8), (2, 8), 64, 256)


def test_a_file_is_written_that_can_be_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "OF_CPU", TINY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    file = tmp_path / "mine.toml"
    assert cli.main(["plan", "--calibrate", str(file), "--hardware", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert file.read_text().partition("\n")[2] in printed
    assert "by 1 process(es); the rest is that of CPU" in printed
    mine, base = read_hardware(str(file)), read_hardware("CPU")
    # One process knows nothing of links, nor of what ranks take from one another.
    assert (mine.node, mine.network, mine.slower, mine.alone) == (base.node, base.network, base.slower, base.alone)
    assert mine.flops != base.flops
    assert mine.bandwidth != base.bandwidth


def test_a_folder_that_is_not_there_is_said_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moesaic.plan.command.calibrated", lambda base: pytest.fail("measured"))
    assert cli.main(["plan", "--calibrate", str(tmp_path / "no" / "mine.toml")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def measure() -> tuple[dict[str, object], str]:
    found = calibrate.measured(read_hardware("CPU"), torch.device("cpu"), TINY)
    return dataclasses.asdict(found), as_toml(found)


@pytest.mark.slow
def test_ranks_measure_together_and_agree(ranks, tmp_path):
    (found, text), (other, _) = ranks(measure, 2)
    assert found == other
    file = tmp_path / "mine.toml"
    file.write_text(text)
    read = dataclasses.asdict(read_hardware(str(file)))
    for name in ("node", "slower", "overlap", "alone", "layer"):
        assert _numbers(read[name]) == pytest.approx(_numbers(found[name]), rel=1e-4)
    base = read_hardware("CPU")
    assert found["node"] != dataclasses.asdict(base.node)
    assert found["network"] == dataclasses.asdict(base.network)  # all ranks are in one node
    assert 0 <= read["overlap"] <= 1
    assert 1 <= read["alone"] <= 2


def _numbers(value: object) -> list[float]:
    return list(value.values()) if isinstance(value, Mapping) else [value]  # type: ignore[list-item]


def test_stages_that_share_cores_lose_less_by_waiting():
    assert pipeline_bubble(1, 1.0) == 0
    assert pipeline_bubble(4, 1.0) == 3
    # Two of them on two cores, four on two, and four on one.
    assert pipeline_bubble(2, 1.0) == 1
    assert pipeline_bubble(4, 2.0) == pytest.approx(2 * (1 / 2 + 1 / 2 + 3 / 4) - 3)
    assert pipeline_bubble(4, 4.0) == 0
