"""Metrics files through crashes and resumes, and what the screen shows."""

import io
import resource

import pytest
from rich.console import Console

from moesaic.train import console
from moesaic.train.metrics import (
    EXPERT_LOAD,
    ROUTER_ENTROPY,
    JsonlWriter,
    LenientWriter,
    TensorBoardWriter,
    read_jsonl,
)

VALUES = {
    "loss": 3.25,
    "grad_norm": 0.5,
    "lr": 1e-3,
    "tokens_per_second": 12345.6,
    "balance": 1.5,
    "dead_experts": 2.0,
    "memory_gib": 0.25,
}


def test_rows_are_read_back_exactly(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.log({"loss": 0.1 + 0.2, "norm": float("inf")}, 1)
    # At once: a crash loses no line.
    assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 1, "loss": 0.1 + 0.2, "norm": None}]
    writer.close()


def test_a_resume_drops_the_steps_that_are_run_again(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(path)
    for step in (1, 2, 3, 4):
        writer.log({"loss": float(step)}, step)
    writer.close()
    damaged = bytearray(path.read_bytes())
    damaged[3] ^= 0x80  # no UTF-8 any more
    path.write_bytes(bytes(damaged) + b'{"step": 5, "lo')  # and the crash
    writer = JsonlWriter(path, last_step=2)
    writer.log({"loss": 30.0}, 3)
    writer.close()
    assert [(row["step"], row["loss"]) for row in read_jsonl(path)] == [(2, 2.0), (3, 30.0)]


@pytest.fixture
def full_disk():
    """`full_disk(n)`: from now on no file can grow beyond `n` bytes; `full_disk(None)`: again without limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_once_and_loses_no_line(tmp_path, full_disk):
    path, told = tmp_path / "m.jsonl", []
    writer = LenientWriter(JsonlWriter(path), "m.jsonl", told.append)
    writer.log({"loss": 1.0}, 1)
    full_disk(path.stat().st_size + 5)
    for step in (2, 3):
        writer.log({"loss": 2.0}, step)
        assert [row["step"] for row in read_jsonl(path)] == [1]
        assert path.read_bytes().endswith(b"}\n")
    assert len(told) == 1
    assert told[0].startswith("warning: cannot write m.jsonl: ")
    full_disk(None)
    writer.log({"loss": 4.0}, 4)
    writer.close()
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3, 4]


def test_tensorboard_events(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = TensorBoardWriter(tmp_path)
    for step in (1, 2):
        of_layers = {EXPERT_LOAD: {"layers.0.mlp": [step, 3]}, ROUTER_ENTROPY: {"layers.0.mlp": 0.5}}
        writer.log({"loss": 1.0 / step, **of_layers}, step)
    writer.close()
    reader = events.EventAccumulator(str(tmp_path))
    reader.Reload()
    assert [event.step for event in reader.Images("expert_load")] == [1, 2]
    assert reader.Histograms("expert_load/layers.0.mlp")[0].histogram_value.max == pytest.approx(1.2)
    assert [event.value for event in reader.Scalars("router_entropy_of/layers.0.mlp")] == [0.5, 0.5]
    assert [(event.step, event.value) for event in reader.Scalars("loss")] == [(1, 1.0), (2, 0.5)]


def test_lines_where_there_is_no_terminal(capsys):
    screen = console.open_screen(leader=True)
    screen.message("hello")
    screen.start(0, 100)
    screen.update(9, None)
    screen.update(10, VALUES)
    screen.stop()
    out = capsys.readouterr().out
    assert out == (
        "hello\nstep  10/100  loss 3.2500  12,346 tok/s  grad 0.50  lr 1.0e-03  balance 1.50  dead 2  mem 0.25 GiB\n"
    )


def test_other_ranks_are_silent(capsys):
    screen = console.open_screen(leader=False)
    screen.message("hello")
    screen.start(0, 100)
    screen.update(10, VALUES)
    screen.stop()
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal():
    out = io.StringIO()
    screen = console._Terminal(Console(file=out, force_terminal=True, width=120))
    screen.start(20, 100)
    screen.update(30, VALUES)
    screen.message("[not markup]")
    screen.stop()
    text = out.getvalue()
    assert "30/100" in text
    assert "loss 3.2500" in text
    assert "[not markup]" in text
