"""The loss of a parallelized transformers causal language model, from ``labels=``."""

import inspect
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moesaic.parallel.collectives import sum_over_ranks
from moesaic.parallel.mesh import Meshes

_WHOLE_SEQUENCE = ("logits_to_keep", "past_key_values")


def is_language_model(model: Any) -> bool:
    """Whether ``model`` is one of transformers that can make a loss of labels."""
    return hasattr(type(model), "loss_function")


def take_loss_over_all_ranks(model: Any, meshes: Meshes, all_ranks: dist.ProcessGroup) -> None:
    """Give ``model`` a :func:`causal_lm_loss`, and refuse arguments that would not mean what they say."""
    model.loss_function = partial(causal_lm_loss, meshes=meshes, group=all_ranks)
    check = partial(_check_arguments, signature=inspect.signature(model.forward), tp=meshes.tp_size)
    model.register_forward_pre_hook(check, with_kwargs=True)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    meshes: Meshes,
    group: dist.ProcessGroup,
    **_: Any,
) -> Tensor:
    """This rank's part of the mean cross-entropy of the next tokens: ``sum over its own of -log p / N``.

    The sum of the parts over all ranks is the mean loss of the whole batch, and the sum of their gradients is its
    gradient. Collective, one small all-reduce, unless ``num_items_in_batch`` is given.

    Args:
        logits: ``[B, s, vocab_size]``, of this rank's shard of the sequence.
        labels: ``[B, S]``, the dp rank's whole sequences, the same on every tp rank. The label of a position is the
            token after it: they are shifted here, before they are cut.
        num_items_in_batch: ``N``, the number of labels that count on all ranks, in all forward passes whose gradients
            are added; None for those of this one.
        ignore_index: the label that does not count.
        shift_labels: ``[B, S]`` in place of ``labels``, shifted already.

    Returns:
        A scalar, in fp32 at least; NaN where no label counts on any rank.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    mine = shift_labels[:, meshes.sequence_slice(shift_labels.shape[1])].flatten().to(logits.device)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(-1, vocab_size)
    loss = F.cross_entropy(wide, mine, ignore_index=ignore_index, reduction="sum")
    if num_items_in_batch is None:
        num_items_in_batch = sum_over_ranks((mine != ignore_index).sum(), group)
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def _check_arguments(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, signature: inspect.Signature, tp: int
) -> None:
    given = signature.bind(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    if tp > 1:
        for name in _WHOLE_SEQUENCE:
            value = given.get(name)
            if value is not None and not (isinstance(value, int) and value == 0):
                raise ValueError(
                    f"{name}: with tp > 1 a rank has the logits of its own part of the sequence only, "
                    "meshes.sequence_slice(S); leave it out, and take what you need from those"
                )
    labels = given.get("labels")
    if labels is None:
        return
    if model.loss_type != "ForCausalLM":
        raise ValueError(
            f"labels: only the loss of a causal language model is known over all ranks, not that of "
            f"{type(model).__name__}; leave labels out, and divide your own loss by the number of tokens of all ranks"
        )
    tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if tokens is not None and labels.shape != tokens.shape[:2]:
        raise ValueError(
            f"labels: expected {list(tokens.shape[:2])}, the whole sequences like input_ids, got {list(labels.shape)}"
        )
    positions = given.get("position_ids")
    if given.get("shift_labels") is None and positions is not None and (first := _first_of_a_part(positions)):
        raise ValueError(
            f"labels: position_ids begin at {first}, so this is a part of a sequence. Its last token would have no "
            "label, for labels are shifted within the part; shift the labels of the whole sequence, cut them, and give "
            "them as shift_labels too"
        )


def _first_of_a_part(positions: Tensor) -> int:
    """The first position of a row that begins in the middle of a sequence; 0 if there is none.

    Padding on the left has positions too, but they do not count up.
    """
    if positions.ndim != 2 or positions.numel() == 0:
        return 0
    first = positions[:, 0]
    begins_inside = first > 0
    if positions.shape[1] > 1:
        begins_inside &= positions[:, 1] == first + 1
    return int((first * begins_inside).max())
