"""The sizes and choices that define a mixture-of-experts layer."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from moesaic.ops import ACTIVATIONS, Activation
from moesaic.ops.arguments import check_bool, check_int, check_number, nearest
from moesaic.ops.experts_mlp.activation import check_activation

Score = Literal["softmax", "sigmoid"]
AuxLoss = Literal["batch", "sequence"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sizes and choices of a :class:`moesaic.MoE` layer.

    Attributes:
        dim: D, the model dim.
        hidden_dim: F, the hidden dim of one expert.
        num_experts: E.
        top_k: K, the number of experts for each token.
        activation: one of ``moesaic.ops.ACTIVATIONS``, for the experts.
        gated: whether the experts and the shared expert have a gate, ``act(x w1) * (x w3)``. Without a gate they
            compute ``act(x w1)`` (Nemotron-H).
        score: how logits become scores. With ``"sigmoid"`` the score of an expert depends on its own logit only
            (DeepSeek-V3).
        normalize_top_k: divide the K chosen scores by their sum.
        normalize_eps: added to that sum. LFM2 has 1e-6.
        route_scale: factor on the routing weights, after normalisation.
        weigh_inputs: multiply the inputs of the experts by the routing weights, and not their outputs (Llama 4).
        num_groups, top_groups: group-limited routing (DeepSeek-V3). The experts form ``num_groups`` equal groups. The
            score of a group is the sum of its ``group_best`` best scores. A token chooses its experts from the
            ``top_groups`` groups with the highest scores.
        group_best: 2 in DeepSeek-V3, 1 in DeepSeek-V2.
        input_jitter: in training, multiply the layer's input by noise that is uniform in ``1 - input_jitter`` to
            ``1 + input_jitter`` (Mixtral's ``router_jitter_noise``). 0 for none.
        router_jitter: the same for what the router sees alone; the experts get the tokens as they are (Switch,
            Megatron-Core's ``moe_input_jitter_eps``).
        aux_loss_coef: coefficient of the load-balancing loss; 0 turns it off.
        aux_loss: what that loss balances. With ``"batch"`` it balances all tokens of a forward pass on all processes
            (:func:`moesaic.layers.balance.load_balancing_loss`). With ``"sequence"`` it is the mean of a loss for each
            sequence (:func:`moesaic.layers.sequence_balance.sequence_balance_loss`). The next to last dim of the
            layer's input is the sequence.
        z_loss_coef: coefficient of the router z-loss; 0 turns it off.
        bias_update_speed: step size of the bias that balances the load without an auxiliary loss. With 0 nothing
            moves the bias, and there is none unless ``score_bias`` is set.
        score_bias: have that bias even if ``bias_update_speed`` is 0.
        logit_bias: the router's logits have a bias, which is a parameter (gpt-oss).
        expert_biases: the experts' projections have biases, which are parameters (gpt-oss).
        shared_hidden_dim: hidden dim of the shared expert, an MLP that every token goes through; 0 for none.
        shared_activation: the activation of the shared expert; None takes that of the experts (Aria may have another).
        shared_gate: multiply the result of the shared expert by ``sigmoid(x g)``, one number for each token
            (Qwen2-MoE).

    Raises:
        TypeError: a value is not of its type, or there is no such field.
        ValueError: a value is out of range; the message says what is allowed.
    """

    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int
    activation: Activation = "silu"
    gated: bool = True
    score: Score = "softmax"
    normalize_top_k: bool = True
    normalize_eps: float = 1e-20
    route_scale: float = 1.0
    weigh_inputs: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_best: int = 2
    input_jitter: float = 0.0
    router_jitter: float = 0.0
    aux_loss_coef: float = 0.0
    aux_loss: AuxLoss = "batch"
    z_loss_coef: float = 0.0
    bias_update_speed: float = 0.0
    score_bias: bool = False
    logit_bias: bool = False
    expert_biases: bool = False
    shared_hidden_dim: int = 0
    shared_activation: Activation | None = None
    shared_gate: bool = False

    def __new__(cls, *_: Any, **values: Any) -> Any:
        # dataclass names the unknown key too, but not the nearest one.
        known = {f.name for f in fields(cls)}
        if unknown := next((name for name in values if name not in known), None):
            raise TypeError(f"{unknown}: MoEConfig has no such field; {nearest(unknown, sorted(known))}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        checks = {int: check_int, float: check_number, bool: check_bool}
        for f in fields(self):
            if (check := checks.get(f.type)) is not None:  # type: ignore[call-overload]
                check(f.name, getattr(self, f.name))
        for name in ("dim", "hidden_dim", "num_experts", "top_k", "num_groups", "top_groups", "group_best"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("aux_loss_coef", "z_loss_coef", "bias_update_speed", "shared_hidden_dim", "normalize_eps"):
            # A NaN is not at least 0 either.
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be at least 0, got {getattr(self, name)}")
        for name in ("input_jitter", "router_jitter"):
            # At 1 a token could become zero, and beyond that change its sign.
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 0 and less than 1, got {getattr(self, name)}")
        if not math.isfinite(self.route_scale):
            raise ValueError(f"route_scale: must be finite, got {self.route_scale}")
        choices_of = {"score": get_args(Score), "aux_loss": get_args(AuxLoss), "activation": ACTIVATIONS}
        if self.shared_activation is not None:
            choices_of |= {"shared_activation": ACTIVATIONS}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; choose one of {choices}")
        check_activation(self.activation, self.gated)
        if self.shared_activation is not None:
            check_activation(self.shared_activation, self.gated)
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_groups: {self.num_groups} does not divide num_experts ({self.num_experts})")
        if self.top_groups > self.num_groups:
            raise ValueError(f"top_groups: {self.top_groups} is more than num_groups ({self.num_groups})")
        for name in ("shared_gate", "shared_activation"):
            if getattr(self, name) and not self.shared_hidden_dim:
                raise ValueError(f"{name}: there is no shared expert to have it; set shared_hidden_dim")
        reachable = self.num_experts // self.num_groups * self.top_groups
        if self.top_k > reachable:
            raise ValueError(f"top_k: {self.top_k} is more than the {reachable} experts a token can choose from")
