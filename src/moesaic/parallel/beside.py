"""What a GPU does beside the exchange of rows, on streams of its own.

There operators are queued, and those of one stream wait for each other. The shared expert needs nothing but its tokens:
on a stream of its own it fills the time in which the host waits for the counts, and that in which rows are under way,
both there and back. The host reads the counts on another stream, so that it waits for them alone and for nothing that
was queued meanwhile. Autograd runs the backward pass of an operator on the stream of its forward pass.

On a CPU operators run when they are called, so the shared expert is called after rows have been sent.
"""

import contextlib
import functools
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Streams:
    """Two streams of a device, beside the one that the program uses.

    Args:
        api: ``torch.cuda``, or what has its ``Stream``, ``stream`` and ``current_stream``.
        device: which device.

    Attributes:
        work, copies: for computations, and for what the host waits for.
    """

    def __init__(self, api: Any, device: torch.device) -> None:
        self.api, self.device = api, device
        self.work, self.copies = api.Stream(device), api.Stream(device)

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """What is called in it is queued on a stream of these."""
        return self.api.stream(stream)

    def current(self) -> Any:
        """The stream that the program uses."""
        return self.api.current_stream(self.device)


@functools.cache
def _streams(device: torch.device) -> Streams:
    return Streams(torch.cuda, device)


def streams_of(t: Tensor) -> Streams | None:
    """Those of a tensor's device; None where nothing is queued, or where a compiler orders what it has traced."""
    if t.device.type != "cuda" or torch.compiler.is_compiling():
        return None
    return _streams(t.device)


class Beside:
    """A computation that runs beside the exchange of rows.

    Call :meth:`queue` when its inputs are there, :meth:`call` when rows are under way, and :meth:`result` for its
    result, when nothing else is left to do.

    Args:
        work: what to call. Its arguments are the tensors that it reads, but for parameters.
        streams: those of its device; None runs it in :meth:`call`.
    """

    def __init__(self, work: partial[Tensor], streams: Streams | None) -> None:
        self._work, self._streams = work, streams
        self._result: Tensor | None = None

    def queue(self) -> None:
        """Let it begin on a stream of its own, where there are streams."""
        if (streams := self._streams) is None:
            return
        streams.work.wait_stream(streams.current())
        work = self._work
        joined = [_Joined.apply(t, streams) for t in work.args]
        with streams.on(streams.work):
            self._result = work.func(*joined)
        # What the backward pass reads there is freed when it has been queued, not when it has been read.
        for t in work.args:
            t.record_stream(streams.work)

    def call(self) -> None:
        """Run it now, if it was not queued."""
        if self._streams is None:
            self._result = self._work()

    def result(self) -> Tensor:
        """What it gave. Later operators of the program wait for it."""
        result = self._result
        assert result is not None
        if (streams := self._streams) is not None:
            streams.current().wait_stream(streams.work)
            result.record_stream(streams.current())
        return result


class _Joined(torch.autograd.Function):
    """Itself. When its gradient is there, the program waits for all of the backward pass that was queued on the stream.

    Autograd alone waits for the gradient, and at the end for those of parameters. But FSDP reads them before the end.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, streams: Streams) -> Tensor:
        ctx.streams = streams
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        streams: Streams = ctx.streams
        streams.current().wait_stream(streams.work)
        return grads[0], None
