"""Train the stages of a pipeline with torch's schedules: a step gives the gradients of the whole batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moesaic.layers import attach_balance_losses
from moesaic.ops.arguments import check_int, divisors
from moesaic.parallel.gradients import is_summed_later, sum_now, summed_later
from moesaic.parallel.schedules import SCHEDULES, check_schedule
from moesaic.parallel.split import Stages

Loss = Callable[[Tensor, Tensor], Tensor]


@functools.cache
def stage_class() -> Any:
    """torch's class of a stage, whose gradients FSDP leaves unsummed within :func:`moesaic.parallel.no_sync`."""
    from torch.distributed.pipelining import PipelineStage  # large, for those who need it

    class _Stage(PipelineStage):
        def perform_reduce_grad(self, grad_scale_factor: int) -> None:
            # It turns FSDP's sums on and makes them. Without it FSDP goes on as between two microbatches.
            if not is_summed_later(self.submod):
                super().perform_reduce_grad(grad_scale_factor)

    return _Stage


class Pipeline:
    """The stages of this rank, with a schedule.

    Gradients are sums, over ranks as without stages, and over microbatches: divide the loss once, by the number of
    tokens of all ranks and all microbatches. Balance losses are means over the microbatches, each of which has its own,
    and are attached to the layers (:func:`moesaic.layers.attach_balance_losses`).

    Args:
        stages: from :func:`moesaic.parallel.split_into_stages`, parallelized.
        microbatches: into how many equal parts each call of :meth:`step` cuts its sequences.
        accumulate: how many calls of :meth:`step` there are before the optimizer's. Balance losses are then means over
            the microbatches of all of them. All but the last are within :func:`moesaic.parallel.no_sync`, and then
            gradients are summed over the ranks once.

    Raises:
        ValueError: the schedule does not take so many microbatches; ``accumulate`` is below 1.

    Example:
        >>> pipeline = Pipeline(stages, microbatches=8)
        >>> loss = pipeline.step(ids, targets, lambda logits, targets: cross_entropy_sum(logits, targets) / num_targets)
        >>> moesaic.clip_grad_norm_(stages.parameters(), 1.0, group=meshes.stages, counted_elsewhere=pipeline.copies())
    """

    def __init__(self, stages: Stages, microbatches: int, accumulate: int = 1) -> None:
        check_int("microbatches", microbatches)
        check_int("accumulate", accumulate)
        check_schedule(stages.options.schedule, stages.meshes.layout, stages.options.stages_per_rank, microbatches)
        self.stages, self.microbatches = stages, microbatches
        self._schedules: dict[tuple[int, ...], Any] = {}
        self._loss: Loss | None = None
        # What both ends had of a shared weight's gradient before the first pass whose own part only one of them has.
        self._before: Tensor | None = None
        self._is_apart = False
        attach_balance_losses(stages, 1 / (microbatches * accumulate))

    def step(
        self,
        input_ids: Tensor,
        targets: Tensor,
        loss: Loss,
        *,
        computing: Callable[[], AbstractContextManager[Any]] = nullcontext,
        **kwargs: Any,
    ) -> Tensor:
        """Forward and backward passes of all microbatches. Gradients are added to what parameters have.

        Collective over all stages: every rank gives the sequences of its data-parallel rank.

        Args:
            input_ids: ``[B, S]``.
            targets: ``[B, ...]``; ``loss`` gets the rows of a microbatch.
            loss: ``(logits, targets) -> scalar``, called on the last stage: a sum over a microbatch, divided by a
                number of all of them.
            computing: the context of forward passes, such as autocast.
            kwargs: what the model takes beside, with a first dim of B, or the same for all microbatches.

        Returns:
            The sum of the losses of this rank's microbatches, detached; 0 where the last stage is not.

        Raises:
            ValueError: B does not divide by the number of microbatches. Before anything is sent.
        """
        B = len(input_ids)
        if B % self.microbatches:
            raise ValueError(
                f"microbatches: {self.microbatches} does not divide the {B} sequences of this rank; choose from "
                f"{divisors(B)}"
            )
        for stage in self.stages.stages:
            stage.computing = computing
        schedule = self._schedule(input_ids)
        losses: list[Tensor] = []
        self._loss = loss
        shared = self._shared_weight()
        if shared is not None and not self._is_apart:
            # Both stages have the sum of what was there before, which is not to be added once more.
            self._before, shared.grad, self._is_apart = shared.grad, None, True
        try:
            first = [input_ids] if self.stages.stages[0].is_first else []
            last = {"target": targets} if self.stages.has_last else {}
            given = {name: value for name, value in kwargs.items() if value is not None}
            # Once for all microbatches. Where weights have backward passes of their own there is no hook, either.
            with summed_later(self.stages.parameters()):
                schedule.step(*first, **last, losses=losses, return_outputs=False, input_ids=input_ids, **given)
        finally:
            self._loss = None
            for stage in self.stages.stages:
                stage.computing = nullcontext
        is_later = is_summed_later(self.stages.stages[0])
        if not is_later:
            sum_now(self.stages.parameters())
        # Anew, for FSDP has put another parameter in its place.
        shared = self._shared_weight()
        if shared is not None and not is_later:
            self._add_shared_gradients(shared)
            if self._before is not None and shared.grad is not None:
                shared.grad += self._before
            self._before, self._is_apart = None, False
        return torch.stack(losses).detach().sum() if losses else torch.zeros((), device=input_ids.device)

    def copies(self) -> list[Tensor]:
        """Parameters that another stage has, too, and counts: for ``clip_grad_norm_(counted_elsewhere=)``."""
        head = self.stages.shared_weight(of_head=True)
        return [] if head is None else [head]

    def _schedule(self, input_ids: Tensor) -> Any:
        # A large import, for those who need it.
        from torch.distributed import pipelining

        shape = tuple(input_ids.shape)
        if shape not in self._schedules:
            stages, kind = self.stages, SCHEDULES[self.stages.options.schedule]
            ids = input_ids[: len(input_ids) // self.microbatches]
            hidden = stages.hidden_like(ids).requires_grad_()
            made = [
                stage_class()(
                    stage,
                    stage.number,
                    stage.count,
                    input_ids.device,
                    input_args=ids if stage.is_first else hidden,
                    # Of the logits nothing is sent, and no schedule asks how many there are.
                    output_args=hidden,
                    group=stages.meshes.stages,
                )
                for stage in stages.stages
            ]
            self._schedules[shape] = getattr(pipelining, kind.name)(
                made[0] if kind.stages_per_rank == 1 else made,
                self.microbatches,
                loss_fn=self._loss_of,
                scale_grads=False,
            )
        return self._schedules[shape]

    def _loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        assert self._loss is not None
        return self._loss(logits, targets)

    def _shared_weight(self) -> Tensor | None:
        """Of embedding and head that are one weight, the one that is here, unless it is frozen."""
        embedding, head = self.stages.shared_weight(), self.stages.shared_weight(of_head=True)
        shared = embedding if head is None else head
        return shared if shared is not None and shared.requires_grad else None

    @torch.no_grad()
    def _add_shared_gradients(self, weight: Tensor) -> None:
        """Give embedding and head that are one weight the sum of their gradients, on both stages in one order."""
        assert weight.grad is not None
        grad = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
        stages = self.stages
        last = stages.rank_of(stages.stages[0].count - 1)
        own, theirs = grad.contiguous(), torch.empty_like(grad, memory_format=torch.contiguous_format)
        ways = ((dist.isend, own), (dist.irecv, theirs))
        peer = 0 if stages.has_last else last
        ops = [dist.P2POp(how, t, group=stages.meshes.stages, group_peer=peer) for how, t in ways]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        first, second = (theirs, own) if stages.has_last else (own, theirs)
        grad.copy_(first + second)
