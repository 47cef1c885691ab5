"""One training step: loss and gradients as sums over ranks, a check that all is finite, then the update.

The loss of a rank is the sum over its own target tokens divided by the number of target tokens of all ranks. So losses
and gradients add up over ranks to those of the whole batch, and nothing else is scaled. It is the same for a batch in
several passes. Only balance losses are then divided by the number of passes, for each is a mean over the tokens of one.

Legend: B sequences of this rank, S positions, s positions of this rank's part of the sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from moesaic import ranks
from moesaic.layers import balance_losses
from moesaic.parallel.accumulate import no_sync
from moesaic.parallel.capacity import most_copies
from moesaic.parallel.gradients import clip_grad_norm_
from moesaic.parallel.mesh import Meshes
from moesaic.parallel.pipeline import Pipeline
from moesaic.parallel.split import Stages
from moesaic.train.config import TrainConfig
from moesaic.train.errors import TrainingError
from moesaic.train.guard import ForwardGuard, first_bad_gradient, first_flagged
from moesaic.train.loader import IGNORED, Batch
from moesaic.train.optimizer import set_learning_rates
from moesaic.train.pipelining import passes
from moesaic.train.training import Training


@dataclass(frozen=True)
class StepResult:
    """What a step came to, the same on all ranks."""

    loss: float
    """Mean cross-entropy of the whole batch, in nats."""
    balance_loss: float
    """The load-balancing and z-losses that were added to it; 0 where compiled stages do not tell theirs."""
    grad_norm: float
    """Of all gradients, before clipping."""
    stop: bool
    """Whether any rank has been asked to stop."""


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """The context to compute in, for a dtype of the config."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and in eval mode; afterwards the model is as before."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        # FSDP leaves the outermost module whole, for a backward pass that does not come. A checkpoint would then meet
        # other parameters than the optimizer has.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def forward(model: Any, batch: Batch) -> Tensor | None:
    """The logits `[B, s, V]` of this rank's part of the sequences; None on other ranks than those of the last stage."""
    # Without positions of its own a model has them, and its causal mask, from a cheaper place.
    given: dict[str, Any] = {} if batch.positions is None else {"position_ids": batch.positions}
    # Not as an attention mask, with which the model would not look at positions: the padding of a row is seen by none.
    given |= {} if batch.mask is None else {"token_mask": batch.mask}
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        # What they are for comes from balance_losses().
        given["output_router_logits"] = False
    if isinstance(model, Stages):
        return model(batch.inputs, **given)
    return model(input_ids=batch.inputs, use_cache=False, **given).logits


def whole_logits(model: Any, tokens_BS: Tensor, **given: Tensor) -> Tensor:
    """The logits `[B, s, V]` of this rank's part of some sequences, on all ranks, to evaluate. Collective."""
    if isinstance(model, Stages):
        logits = model(tokens_BS, everywhere=True, **given)
        assert logits is not None
        return logits
    return model(input_ids=tokens_BS, use_cache=False, **given).logits


def sum_of_losses(logits_BsV: Tensor, targets_Bs: Tensor) -> Tensor:
    """The cross-entropies of all targets, in nats, added up."""
    return F.cross_entropy(
        logits_BsV.flatten(0, 1).float(), targets_Bs.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def train_step(
    training: Training,
    config: TrainConfig,
    *,
    meshes: Meshes,
    guard: ForwardGuard,
    device: torch.device,
    stop_wanted: bool = False,
) -> StepResult:
    """Train on the next batch. Collective.

    Raises `TrainingError` on every rank, before any weight has changed, if loss or gradients are not finite on one.
    A step that fails has taken nothing from the data.
    """
    sample = training.loader.sample
    try:
        return _train_step(training, config, meshes, guard, device, stop_wanted)
    except BaseException:
        if training.whole:
            training.loader.sample = sample
        raise


def _train_step(
    training: Training,
    config: TrainConfig,
    meshes: Meshes,
    guard: ForwardGuard,
    device: torch.device,
    stop_wanted: bool,
) -> StepResult:
    model, optimizer, step = training.model, training.optimizer, training.step + 1
    set_learning_rates(optimizer, training.step, config)
    # Random numbers depend on seed, step and rank only. So a resumed run has the same without saving any state.
    seed = np.random.SeedSequence([config.seed, training.step, ranks.rank()]).generate_state(1, np.uint64)
    torch.manual_seed(int(seed[0]))
    batch = training.loader.next_batch().to(device)
    guard.reset()
    losses = torch.zeros(2, device=device)
    for number, part in enumerate(batch.split(config.accumulate), start=1):
        # Gradients of all passes are summed over ranks in the last.
        with nullcontext() if number == config.accumulate else no_sync(model):
            if training.pipeline is None:
                losses += _pass(model, part, config, meshes, device)
            else:
                losses += _pipelined(training.pipeline, part, config, meshes, device)
    if training.main_grads is not None:
        training.main_grads.give()

    # The one exchange of a step that the host waits for, so it carries everything that ranks must agree on.
    own = torch.cat([losses, losses.new_tensor([float(stop_wanted)])])
    shared = torch.cat([own, guard.flags > 0]).double()
    if ranks.active():
        dist.all_reduce(shared)
    loss_value, balance_value, stop, *flags = shared.tolist()
    if not (_finite(loss_value) and _finite(balance_value)) or any(flags):
        if config.capacity is not None and (most := most_copies(model, meshes)) > config.capacity:
            raise TrainingError(
                f"step {step}: {most} copies of tokens were routed from one process to the experts of another, and "
                f"--capacity has room for {config.capacity}; give at least {most}. No weight has been changed."
            )
        raise TrainingError(_describe_forward(step, loss_value, balance_value, guard.names, flags))

    grad_norm = _clip(training, config.max_grad_norm, step)
    training.whole = False
    optimizer.step()
    training.step, training.whole = step, True
    optimizer.zero_grad(set_to_none=True)
    if training.main_grads is not None:
        training.main_grads.clear()
    return StepResult(loss_value, balance_value, grad_norm, bool(stop))


def _pass(model: nn.Module, batch: Batch, config: TrainConfig, meshes: Meshes, device: torch.device) -> Tensor:
    """Forward and backward pass of a part of a batch. This rank's parts of the batch's losses, main and balance."""
    with autocast(device, config.dtype), balance_losses() as balance:
        logits_BsV = forward(model, batch)
    assert logits_BsV is not None
    targets_Bs = batch.targets[:, meshes.sequence_positions(batch.targets.shape[1])]
    loss = sum_of_losses(logits_BsV, targets_Bs) / batch.num_targets
    # Each is a mean over the tokens of one pass.
    balance_loss = torch.stack(balance).sum() / config.accumulate if balance else loss.new_zeros(())
    (loss + balance_loss).backward()
    return torch.stack([loss.detach(), balance_loss.detach()])


def _pipelined(pipeline: Pipeline, batch: Batch, config: TrainConfig, meshes: Meshes, device: torch.device) -> Tensor:
    """The same over all stages, in microbatches. What is here of the batch's losses, main and balance."""
    targets_Bs = batch.targets[:, meshes.sequence_positions(batch.targets.shape[1])]
    with balance_losses() as balance:
        loss = pipeline.step(
            batch.inputs,
            targets_Bs,
            lambda logits_BsV, targets_Bs: sum_of_losses(logits_BsV, targets_Bs) / batch.num_targets,
            computing=lambda: autocast(device, config.dtype),
            position_ids=batch.positions,
            token_mask=batch.mask,
        )
    balance_loss = torch.stack(balance).sum() / passes(config) if balance else loss.new_zeros(())
    return torch.stack([loss, balance_loss.detach()])


def _clip(training: Training, max_grad_norm: float, step: int) -> float:
    model, pipeline = training.model, training.pipeline
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    try:
        # Raises before it scales anything, so the gradients can still be looked at.
        norm = clip_grad_norm_(
            parameters,
            max_grad_norm or float("inf"),
            error_if_nonfinite=True,
            group=None if pipeline is None else pipeline.stages.meshes.stages,
            counted_elsewhere=() if pipeline is None else pipeline.copies(),
        )
    except RuntimeError:
        name = first_bad_gradient(model)
        if name is None:
            raise TrainingError(
                f"step {step}: all gradients are finite, but their norm is more than fp32 can hold. No weight has been "
                "changed."
            ) from None
        raise TrainingError(
            f"step {step}: non-finite gradient: the loss is finite, but the gradient of {name} is not. It is "
            f"the first such parameter in backward order. No weight has been changed."
        ) from None
    return float(norm)


def _describe_forward(step: int, loss: float, balance_loss: float, names: Sequence[str], flags: Sequence[float]) -> str:
    layer = first_flagged(names, flags)
    if layer is not None:
        count = int(flags[names.index(layer)])
        where = f"the first output that is not finite is that of {layer}, on {count} of {ranks.world_size()} rank(s)"
    elif not _finite(balance_loss):
        where = "every layer's output is finite, but a router's balance loss is not"
    else:
        where = "every layer's output is finite"
    return f"step {step}: the loss is non-finite: {loss + balance_loss}; {where}. No weight has been changed."


def _finite(value: float) -> bool:
    return abs(value) < float("inf")
