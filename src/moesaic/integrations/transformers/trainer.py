"""``Trainer`` for a model that :func:`moesaic.parallelize` has laid over meshes.

transformers' ``Trainer`` takes a rank's loss for a mean and averages over ranks. Here a rank's loss is its part of a
sum, and so are its gradients. The mixin takes that scale away, gives the ranks of a tp group the same sequences, clips
gradients over all meshes, and saves on all ranks together.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moesaic.integrations.transformers.saving import export_pretrained
from moesaic.parallel import Meshes, clip_grad_norm_
from moesaic.parallel.mesh import check_meshes

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

# What makes a loss of logits, or gathers them: with cp or tp > 1 a rank has those of its part of each sequence.
_WHOLE_LOGITS = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")


class MeshTrainerMixin(_Base):
    """Makes ``transformers.Trainer``, or a trainer made from it, fit for a parallelized model.

    With the loss of rank r ``l_r = sum over its own labels of -log p / N`` a step has the gradients of ``sum over r of
    l_r``. ``N`` is Trainer's ``num_items_in_batch``: the labels that count on all ranks, in all forward passes of the
    step. The loss that is logged is the sum over ranks, the mean over those labels. Evaluation is likewise.

    Each dp rank draws its own sequences, ``per_device_train_batch_size`` of them; the ranks of a tp group draw the
    same.
    ``save_model`` writes what plain transformers loads. As for all models that are sharded as they are loaded, Trainer
    saves no state of the optimizer: use ``save_strategy="no"``, or ``save_only_model=True``.

    Args:
        model: as :func:`moesaic.parallelize` returned it.
        args: ``TrainingArguments``.
        meshes: those that the model lies on.
        options: of the trainer.

    Raises:
        TypeError: ``meshes`` are none of ours.
        ValueError: the model is not parallelized, or an option that would not mean what it says. Before any collective.

    Example:
        >>> class MeshTrainer(MeshTrainerMixin, transformers.Trainer):
        ...     pass
        >>> model = moesaic.parallelize(swap_moe(model), meshes)
        >>> MeshTrainer(model, args, meshes=meshes, train_dataset=data).train()
    """

    model: Any

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, meshes: Meshes, **options: Any) -> None:
        check_meshes(meshes)
        _check(model, args, meshes, options)
        self.meshes = meshes
        # What transformers says of models that it shards itself: accelerate shall not wrap this one, or move it.
        _language_model(model)._is_distributed_loading_by_transformers = True
        super().__init__(model, args, *rest, **options)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if not self.meshes.is_distributed:
            return
        if not hasattr(self.accelerator, "_prepare_device_mesh"):
            raise ImportError("MeshTrainerMixin: this accelerate gives every rank other sequences; 1.1 to 1.15 do not")
        # Its loaders read from the axes dp_replicate, dp_shard, cp and tp who has which sequences.
        vars(self.accelerator)["_prepare_device_mesh"] = lambda: self.meshes.dense

    def get_tp_size(self) -> int:
        return self.meshes.tp_size

    def get_cp_size(self) -> int:
        return self.meshes.cp_size

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if num_items_in_batch is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            # Trainer has multiplied by this, for an average over ranks to come.
            loss = loss / (self.accelerator.num_processes // self.get_tp_size())
        if not self.model.training:
            loss = loss * self.accelerator.num_processes  # of which the mean over ranks is taken
        return (loss, result[1]) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        # What is logged is a mean over ranks. The backward pass has been.
        return super().training_step(*args, **kwargs) * self.accelerator.num_processes

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        wrapped = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for module in wrapped:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in wrapped:
                module.set_requires_gradient_sync(True, recurse=False)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        return clip_grad_norm_(model.parameters(), float("inf")) if grad_norm is None else grad_norm

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the model under transformers' names. Collective: every rank calls it."""
        folder = Path(output_dir or self.args.output_dir or ".")
        # A folder of its own first, for there may be checkpoints and logs beside it.
        written = folder / ".export"
        export_pretrained(self.model, written)
        if self.args.process_index == 0:
            for file in written.iterdir():
                os.replace(file, folder / file.name)
            shutil.rmtree(written)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(str(folder))
            torch.save(self.args, folder / "training_args.bin")
        if self.meshes.is_distributed:
            dist.barrier()


def _language_model(model: Any) -> Any:
    """The model of transformers inside one of peft."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check(model: Any, args: Any, meshes: Meshes, options: dict[str, Any]) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a model that moesaic.parallelize has returned, got {type(model).__name__}")
    if args is None:
        raise ValueError("args: expected TrainingArguments, got None")
    if not args.average_tokens_across_devices and meshes.is_distributed:
        raise ValueError(
            "average_tokens_across_devices: must be True, for a rank's loss is divided by the labels of all ranks"
        )
    for name in ("fsdp", "deepspeed", "parallelism_config"):
        if getattr(args, name, None):
            raise ValueError(f"{name}: must not be set, for moesaic.parallelize has sharded the model")
    if meshes.sequence_parts > 1:
        given = [name for name in _WHOLE_LOGITS if options.get(name) is not None]
        if args.label_smoothing_factor:
            given.append("label_smoothing_factor")
        if given:
            raise ValueError(
                f"{given[0]}: it wants the logits of whole sequences, and with "
                f"{' and '.join(f'{axis} {getattr(meshes.layout, axis)}' for axis in meshes.sequence_axes)} a rank has "
                f"those of its part; leave it out, or use {' and '.join(f'{a}=1' for a in meshes.sequence_axes)}"
            )
    if meshes.is_distributed and not all(isinstance(p, DTensor) for p in model.parameters()):
        raise ValueError(
            f"model: {type(model).__name__} has parameters that lie on no mesh; call "
            "moesaic.parallelize(model, meshes) on the finished model"
        )
