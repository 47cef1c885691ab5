"""A rehearsal of one rank: a layer of each kind runs forward and backward on tensors that have sizes and no memory.

It runs the model's own code on this rank's shapes. What a rank would get from others is made up. So what a layer keeps
for its backward pass, and the most that it holds at once, follow from the operators that really run, in whatever model.

Legend: B sequences, s positions of a rank, S those of its tp group together, T tokens of a rank, N rows gathered.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.layers import MoE
from moesaic.layers.dispatch import Dispatched
from moesaic.layers.router import Routing
from moesaic.ops import Permutation, combine, permute, sort_by_expert
from moesaic.parallel.attention import Part, base_of
from moesaic.parallel.context import add_context_parallelism
from moesaic.parallel.decoder import attention_parts, decoder_layers
from moesaic.parallel.loss import causal_lm_loss
from moesaic.parallel.mesh import Meshes, MeshLayout, resolve_layout
from moesaic.parallel.recompute import add_recomputation
from moesaic.parallel.wrapped import decoders
from moesaic.plan.choice import Choice, Job
from moesaic.plan.ledger import Ledger
from moesaic.plan.load import Load, load_of
from moesaic.plan.model import Planned, Weight

# Groups of ranks that are not there. Of the dense one nothing is kept, as in ``parallelize``.
_DENSE, _EXPERTS = "dense", "experts"
_exchange = torch.ops._c10d_functional.all_to_all_single


class _AbsentGroup(dist.ProcessGroup):
    """Of the first of so many ranks, for collectives on tensors without memory."""

    def __init__(self, ranks: int) -> None:
        # Its types leave out the constructor without a store, which a class of Python's needs.
        # pyrefly: ignore [missing-argument, bad-argument-type]
        super().__init__(0, ranks)

    @property
    def group_name(self) -> Any:
        return _DENSE


class OfLayer(NamedTuple):
    """Bytes of one layer of a kind.

    Attributes:
        kept: from its forward pass to its backward pass.
        forward: the most at once in its forward pass, above what it keeps.
        backward: the most at once in its backward pass, above what there was when it began.
        input: what goes in, which is all that is kept if the layer is computed again.
    """

    kept: int
    forward: int
    backward: int
    input: int


class Rehearsal(NamedTuple):
    """Bytes of one forward and backward pass, without weights and their gradients.

    Attributes:
        layers: of each kind, in the order of ``Shapes.kinds``.
        before: kept from before the first layer: embedding, positions, masks.
        after: kept from what is after the last layer: norm, head, loss.
        after_forward, after_backward: the most at once there, above what all layers keep.
        gradient: of the last layer's result, which is there when the layers' backward begins.
    """

    layers: tuple[OfLayer, ...]
    before: int
    after: int
    after_forward: int
    after_backward: int
    gradient: int

    def extended(self, two: Rehearsal, sequences: int) -> Rehearsal:
        """This one, of one sequence, to more of them, given that of two: all sizes grow by the same with each."""

        def extend(first: int, second: int) -> int:
            return first + (sequences - 1) * (second - first)

        layers = zip(self.layers, two.layers, strict=True)
        numbers = zip(self[1:], two[1:], strict=True)
        return Rehearsal(
            tuple(OfLayer(*map(extend, first, second)) for first, second in layers),
            *(extend(*pair) for pair in numbers),
        )


def rehearse(planned: Planned, choice: Choice, job: Job) -> Rehearsal:
    """Run one pass of the model with one layer of each kind, as the first rank of a layout would."""
    layout, kinds = choice.layout, list(planned.shapes.kinds)
    # With cp of a length that all ranks share evenly: no rank has more.
    chunks = 1 if layout.cp == 1 else 2 * layout.cp
    seq_len = -(-job.seq_len // chunks) * chunks
    of_context = seq_len // layout.cp
    here = -(-of_context // layout.tp)
    model: Any = copy.deepcopy(planned.model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _allocate(model, layout, kinds)
        [decoder] = decoders(model)
        if layout.cp > 1:
            add_context_parallelism(decoder, decoder_layers(decoder), _AbsentGroup(layout.cp))
        if layout.tp > 1:
            for i, layer in enumerate(decoder_layers(decoder)):
                _cut_sequence(layer, attention_parts(decoder, layer), of_context, here, is_first=i == 0)
        loads = [None if k.moe is None else load_of(choice.tokens(job), k.moe, layout, job.capacity) for k in kinds]
        if layout.ep * layout.etp > 1:
            for layer, load in zip(decoder_layers(decoder), loads, strict=True):
                for moe in (m for m in layer.modules() if isinstance(m, MoE)):
                    assert load is not None
                    moe.dispatcher = _Exchanged(load, layout, even=job.capacity is not None)
        if choice.recompute in ("experts", "selective"):
            moes = [m for m in model.modules() if isinstance(m, MoE)]
            add_recomputation(choice.recompute, decoder_layers(decoder), moes, [_DENSE])
        ids = torch.zeros(choice.sequences, seq_len, dtype=torch.int64)
        one = Meshes(resolve_layout(1))
        loss: Any = partial(causal_lm_loss, meshes=one, group=None)  # with the number of labels nothing is sent
        model.loss_function = partial(loss, num_items_in_batch=1)
        ledger = Ledger(ids, *model.parameters(), *model.buffers())
        layers = decoder_layers(decoder)
        with ExitStack() as stack:
            _mark(layers, ledger)
            _drop_gradients(model)
            stack.enter_context(ledger)
            ledger.mark("start")
            with torch.autocast("cpu", torch.bfloat16, enabled=job.autocast):
                loss = model(input_ids=ids, labels=ids[:, :here], use_cache=False).loss
            ledger.mark("forward")
            loss.backward()
            ledger.mark("backward")
    return _read(ledger, len(layers), choice.tokens(job) * planned.shapes.dim * planned.shapes.outer[0].itemsize)


def _read(ledger: Ledger, num_layers: int, input_size: int) -> Rehearsal:
    marks = ledger.marks
    layers = []
    for i in range(num_layers):
        before, after, begin, done = (marks[f"{at} {i}"] for at in ("before", "after", "grad of", "grad into"))
        layers.append(OfLayer(after.live - before.live, after.peak - after.live, done.peak - begin.live, input_size))
    last, top = marks[f"after {num_layers - 1}"], marks[f"grad of {num_layers - 1}"]
    end = marks["forward"]
    return Rehearsal(
        tuple(layers),
        marks["before 0"].live,
        end.live - last.live,
        end.peak - last.live,
        top.peak - last.live,
        max(top.live - last.live, 0),
    )


def _allocate(model: nn.Module, layout: MeshLayout, kinds: list[Any]) -> None:
    """Give every parameter this rank's shape, before FSDP, and fake memory."""
    [decoder] = decoders(model)
    shapes: dict[nn.Parameter, tuple[int, ...]] = {}
    for layer, kind in zip(decoder_layers(decoder), kinds, strict=True):
        experts = {p for m in layer.modules() if isinstance(m, MoE) for p in m.experts.parameters()}
        of_both: list[tuple[list[nn.Parameter], tuple[Weight, ...]]] = [
            ([p for p in layer.parameters() if p not in experts], kind.dense),
            ([p for p in layer.parameters() if p in experts], kind.experts),
        ]
        for parameters, weights in of_both:
            for parameter, weight in zip(parameters, weights, strict=True):
                shapes[parameter] = weight.local_shape(layout)
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p not in made:
                made[p] = nn.Parameter(torch.empty(shapes.get(p, tuple(p.shape)), dtype=p.dtype, device="cpu"))
            setattr(module, name, made[p])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))


def _drop_gradients(model: nn.Module) -> None:
    """Gradients of weights are counted elsewhere, so they go as soon as they are there."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(drop)


def _mark(layers: list[nn.Module], ledger: Ledger) -> None:
    def hidden_of(args: Any, kwargs: Any) -> Tensor:
        return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def before(i: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        ledger.mark(f"before {i}")
        hidden_of(args, kwargs).register_hook(lambda grad: ledger.mark(f"grad into {i}"))

    def after(i: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        ledger.mark(f"after {i}")
        (output if isinstance(output, Tensor) else output[0]).register_hook(lambda grad: ledger.mark(f"grad of {i}"))

    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(partial(before, i), with_kwargs=True)
        layer.register_forward_hook(partial(after, i), with_kwargs=True)


class _Moved(torch.autograd.Function):
    """As many rows as an exchange gives, and as many back. ``scratch`` rows are in memory meanwhile.

    The operator is that of an exchange, over ranks that are not there: what is computed again asks for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, scratch: int, scratch_back: int, group: str) -> Tensor:
        ctx.rows, ctx.scratch, ctx.group = x.shape[0], scratch_back, group
        meanwhile = x.new_empty(scratch, *x.shape[1:])
        moved = _exchange(x.contiguous(), [rows], [len(x)], group)
        del meanwhile
        return moved

    @staticmethod
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        [grad] = grads
        meanwhile = grad.new_empty(ctx.scratch, *grad.shape[1:])
        moved = grad.new_empty(ctx.rows, *grad.shape[1:])
        del meanwhile
        return moved, None, None, None, None


def _over(x: Tensor, rows: int, ranks: int, group: str, *, gathers: bool, even: bool) -> Tensor:
    """An all-gather or a reduce-scatter of ours over some ranks: in memory as :mod:`moesaic.parallel.collectives`."""
    if ranks == 1:
        return x
    part = x.shape[0] if gathers else rows
    # Rows of others where they come, unless they come to where they are needed.
    of_gather = part if ranks == 2 else 0 if even else part * (ranks - 1)
    of_reduce = part * ranks
    forward, backward = (of_gather, of_reduce) if gathers else (of_reduce, of_gather)
    return _Moved.apply(x, rows, forward, backward, group)


def _cut_sequence(layer: Any, parts: list[Part], whole: int, here: int, *, is_first: bool) -> None:
    """What :mod:`moesaic.parallel.decoder` does: a shard between attentions, the whole sequence in them."""
    ranks, even = -(-whole // here), whole % here == 0

    def replace(change: Callable[[Tensor], Tensor], args: Any, kwargs: Any) -> Any:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
        return (change(args[0]), *args[1:]), kwargs

    def cut(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return replace(lambda hidden: hidden[:, :here], args, kwargs)

    def gather(module: nn.Module, args: Any, kwargs: Any) -> Any:
        over = partial(_over, rows=whole, ranks=ranks, group=_DENSE, gathers=True, even=even)
        return replace(lambda h: over(h.transpose(0, 1)).transpose(0, 1), args, kwargs)

    def scattered(linear: Any, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, linear.weight)
        y = _over(y.transpose(0, 1), here, ranks, _DENSE, gathers=False, even=even).transpose(0, 1)
        return y if linear.bias is None else y + linear.bias

    if is_first:
        layer.register_forward_pre_hook(cut, with_kwargs=True)
    layer.self_attn.register_forward_pre_hook(gather, with_kwargs=True)
    for part in parts:
        if part.role == "row":
            part.what.forward = partial(scattered, base_of(part.what))


class _Exchanged:
    """A dispatcher whose rows come from nowhere: as many as :class:`moesaic.parallel.dispatch.MeshDispatcher` has."""

    def __init__(self, load: Load, layout: MeshLayout, *, even: bool) -> None:
        self.load, self.ep, self.etp, self.even = load, layout.ep, layout.etp, even

    def dispatch(
        self, x: Tensor, routing: Routing, num_experts: int, meanwhile: partial[Tensor] | None = None
    ) -> Dispatched:
        load, K = self.load, routing.ids.shape[1]
        ranks_TQ = routing.ids[:, : min(K, self.ep)].contiguous()
        sent = sort_by_expert(ranks_TQ, self.ep)
        slots = sent.slots.new_empty(load.sent)
        sent = Permutation(slots, sent.positions, sent.group_sizes)
        x_SD, weights_SK = permute(x, sent), permute(routing.weights, sent)
        beside = None if meanwhile is None else meanwhile()
        x_ND, weights_NK = self._out(x_SD), self._out(weights_SK)
        ids_NK = routing.ids.new_empty(load.gathered, K, dtype=torch.int32)
        copies_C = routing.ids.new_empty(load.listed)
        return Dispatched(
            x_ND[None],
            ids_NK[None],
            weights_NK[None],
            sent,
            None if beside is None else lambda: beside,
            None,
            copies_C[None],
        )

    def combine(self, z: Tensor, dispatched: Dispatched) -> Tensor:
        z_MD = _over(z[0], self.load.received, self.etp, _EXPERTS, gathers=False, even=self.even)
        z_SD = z_MD if self.ep == 1 else _Moved.apply(z_MD, self.load.sent, 0, 0, _EXPERTS)
        return combine(z_SD, dispatched.record)

    def _out(self, rows: Tensor) -> Tensor:
        rows = rows if self.ep == 1 else _Moved.apply(rows, self.load.received, 0, 0, _EXPERTS)
        return _over(rows, self.load.gathered, self.etp, _EXPERTS, gathers=True, even=self.even)
