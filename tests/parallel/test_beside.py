"""What runs on a stream of its own waits for what it reads, and is waited for. Streams are a fake that notes calls."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor

from moesaic.parallel.beside import Beside, Streams, streams_of

CPU = torch.device("cpu")


class Recorder:
    """The calls of a stream API, in order. A stream is its number; the program's own is 0."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.now, self.made = 0, 0

    def Stream(self, device: torch.device) -> "_Stream":
        self.made += 1
        return _Stream(self, self.made)

    def current_stream(self, device: torch.device) -> "_Stream":
        return _Stream(self, self.now)

    @contextmanager
    def stream(self, stream: "_Stream"):
        before, self.now = self.now, stream.number
        yield
        self.now = before


class _Stream:
    def __init__(self, recorder: Recorder, number: int) -> None:
        self.recorder, self.number = recorder, number

    def wait_stream(self, other: "_Stream") -> None:
        self.recorder.calls.append((self.number, "waits for", other.number))


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    recorder = Recorder()

    def record_stream(t: Tensor, stream: _Stream) -> None:
        recorder.calls.append((stream.number, "reads", t.data_ptr()))

    monkeypatch.setattr(Tensor, "record_stream", record_stream)
    return recorder


def test_work_is_queued_behind_its_inputs_and_before_its_result(recorder):
    x = torch.randn(3, requires_grad=True)

    def double(x: Tensor) -> Tensor:
        recorder.calls.append((recorder.now, "computes"))
        return 2 * x

    aside = Beside(partial(double, x), Streams(recorder, CPU))
    assert recorder.calls == []
    aside.queue()
    aside.call()
    queued = [(1, "waits for", 0), (1, "computes"), (1, "reads", x.data_ptr())]
    assert recorder.calls == queued
    result = aside.result()
    assert torch.equal(result, 2 * x)
    assert recorder.calls == [*queued, (0, "waits for", 1), (0, "reads", result.data_ptr())]
    # Gradients of parameters, too, are there when the one of its input is.
    recorder.calls.clear()
    x.register_hook(lambda grad: recorder.calls.append((recorder.now, "has gradients")))
    result.sum().backward()
    assert recorder.calls == [(0, "waits for", 1), (0, "has gradients")]


def test_without_streams_it_runs_where_it_is_called():
    called: list[int] = []
    aside = Beside(partial(lambda: called.append(1) or torch.ones(1)), None)
    aside.queue()
    assert called == []
    aside.call()
    assert called == [1]
    assert aside.result() == 1
    assert called == [1]


def test_a_cpu_has_no_streams():
    assert streams_of(torch.ones(1)) is None
