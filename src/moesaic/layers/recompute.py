"""Forward passes that activation checkpointing runs again, in the backward pass.

The second forward pass has to run the operators of the first, in the same order, and no operator may write into a
tensor. Selective checkpointing counts operators, and in place of some results it takes those that it has kept. So what
must happen only once is an operator that decides for itself.

With ``use_reentrant=True`` the first forward pass runs without gradients. A loss that it returns is a leaf. The
gradient that arrives at the leaf goes to the same loss of the second forward pass.
"""

import sys
from types import FrameType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from moesaic.layers.carrier import carry
from moesaic.layers.uncounted import is_uncounted

_ENTRIES = "_moesaic_deferred_losses"


def backward_pass() -> int:
    """The number of the backward pass that this code runs in, or -1."""
    return torch._C._current_graph_task_id()


def is_recomputing() -> bool:
    """Whether activation checkpointing runs this forward pass again, inside a backward pass."""
    return backward_pass() != -1


def may_run_again() -> bool:
    """Whether activation checkpointing may run this forward pass again: it has gradients, or will have them then."""
    return torch.is_grad_enabled() or _checkpoints()[1] is not None


# In compiled code, too, the question is asked when the operator runs. No sharding rule: counts are a rank's own.
torch.library.define("moesaic::count_once", "(Tensor(a!) total, Tensor counts) -> ()")


@torch.library.impl("moesaic::count_once", "default")
def _count_once(total: Tensor, counts: Tensor) -> None:
    if not is_recomputing() and not is_uncounted():
        total += counts


@torch.library.register_fake("moesaic::count_once")
def _(total: Tensor, counts: Tensor) -> None:
    pass


def count_once(total: Tensor, counts: Tensor) -> None:
    """Add ``counts`` to ``total``, in place, unless this forward pass runs again or is not to count."""
    torch.ops.moesaic.count_once(total, counts)


class DeferredLoss:
    """A loss of a forward pass without gradients. Its gradient goes to the same loss of the second forward pass.

    Attributes:
        value: the loss, a leaf that takes a gradient.
    """

    def __init__(self, loss: Tensor) -> None:
        self.value = loss.detach().requires_grad_()
        self.value.register_hook(self._arrived)
        self._grad: Tensor | None = None

    def take(self) -> Tensor | None:
        """The gradient, once only."""
        grad, self._grad = self._grad, None
        return grad

    def _arrived(self, grad: Tensor) -> None:
        self._grad = grad
        torch.autograd.Variable._execution_engine.queue_callback(self._check)

    def _check(self) -> None:
        if self.take() is not None:
            raise RuntimeError(
                "balance_losses: the gradient of a balance loss did not reach its router, whose forward pass ran again "
                "too early or not at all. With use_reentrant=True add the losses to the main loss, call backward on "
                "the sum, and give the checkpointed function an input that requires gradients; or use_reentrant=False"
            )


def defer(loss: Tensor) -> Tensor | None:
    """The value to return for ``loss``, if this forward pass runs without gradients and again with them; else None."""
    again, first = _checkpoints()
    if first is None:
        return None
    # A forward pass that runs again can itself be the first one of a checkpoint inside.
    entry = DeferredLoss(loss) if again is None else _next(again)
    if entry is None:
        return None
    first.__dict__.setdefault(_ENTRIES, _Entries()).all.append(entry)
    return entry.value


def give_deferred_gradient(loss: Tensor, carrier: Tensor) -> Tensor:
    """The carrier. If this forward pass runs again for a deferred loss, its backward pass is also that of ``loss``."""
    again, _ = _checkpoints()
    entry = None if again is None else _next(again)
    return carrier if entry is None else carry(carrier, loss, entry.take)


class _Entries:
    """The deferred losses of one checkpointed forward pass, in order, and how many a backward pass has taken."""

    def __init__(self) -> None:
        self.all: list[DeferredLoss] = []
        self._taken_in, self._taken = -1, 0

    def next(self) -> DeferredLoss | None:
        if self._taken_in != backward_pass():  # with retain_graph there are several
            self._taken_in, self._taken = backward_pass(), 0
        self._taken += 1
        return self.all[self._taken - 1] if self._taken <= len(self.all) else None


def _next(checkpoint: FunctionCtx) -> DeferredLoss | None:
    entries: _Entries | None = checkpoint.__dict__.get(_ENTRIES)
    return None if entries is None else entries.next()


def _checkpoints() -> tuple[FunctionCtx | None, FunctionCtx | None]:
    """The reentrant checkpoint that runs this forward pass again, and the outermost one inside that runs it first.

    Such a checkpoint is an autograd function, of torch or of others. Its ``forward`` or ``backward`` is on the stack.
    """
    first: FunctionCtx | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "unpack_hook" and frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return None, None  # without reentry: the gradients are those of the first forward pass
        if code.co_name in ("forward", "backward") and code.co_varnames[:1] == ("ctx",):
            ctx = frame.f_locals["ctx"]
            if isinstance(ctx, FunctionCtx):
                if code.co_name == "backward":
                    return ctx, first
                first = ctx
        frame = frame.f_back
    return None, first
