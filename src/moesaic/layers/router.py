"""Token-choice top-k routing.

Legend: T tokens, D model dim, E experts, K top-k.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moesaic.layers.balance import attach_loss, load_balancing_loss, record_loss, router_z_loss, without_padding
from moesaic.layers.config import MoEConfig
from moesaic.layers.gate import gate_logits
from moesaic.layers.initial import check_generators
from moesaic.layers.jitter import jittered
from moesaic.layers.lora import active_adapter
from moesaic.layers.recompute import count_once
from moesaic.layers.sequence_balance import sequence_balance_loss, sequence_counts
from moesaic.layers.steering import note, steer
from moesaic.ops.autocast import no_autocast
from moesaic.ops.invariant import batch_invariant_enabled, in_filled_rows


class Routing(NamedTuple):
    """Where tokens go: ``ids [T, K]`` int64 and ``weights [T, K]`` fp32 (fp64 for an fp64 input).

    Padding goes to no expert: its ids are -1 and its weights are 0. A router also returns the ``logits [T, E]``, in the
    dtype of the weights. ``keys [T, K]``, with a dropout of adapters, decide what is dropped.
    """

    ids: Tensor
    weights: Tensor
    logits: Tensor | None = None
    keys: Tensor | None = None


class TopKRouter(nn.Module):
    """Scores every token against every expert, and chooses the K best experts for each token.

    ``scores = softmax(x W^T + c)`` or ``sigmoid(x W^T + c)``, in fp32 for every dtype of ``x`` and under autocast too
    (fp64 stays fp64). ``ids = top-k of (scores + bias)``. ``weights = scores[ids]``, divided by their sum if
    ``normalize_top_k``, times ``route_scale``. The bias balances the load without an auxiliary loss (DeepSeek-V3,
    arXiv 2408.15664). It changes which experts are chosen, but never the weights.
    :func:`moesaic.layers.update_expert_bias` moves it.

    In training mode ``router_jitter`` multiplies ``x`` by noise first.

    Tokens with ``token_mask`` False are padding. They get no expert, and count in no loss and no load.

    In training mode every forward pass adds the tokens of each expert to the buffer ``load [E]``. Forward passes that
    activation checkpointing runs again do not count. If their coefficients are set, the load-balancing loss and the
    z-loss go to :func:`moesaic.layers.balance_losses`.

    Attributes:
        weight: ``[E, D]``.
        logit_bias: ``c``, ``[E]``, or None.
        bias: ``[E]`` fp32 buffer, or None if ``bias_update_speed`` is 0 and ``score_bias`` is not set.
        load: ``[E]`` int64 buffer. It counts this process's tokens for each expert since the last reset.
        loss_scale: factor of losses that are attached to the weights, see :func:`moesaic.layers.attach_balance_losses`.
            With None they go to :func:`moesaic.layers.balance_losses`.
        reduce_counts: sums a tensor of counts over all processes that hold tokens of this layer. By default it returns
            its argument; a parallel plan replaces it.
        reduce_sequences: does the same over the processes that hold parts of the same sequences. ``sequence_parts`` is
            the number of these processes.
        adapters, active_adapter: low-rank adapters of ``weight`` by name, and the name of the one that is used; both
            None if there are none: see :mod:`moesaic.layers.lora`.

    Example:
        >>> router = TopKRouter(MoEConfig(dim=64, hidden_dim=128, num_experts=8, top_k=2))
        >>> router(torch.randn(10, 64)).ids.shape
        torch.Size([10, 2])
    """

    if TYPE_CHECKING:
        __call__: Callable[..., Routing]

    logit_bias: nn.Parameter | None

    def __init__(self, config: MoEConfig, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.dim, device=device, dtype=dtype))
        logit_bias = torch.empty(config.num_experts, device=device, dtype=dtype)
        self.register_parameter("logit_bias", nn.Parameter(logit_bias) if config.logit_bias else None)
        has_bias = config.score_bias or config.bias_update_speed > 0
        bias = torch.zeros(config.num_experts, device=device) if has_bias else None
        self.register_buffer("bias", bias)
        load = torch.zeros(config.num_experts, dtype=torch.int64, device=device)
        self.register_buffer("load", load, persistent=False)
        self.loss_scale: float | Tensor | None = None
        self.reduce_counts: Callable[[Tensor], Tensor] = _identity
        self.reduce_sequences: Callable[[Tensor], Tensor] = _identity
        self.sequence_parts = 1
        self.adapters: nn.ModuleDict | None = None
        self.active_adapter: str | None = None
        self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TopKRouter":
        # The bias stays in fp32 under model.to(torch.bfloat16) and the like: half precision would lose its steps.
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None:
            moved = self.bias
            self.bias = (moved if bias.is_meta else bias).to(device=moved.device, dtype=torch.float32)
        return self

    init_std = 0.02
    """Standard deviation of new weights."""

    def reset_parameters(self) -> None:
        check_generators(self)
        nn.init.normal_(self.weight, std=self.init_std)
        if self.logit_bias is not None:
            nn.init.zeros_(self.logit_bias)
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    def forward(
        self,
        x: Float[Tensor, "T D"],
        token_mask: Bool[Tensor, " T"] | None = None,
        num_sequences: int = 1,
        keys: Int[Tensor, " T"] | None = None,
    ) -> Routing:
        """Route the tokens of ``x``. All sequences are equally long. Tokens with ``token_mask`` False are padding.

        ``keys`` decide what the dropout of an adapter drops; None drops nothing.
        """
        if self.training:
            x = jittered(x, self.config.router_jitter)
        gate_dtype = torch.promote_types(x.dtype, torch.float32)
        with no_autocast(x.device.type):
            logits_TE = gate_logits(x, self.weight, gate_dtype)
            if (adapter := active_adapter(self)) is not None:
                logits_TE = logits_TE + adapter(x, gate_dtype, keys)
            if self.logit_bias is not None:
                logits_TE = logits_TE + self.logit_bias.to(gate_dtype)
            return self.route(logits_TE, self.bias, token_mask, num_sequences)

    def route(
        self,
        logits: Float[Tensor, "T E"],
        bias: Float[Tensor, " E"] | None,
        token_mask: Bool[Tensor, " T"] | None,
        num_sequences: int,
    ) -> Routing:
        """What follows the gate, for routers that have gates of their own."""
        scores_TE = self._scores(logits)
        ids_TK = steer(self, self._choose(scores_TE.detach(), bias), logits)
        weights_TK = scores_TE.gather(1, ids_TK)
        if self.config.normalize_top_k:
            weights_TK = weights_TK / (weights_TK.sum(1, keepdim=True) + self.config.normalize_eps)
        weights_TK = without_padding(weights_TK * self.config.route_scale, token_mask)
        if token_mask is not None:
            ids_TK = ids_TK.masked_fill(~token_mask.unsqueeze(1), -1)
        note(self, ids_TK, weights_TK)
        if self.training:
            weights_TK = self._balance(logits, scores_TE, Routing(ids_TK, weights_TK), token_mask, num_sequences)
        return Routing(ids_TK, weights_TK, logits)

    def _scores(self, logits_TE: Tensor) -> Tensor:
        def scores(tensors: list[Tensor]) -> Tensor:
            return tensors[0].softmax(-1) if self.config.score == "softmax" else tensors[0].sigmoid()

        if batch_invariant_enabled():
            return in_filled_rows(scores, [logits_TE], float("-inf"))
        return scores([logits_TE])

    @torch.no_grad()
    def _choose(self, scores_TE: Tensor, bias_E: Tensor | None) -> Tensor:
        config = self.config
        if bias_E is not None:
            scores_TE = scores_TE + bias_E
        if config.num_groups > 1:
            groups_TGe = scores_TE.unflatten(1, (config.num_groups, -1))
            best_TG = groups_TGe.topk(min(config.group_best, groups_TGe.shape[2]), dim=2).values.sum(2)
            kept_TG = torch.zeros_like(best_TG, dtype=torch.bool)
            kept_TG = kept_TG.scatter(1, best_TG.topk(config.top_groups, dim=1).indices, True)
            scores_TE = groups_TGe.masked_fill(~kept_TG.unsqueeze(2), float("-inf")).flatten(1)
        return scores_TE.topk(config.top_k, dim=1).indices

    def _balance(
        self, logits_TE: Tensor, scores_TE: Tensor, routing: Routing, token_mask: Tensor | None, num_sequences: int
    ) -> Tensor:
        """Count tokens and record the losses. Returns the weights, which may carry gradients of the losses."""
        ids, weights_TK = routing.ids.flatten(), routing.weights
        counts_E = torch.zeros_like(self.load).scatter_add(0, ids.clamp(min=0), (ids >= 0).to(self.load.dtype))
        count_once(self.load, counts_E)
        config = self.config
        if not (config.aux_loss_coef or config.z_loss_coef):
            return weights_TK
        # A forward pass that runs again comes here too: it has to save the tensors that the first one saved.
        numbers, counts_BE = counts_E, None
        if config.aux_loss_coef and config.aux_loss == "sequence":
            best_BE = sequence_counts(scores_TE.detach(), config.top_k, num_sequences, token_mask)
            counts_BE = self.reduce_sequences(best_BE)
            numbers = torch.cat([counts_E, (counts_BE.sum(1) > 0).sum(0, keepdim=True)])
        total = self.reduce_counts(numbers)
        total_E = total[: config.num_experts]
        num_tokens = (total_E.sum() // config.top_k).clamp(min=1)
        if counts_BE is not None:
            sequences = (total[-1] // self.sequence_parts).clamp(min=1)
            loss = sequence_balance_loss(scores_TE, counts_BE, config.top_k, sequences, token_mask)
            weights_TK = self._hand_over(config.aux_loss_coef * loss, weights_TK)
        elif config.aux_loss_coef:
            loss = load_balancing_loss(scores_TE, total_E, num_tokens, token_mask)
            weights_TK = self._hand_over(config.aux_loss_coef * loss, weights_TK)
        if config.z_loss_coef:
            loss = router_z_loss(logits_TE, num_tokens, token_mask)
            weights_TK = self._hand_over(config.z_loss_coef * loss, weights_TK)
        return weights_TK

    def _hand_over(self, loss: Tensor, weights_TK: Tensor) -> Tensor:
        if self.loss_scale is None:
            return record_loss(loss, weights_TK)
        return attach_loss(loss, weights_TK, self.loss_scale)

    def extra_repr(self) -> str:
        c = self.config
        return f"dim={c.dim}, num_experts={c.num_experts}, top_k={c.top_k}, score={c.score}"


def _identity(counts: Tensor) -> Tensor:
    return counts
