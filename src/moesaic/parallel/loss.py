"""The loss of a parallelized transformers causal language model, from ``labels=``.

Every model in a module that takes labels gets it, whatever wraps the model.
"""

import inspect
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.parallel.collectives import sum_over_ranks
from moesaic.parallel.mesh import Meshes

_WHOLE_SEQUENCE = ("logits_to_keep", "past_key_values")


class LossOverRanks:
    """The ``loss_function`` of language models: :func:`causal_lm_loss` over the ranks of ``meshes``.

    It counts its calls, so that a forward pass that takes labels and does not ask it is not mistaken for one that does.
    """

    def __init__(self, meshes: Meshes, group: dist.ProcessGroup) -> None:
        self._meshes, self._group = meshes, group
        self._calls = 0
        self._calls_before: dict[nn.Module, int] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self._calls += 1
        return causal_lm_loss(*args, **kwargs, meshes=self._meshes, group=self._group)

    def take_over(self, model: Any) -> None:
        """Become the loss of a model, and refuse arguments that would not mean what they say."""
        # A function of the user's own stays where it is, and is refused beside labels.
        if "_loss_function" not in vars(model):
            model.loss_function = self
        check = partial(self._check, signature=inspect.signature(model.forward))
        model.register_forward_pre_hook(check, with_kwargs=True)
        model.register_forward_hook(self._check_was_asked)

    def _check(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, signature: inspect.Signature
    ) -> None:
        given = signature.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        _check_arguments(model, given, self._meshes)
        self._calls_before.pop(model, None)
        if given.get("labels") is None:
            return
        self._calls_before[model] = self._calls
        if model.loss_function is not self:
            raise ValueError(
                f"labels: {type(model).__name__} has a loss_function of its own, whose value is not known to be this "
                "rank's part of a mean over all ranks; leave labels out, and divide your own loss by the number of "
                "tokens of all ranks"
            )

    def _check_was_asked(self, model: Any, args: tuple[Any, ...], output: Any) -> None:
        if self._calls_before.get(model) == self._calls:
            raise ValueError(
                f"labels: the forward of {type(model).__name__} makes its loss without self.loss_function(), so it "
                "would be a mean over this rank alone; call self.loss_function(logits=, labels=, vocab_size=) there, "
                "or leave labels out, and divide your own loss by the number of tokens of all ranks"
            )


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    meshes: Meshes,
    group: dist.ProcessGroup | None,
    **_: Any,
) -> Tensor:
    """This rank's part of the mean cross-entropy of the next tokens: ``sum over its own of -log p / N``.

    The sum of the parts over all ranks is the mean loss of the whole batch, and the sum of their gradients is its
    gradient. Collective, one small all-reduce, unless ``num_items_in_batch`` is given.

    Args:
        logits: ``[B, s, vocab_size]``, of this rank's part of the sequence.
        labels: ``[B, S]``, the dp rank's whole sequences, the same on every cp and tp rank. The label of a position is
            the token after it: they are shifted here, before they are cut.
        num_items_in_batch: ``N``, the number of labels that count on all ranks, in all forward passes whose gradients
            are added; None for those of this one.
        group: the ranks over which labels are counted; None where ``num_items_in_batch`` says how many there are.
        ignore_index: the label that does not count.
        shift_labels: ``[B, S]`` in place of ``labels``, shifted already.

    Returns:
        A scalar, in fp32 at least; NaN where no label counts on any rank.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    mine = shift_labels[:, meshes.sequence_positions(shift_labels.shape[1])].flatten().to(logits.device)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(-1, vocab_size)
    loss = F.cross_entropy(wide, mine, ignore_index=ignore_index, reduction="sum")
    if num_items_in_batch is None:
        assert group is not None
        num_items_in_batch = sum_over_ranks((mine != ignore_index).sum(), group)
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def _check_arguments(model: Any, given: dict[str, Any], meshes: Meshes) -> None:
    if meshes.sequence_parts > 1:
        for name in _WHOLE_SEQUENCE:
            value = given.get(name)
            if value is not None and not (isinstance(value, int) and value == 0):
                raise ValueError(
                    f"{name}: with {' and '.join(meshes.sequence_axes)} > 1 a rank has the logits of its own part of "
                    "the sequence only, meshes.sequence_positions(S); leave it out, and take what you need from those"
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
