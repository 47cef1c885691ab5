"""Choose experts otherwise than by scores: as another forward pass did, or as a benchmark wants it.

Activation checkpointing runs a forward pass again, often after the context around the first one has ended, and with the
passes of other microbatches in between. So a router remembers which passes were steered, and by what. It knows a pass
that runs again by the sum of its logits, which are the same bits. All that is one operator, for policies of selective
checkpointing count operators.

Legend: T tokens, K top-k, E experts, L layers.
"""

import contextlib
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moesaic.layers.recompute import is_recomputing, may_run_again

# As many passes of a router as may lie between one and the backward pass in which it runs again.
_REMEMBERED = 256


class Pass(NamedTuple):
    """One forward pass of one layer: ``ids [T, K]``, -1 where nothing is recorded, and ``weights [T, K]`` or None."""

    ids: Tensor
    weights: Tensor | None


class Record:
    """The experts that tokens went to, by layer and forward pass. :func:`record` makes one, :func:`replay` plays it.

    Layers count in the order in which they are first called, forward passes of each layer from 0. On several ranks each
    has a record of its own: its own tokens, and the layers of its stage.

    Attributes:
        layers: ``layers[l][i]`` is forward pass ``i`` of layer ``l``.
    """

    def __init__(self) -> None:
        self.layers: list[list[Pass]] = []

    @classmethod
    def from_routed_experts(cls, ids: Any, layers: Sequence[int] | None = None) -> "Record":
        """The record of one forward pass, from ids ``[..., L, K]`` like vLLM's ``routed_experts [tokens, layers, k]``.

        Args:
            ids: integers, a tensor or what ``torch.as_tensor`` takes; -1 for tokens that were not recorded. Tokens are
                in the order in which the layers see them. With sequence parallelism a rank gives those of its part:
                ``ids[:, meshes.sequence_positions(S)]`` of ``[B, S, L, K]``.
            layers: which of the L layers are mixtures of experts; None for all. Engines often count dense layers too.

        Raises:
            ValueError: other dims or dtypes, or a layer that is not there.
        """
        t = torch.as_tensor(ids)
        if t.ndim < 3 or t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise ValueError(f"ids: expected integers [tokens, layers, k], got {t.dtype} {list(t.shape)}")
        tokens_TLK = t.flatten(0, -3).long()
        chosen = range(t.shape[-2]) if layers is None else layers
        if absent := [layer for layer in chosen if not 0 <= layer < t.shape[-2]]:
            raise ValueError(f"layers: {absent[0]} is none of the {t.shape[-2]} layers of ids; count from 0")
        record = cls()
        record.layers = [[Pass(tokens_TLK[:, layer], None)] for layer in chosen]
        return record

    def routed_experts(self, forward_pass: int = 0) -> Tensor:
        """The ids of one forward pass, ``[tokens, layers, k]`` int32, as vLLM gives them.

        Raises:
            ValueError: the pass was not recorded in every layer, or its layers have other numbers of tokens or experts.
        """
        if any(forward_pass >= len(passes) for passes in self.layers) or not self.layers:
            raise ValueError(
                f"forward_pass: {forward_pass} was not recorded; the {len(self.layers)} layers have "
                f"{sorted({len(passes) for passes in self.layers})} passes"
            )
        ids = [passes[forward_pass].ids for passes in self.layers]
        if len({t.shape for t in ids}) > 1:
            raise ValueError(f"the layers have other shapes, {sorted({tuple(t.shape) for t in ids})}; read .layers")
        return torch.stack(ids, 1).int()


_serials = itertools.count(1)


class _Steering:
    """What decides in place of scores."""

    def __init__(self) -> None:
        self.serial = next(_serials)

    def enter(self, router: nn.Module) -> int:
        """A forward pass begins; its number."""
        return 0

    def ids(self, router: nn.Module, number: int, by_score_TK: Tensor, num_experts: int) -> Tensor:
        raise NotImplementedError


class _Replay(_Steering):
    def __init__(self, record: Record) -> None:
        super().__init__()
        self.layers = record.layers
        self.places: MutableMapping[nn.Module, int] = weakref.WeakKeyDictionary()
        self.passes: MutableMapping[nn.Module, int] = weakref.WeakKeyDictionary()

    def enter(self, router: nn.Module) -> int:
        self.places.setdefault(router, len(self.places))
        self.passes[router] = self.passes.get(router, -1) + 1
        return self.passes[router]

    def ids(self, router: nn.Module, number: int, by_score_TK: Tensor, num_experts: int) -> Tensor:
        place, layers = self.places[router], self.layers
        if place >= len(layers):
            raise ValueError(f"replay: this is layer {place}, counted from 0, and {len(layers)} layers are recorded")
        passes = layers[place]
        if number >= len(passes):
            raise ValueError(
                f"replay: this is forward pass {number} of layer {place}, counted from 0, and {len(passes)} are "
                "recorded; enter replay() once for each time that the record is played"
            )
        recorded_TK = passes[number].ids
        if recorded_TK.shape != by_score_TK.shape:
            raise ValueError(
                f"replay: layer {place} chooses experts for [tokens, k] {list(by_score_TK.shape)}, and "
                f"{list(recorded_TK.shape)} is recorded; give each rank the tokens of its part, in its own order"
            )
        if recorded_TK.device.type == "cpu" and recorded_TK.numel() and int(recorded_TK.max()) >= num_experts:
            raise ValueError(
                f"replay: expert {int(recorded_TK.max())} is recorded, and layer {place} has {num_experts}"
            )
        recorded_TK = recorded_TK.to(by_score_TK.device)
        absent_T1 = (recorded_TK < 0).any(1, keepdim=True)
        return torch.where(absent_T1, by_score_TK, recorded_TK)


class _Forced(_Steering):
    def __init__(self, skew: float) -> None:
        super().__init__()
        self.skew = skew

    def ids(self, router: nn.Module, number: int, by_score_TK: Tensor, num_experts: int) -> Tensor:
        T, K = by_score_TK.shape
        one_after_the_other_TK = torch.arange(T * K, device=by_score_TK.device).view(T, K) % num_experts
        first_T1 = torch.arange(T, device=by_score_TK.device).unsqueeze(1) < round(self.skew * T)
        return torch.where(first_T1, torch.arange(K, device=by_score_TK.device), one_after_the_other_TK)


class _Remembered(NamedTuple):
    """A forward pass of a router. ``serial`` is 0 and ``steering`` gives None where scores decided."""

    sum: Tensor
    serial: int
    number: int
    steering: Callable[[], _Steering | None]


# Compiled code notices a change of these two.
_recording: Record | None = None
_steering: _Steering | None = None
_recorded_places: MutableMapping[nn.Module, int] = weakref.WeakKeyDictionary()
_trails: MutableMapping[nn.Module, deque[_Remembered]] = weakref.WeakKeyDictionary()
_routers: MutableMapping[int, nn.Module] = weakref.WeakValueDictionary()


@contextlib.contextmanager
def record() -> Iterator[Record]:
    """Record the experts that the routers of this process choose inside.

    Forward passes that activation checkpointing runs again are not recorded again. Padding has ids -1. Contexts do not
    nest: the inner one records.

    Example:
        >>> with moesaic.routing.record() as r:
        ...     model(input_ids=ids)
        >>> r.routed_experts().shape
        torch.Size([tokens, layers, k])
    """
    global _recording, _recorded_places
    before = _recording, _recorded_places
    _recording, _recorded_places = Record(), weakref.WeakKeyDictionary()
    try:
        yield _recording
    finally:
        _recording, _recorded_places = before


@contextlib.contextmanager
def replay(record: Record) -> Iterator[None]:
    """Let routers inside choose the experts of a record, layer by layer and forward pass by forward pass.

    The weights are those of the scores of now at the recorded ids, so the router gets its gradients. Loads and balance
    losses count the recorded ids. A token with an id of -1 goes where its scores say. The backward pass may be inside
    or outside; keep the record until then, since activation checkpointing asks for it again.

    Raises:
        TypeError: ``record`` is none.
        ValueError: more layers or passes than are recorded, other numbers of tokens or experts a token, or an expert
            that is not there.

    Example:
        >>> with moesaic.routing.replay(r):
        ...     loss = model(input_ids=ids, labels=ids).loss
        >>> loss.backward()
    """
    if not isinstance(record, Record):
        raise TypeError(
            f"record: expected a Record, got {type(record).__name__}; Record.from_routed_experts(ids) makes one of ids "
            "[tokens, layers, k]"
        )
    steering = _Replay(record)
    # As long as the record lives, and no longer.
    record.__dict__.setdefault("_replays", []).append(steering)
    with _steered(steering):
        yield


@contextlib.contextmanager
def force(*, skew: float = 0.0) -> Iterator[None]:
    """Let routers inside choose experts by the number of a token alone, for benchmarks.

    A share ``skew`` of each rank's tokens goes to experts ``0..K-1``. The copies of the others go to all experts one
    after the other. So 0 is as balanced as can be, and 1 is all tokens on the same experts. Weights are those of the
    scores at these ids. Under activation checkpointing the backward pass has to be inside, too.

    Raises:
        ValueError: ``skew`` is not in 0..1.
    """
    if not 0 <= skew <= 1:
        raise ValueError(f"skew: expected a share in 0..1, got {skew}")
    with _steered(_Forced(skew)):
        yield


@contextlib.contextmanager
def _steered(steering: _Steering) -> Iterator[None]:
    global _steering
    before, _steering = _steering, steering
    try:
        yield
    finally:
        _steering = before


def steer(router: nn.Module, by_score_TK: Tensor, logits_TE: Tensor) -> Tensor:
    """The experts that a router goes on with: those by score, unless something else decides about this forward pass."""
    if torch.compiler.is_compiling():
        if _steering is not None:
            raise _not_compiled()
        return by_score_TK
    if _steering is None and router not in _trails:
        return by_score_TK
    _routers[id(router)] = router
    return torch.ops.moesaic.steer(by_score_TK, logits_TE.detach(), id(router))


def note(router: nn.Module, ids: Tensor, weights: Tensor) -> None:
    """A router has routed: write it into the record, if there is one, unless this forward pass runs again."""
    if _recording is None:
        return
    if torch.compiler.is_compiling():
        raise _not_compiled()
    if is_recomputing():
        return
    place = _recorded_places.setdefault(router, len(_recorded_places))
    if place == len(_recording.layers):
        _recording.layers.append([])
    _recording.layers[place].append(Pass(ids.detach(), weights.detach()))


def _not_compiled() -> RuntimeError:
    return RuntimeError(
        "moesaic.routing: record, replay and force are not for compiled code; call the model without torch.compile"
    )


# No sharding rule: ids are a rank's own.
torch.library.define("moesaic::steer", "(Tensor by_score, Tensor logits, int router) -> Tensor")


@torch.library.impl("moesaic::steer", "default")
def _steer(by_score_TK: Tensor, logits_TE: Tensor, key: int) -> Tensor:
    router, total = _routers[key], logits_TE.double().sum()

    def chosen_by(steering: _Steering | None, number: int) -> Tensor:
        if steering is None:
            return by_score_TK.clone()
        return steering.ids(router, number, by_score_TK, logits_TE.shape[1])

    if is_recomputing():
        first, *others = (chosen_by(*decision) for decision in _again(router, total))
        if not all(torch.equal(first, other) for other in others):
            raise RuntimeError(
                "moesaic.routing: a forward pass runs again, and there were two with its logits that sent tokens to "
                "other experts; finish the backward pass of one before the other"
            )
        return first
    steering = _steering
    number = 0 if steering is None else steering.enter(router)
    if may_run_again():
        _remember(router, total, steering, number)
    return chosen_by(steering, number)


@torch.library.register_fake("moesaic::steer")
def _(by_score: Tensor, logits: Tensor, router: int) -> Tensor:
    return torch.empty_like(by_score)


def _remember(router: nn.Module, total: Tensor, steering: _Steering | None, number: int) -> None:
    trail = _trails.setdefault(router, deque(maxlen=_REMEMBERED))
    if steering is None:
        trail.append(_Remembered(total, 0, 0, lambda: None))
    else:
        trail.append(_Remembered(total, steering.serial, number, weakref.ref(steering)))
    if not any(entry.serial for entry in trail):
        del _trails[router]


def _again(router: nn.Module, total: Tensor) -> list[tuple[_Steering | None, int]]:
    """What may have decided about the forward pass that runs again, and its number there."""
    same = {(e.serial, e.number): e for e in _trails.get(router, ()) if bool(e.sum == total)}
    if not same:
        raise RuntimeError(
            "moesaic.routing: a forward pass runs again and has the logits of none that is remembered; make it "
            "deterministic, and finish backward passes of before the first replay() first"
        )
    decisions = [(entry.steering(), entry.number) for entry in same.values() if entry.serial]
    alive = [(steering, number) for steering, number in decisions if steering is not None]
    if decisions and not alive:
        raise RuntimeError(
            "moesaic.routing: a forward pass runs again, and what it replayed is gone; keep the record until after the "
            "backward pass, and call backward inside force()"
        )
    return [*alive, *((None, 0) for serial, _ in same if not serial)]
