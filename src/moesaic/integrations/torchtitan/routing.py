"""torchtitan's router with the scores, choice and balance losses of :class:`moesaic.TopKRouter`.

The gate stays a linear layer of torchtitan under its own name, and so in its checkpoints, its tensor parallelism and
its optimizers. What follows the gate has no parameters and runs on this rank's tokens, as plain tensors.

Legend: B sequences, L tokens of a sequence that are here, T = B L, D model dim, E experts, K top-k.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import TokenChoiceTopKRouter
from torchtitan.protocols.module import Module

from moesaic.integrations.torchtitan.steps import ForwardsPerStep
from moesaic.integrations.torchtitan.unchecked import unchecked
from moesaic.layers.config import MoEConfig
from moesaic.layers.router import TopKRouter
from moesaic.ops.autocast import no_autocast
from moesaic.parallel.collectives import sum_over_ranks
from moesaic.parallel.sequence import sequence_slices


class Gate(Linear):
    """The logits in fp32, whatever the dtype of the tokens. (fp64 stays fp64. autocast to fp32 is for CUDA only.)"""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        pass

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        bias_E = None if self.bias is None else self.bias.to(dtype)
        with no_autocast(input.device.type):
            return F.linear(input.to(dtype), self.weight.to(dtype), bias_E)


class _Chooser(TopKRouter):
    """Our router, without its gate. torchtitan wants its own modules as children, so this is nobody's child."""

    def __init__(self, config: MoEConfig, *, force_balance: bool) -> None:
        super().__init__(config, device="meta")
        self.force_balance = force_balance

    def _choose(self, scores_TE: Tensor, bias_E: Tensor | None) -> Tensor:
        if not self.force_balance:
            return super()._choose(scores_TE, bias_E)
        T, (E, K) = scores_TE.shape[0], (self.config.num_experts, self.config.top_k)
        return (torch.arange(T * K, device=scores_TE.device) % E).view(T, K)


class Choice(Module):
    """What follows the gate: a ``local_map`` region without parameters.

    Attributes:
        token_mask: ``[B, L]``, False for padding, of all ranks that share these sequences by tensor parallelism; None
            if there is no padding.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        router: MoEConfig
        force_balance: bool = False
        forwards_per_step: int = 1

    def __init__(self, config: Config) -> None:
        super().__init__()
        chooser = _Chooser(config.router, force_balance=config.force_balance)
        chooser.loss_scale = 1 / config.forwards_per_step
        # In a tuple it is no child.
        self._held = (chooser,)
        has_losses = config.router.aux_loss_coef > 0 or config.router.z_loss_coef > 0
        self.count = ForwardsPerStep(config.forwards_per_step) if has_losses else None
        self.token_mask: Tensor | None = None
        self.knows_ranks = False
        self._part = (0, 1)

    @property
    def chooser(self) -> TopKRouter:
        return self._held[0]

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        # With expert parallelism torchtitan cuts sequences over tp, too. Without, all ranks of tp have the same tokens.
        is_cut = parallel_dims.ep > 1 and parallel_dims.tp > 1
        everyone, same_sequences = ["loss", *["tp"] * is_cut], ["cp", *["tp"] * is_cut]
        self.chooser.reduce_counts = _sum_over(parallel_dims, everyone)
        self.chooser.reduce_sequences = _sum_over(parallel_dims, same_sequences)
        self.chooser.sequence_parts = parallel_dims.cp * (parallel_dims.tp if is_cut else 1)
        if is_cut:
            self._part = parallel_dims.get_mesh("tp").get_local_rank(), parallel_dims.tp
        elif parallel_dims.tp > 1 and parallel_dims.spmd_backend == "spmd_types":
            # What all ranks of tp have alike gets the sum of their gradients there.
            assert isinstance(self.chooser.loss_scale, float)
            self.chooser.loss_scale /= parallel_dims.tp
        self.knows_ranks = True
        super().parallelize(parallel_dims)

    def look_for_ranks(self, weight: Tensor) -> None:
        """Without tensor and expert parallelism ``partial_dtensor`` lays out nothing. FSDP's mesh has the ranks then.

        Raises:
            ValueError: there is no such mesh, or it does not tell which ranks have parts of the same sequences.
        """
        if self.knows_ranks or self.count is None or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        if not isinstance(weight, DTensor):
            raise ValueError(
                "moe: balance losses are over all ranks, and this model was neither parallelized nor sharded"
            )
        if self.chooser.config.aux_loss_coef and self.chooser.config.aux_loss == "sequence":
            raise ValueError(
                "aux_loss: for 'sequence' a layer has to know which ranks have parts of a sequence, which "
                "spmd_backend 'partial_dtensor' tells it only with tensor or expert parallelism; take torchtitan's "
                "default, --parallelism.spmd_backend spmd_types, or aux_loss 'batch'"
            )
        mesh = weight.device_mesh
        self.chooser.reduce_counts = partial(_sum_over_groups, groups=[mesh.get_group(i) for i in range(mesh.ndim)])

    def train(self, mode: bool = True) -> "Choice":
        self.chooser.train(mode)
        return super().train(mode)

    def start(self, device: torch.device) -> None:
        """Set all counts to zero, on the device of the tokens."""
        self.chooser.load = torch.zeros(self.chooser.config.num_experts, dtype=torch.int64, device=device)
        if self.count is not None:
            # A buffer, for a pipeline puts those back after the passes by which it asks for shapes. Not earlier:
            # torchtitan would ask where it lies.
            self.register_buffer("forwards", self.count.start(device), persistent=False)

    def forward(self, logits_BLE: Tensor, expert_bias_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with unchecked():
            return self.choose(logits_BLE, expert_bias_E)

    def choose(self, logits_BLE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Routing weights ``[B, L, K]``, ids ``[B, L, K]``, -1 for padding, and how many tokens each expert gets."""
        B, L, E = logits_BLE.shape
        mask_T = self._mask(B, L)
        if self.chooser.load.is_meta:
            self.start(logits_BLE.device)
        # A pass without gradients is part of no step.
        if self.count is not None and self.training and torch.is_grad_enabled():
            self.count.one_more()
        # Not flatten: it cannot tell what is in a dim of size zero.
        with no_autocast(logits_BLE.device.type):
            ids_TK, weights_TK, *_ = self.chooser.route(logits_BLE.reshape(B * L, E), bias_E, mask_T, B)
        ids = ids_TK.flatten()
        # Floats, as torchtitan's own counters are.
        counts_E = logits_BLE.new_zeros(E, dtype=torch.float32)
        counts_E = counts_E.scatter_add(0, ids.clamp(min=0), (ids >= 0).to(torch.float32))
        K = ids_TK.shape[1]
        return weights_TK.view(B, L, K), ids_TK.view(B, L, K), counts_E

    def _mask(self, B: int, L: int) -> Tensor | None:
        if self.token_mask is None:
            return None
        rank, parts = self._part
        mask_BL = self.token_mask[:, sequence_slices(self.token_mask.shape[1], parts)[rank]]
        if mask_BL.shape != (B, L):
            raise ValueError(
                f"mask: {list(self.token_mask.shape)} does not fit the {B} sequences of {L * parts} tokens that the "
                "model was given; mask the tokens that this rank gives it"
            )
        return mask_BL.reshape(-1)


class UnbiasedChoice(Choice):
    """The same for models without the bias that balances the load, ``load_balance_coeff=None``."""

    @dataclass(kw_only=True, slots=True)
    class Config(Choice.Config):
        pass

    # torchtitan reads from the signature which tensors enter the region.
    def forward(self, logits_BLE: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyrefly: ignore [bad-override]
        with unchecked():
            return self.choose(logits_BLE, None)


class Router(TokenChoiceTopKRouter):
    """torchtitan's router: gate, then :class:`Choice`. It returns counts where torchtitan's returns all scores."""

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        choice: Choice.Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.choice = config.choice.build()

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self.choice.look_for_ranks(self.gate.weight)
        self.choice.start(self.gate.weight.device if buffer_device is None else buffer_device)

    def forward(self, x_BLD: Tensor, expert_bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        # For a gate of ours this is off. One with adapters of LoRA computes as it does in torchtitan.
        with torch.autocast(x_BLD.device.type, torch.float32, enabled=not isinstance(self.gate, Gate)):
            logits_BLE = self.gate(x_BLD)
        return self.choice(logits_BLE) if expert_bias_E is None else self.choice(logits_BLE, expert_bias_E)


def _sum_over(parallel_dims: ParallelDims, axes: list[str]) -> Callable[[Tensor], Tensor]:
    meshes = [parallel_dims.get_optional_mesh(axis) for axis in axes if _size(parallel_dims, axis) > 1]
    return partial(_sum_over_groups, groups=[mesh.get_group() for mesh in meshes if mesh is not None])


def _size(parallel_dims: ParallelDims, axis: str) -> int:
    if axis == "loss":
        return parallel_dims.dp_replicate * parallel_dims.dp_shard * parallel_dims.cp
    return getattr(parallel_dims, axis)


def _sum_over_groups(x: Tensor, groups: list[dist.ProcessGroup]) -> Tensor:
    for group in groups:
        x = sum_over_ranks(x, group)
    return x
