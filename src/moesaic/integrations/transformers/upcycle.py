"""Make a mixture-of-experts model from a dense one. It computes the same at first, and is then trained further.

Every expert is a copy of the dense feed-forward layer or, with granularity G, one of its G slices. G experts that make
up the whole layer are a *group*, and have equal rows in the router ("virtual groups", arXiv 2410.07524). So a token
that goes to one expert of a group goes to all G of them. Top-k is a multiple of G, and the routing weights sum to 1.
Then each expert of a chosen group has 1/G of the group's weight. The down projection is scaled by G to make up for it::

    sum over chosen groups g of p[g] * sum over slices s of (1/G) * (G * down[s] h[s])  =  sum of p[g] * dense  =  dense

Legend: E experts, K top-k, G granularity, D model dim, F hidden dim of the dense layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from moesaic.integrations.transformers.configs import damage_is_value_error
from moesaic.integrations.transformers.files import copy_tokenizer, open_files, require_new
from moesaic.integrations.transformers.lazy import Box, LazyTensor
from moesaic.integrations.transformers.loading import Source, empty_model
from moesaic.integrations.transformers.naming import to_model_names
from moesaic.integrations.transformers.progress import Progress
from moesaic.integrations.transformers.saving import to_file_names, write_pretrained

_COMMON = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


@dataclass(frozen=True)
class Target:
    """The mixture-of-experts family that a dense family becomes.

    Attributes:
        config: its config class.
        fields: fields of the dense config that it has too, beside the common ones.
        sizes: takes E, K and the hidden dim of an expert, and returns the rest of the config.
        off: settings of the dense config that it does not have, with the values that are allowed for them.
    """

    config: Callable[..., Any]
    fields: tuple[str, ...]
    sizes: Callable[[int, int, int], dict[str, Any]]
    off: dict[str, tuple[Any, ...]]


def _mixtral(E: int, K: int, F: int) -> dict[str, Any]:
    return {"num_local_experts": E, "num_experts_per_tok": K, "intermediate_size": F}


def _qwen3(E: int, K: int, F: int) -> dict[str, Any]:
    return {
        "num_experts": E,
        "num_experts_per_tok": K,
        "moe_intermediate_size": F,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2(E: int, K: int, F: int) -> dict[str, Any]:
    return _qwen3(E, K, F) | {"shared_expert_intermediate_size": F}


_NO_BIAS = {"attention_bias": (False, None), "mlp_bias": (False, None)}
TARGETS: dict[str, Target] = {
    "llama": Target(MixtralConfig, (), _mixtral, _NO_BIAS),
    "mistral": Target(MixtralConfig, ("sliding_window",), _mixtral, {}),
    "qwen2": Target(
        Qwen2MoeConfig, ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"), _qwen2, {}
    ),
    "qwen3": Target(Qwen3MoeConfig, ("attention_bias",), _qwen3, {"use_sliding_window": (False, None)}),
}


def upcycle(
    dense: str | Path,
    out: str | Path,
    *,
    experts: int,
    top_k: int,
    granularity: int = 1,
    noise: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Make a mixture-of-experts checkpoint from a dense one. Without noise both models give the same logits.

    Llama and Mistral become Mixtral, Qwen2 becomes Qwen2-MoE (with a shared expert that starts at zero), and Qwen3
    becomes Qwen3-MoE. This needs memory for one file of the result, at most 5 GB.

    If two groups have equal scores, a token may get a mix of both. Router rows are random, so this does not happen in
    fp32.

    Args:
        dense: a folder or a name on the hub.
        out: the folder to write.
        experts: E, of every layer.
        top_k: K.
        granularity: G; the hidden dim of an expert is F/G.
        noise: standard deviation of the noise on the experts' weights, as a fraction of the weights' own.
        seed: seed of the router's weights and the noise.
        progress: is called while the work goes on.

    Raises:
        ValueError: the numbers do not fit together, the model is not of these families, or it has a setting that its
            target family does not have.
        OSError: there is no such checkpoint, or ``out`` cannot be written.

    Example:
        >>> upcycle("path/to/Qwen3-0.6B", "out", experts=16, top_k=4, granularity=2)
    """
    check_numbers(experts, top_k, granularity, noise)
    require_new(dense, Path(out), "out")
    with open_files(dense) as files:
        source = empty_model(Source(dense), files)
        with damage_is_value_error(dense, vars(source.config)):
            target = _target(source.config)
            F = source.config.intermediate_size
            if F % granularity:
                raise ValueError(f"granularity: {granularity} does not divide the hidden dim {F} of the dense layers")
            config = _moe_config(source.config, target, experts, top_k, F // granularity)
            with torch.device("meta"):
                plain: Any = AutoModelForCausalLM.from_config(config, dtype=source.dtype, trust_remote_code=False)
            plain.config.architectures = [type(plain).__name__]
            plain.generation_config = source.generation_config
            state = to_model_names(source, files.tensors)
            recipe = _Recipe(experts, granularity, noise, seed, config.initializer_range, source.dtype)
            for layer in range(config.num_hidden_layers):
                recipe.apply(state, f"model.layers.{layer}.mlp", has_shared=target.config is Qwen2MoeConfig)
            _check_shapes(state, plain)
        tensors = (progress or Progress()).watch("writing", to_file_names(plain, state))
        write_pretrained(plain, tensors, out, add=lambda folder: copy_tokenizer(dense, folder))


def check_numbers(experts: int, top_k: int, granularity: int, noise: float) -> None:
    """Raise ``ValueError`` unless the numbers fit together. This does not depend on the model."""
    for name, value in {"experts": experts, "top_k": top_k, "granularity": granularity}.items():
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    if top_k > experts:
        raise ValueError(f"top_k: {top_k} is more than the {experts} experts")
    for name, value in {"experts": experts, "top_k": top_k}.items():
        if value % granularity:
            raise ValueError(
                f"{name}: {value} is not a multiple of granularity {granularity}; a token goes to whole groups"
            )
    if noise < 0:
        raise ValueError(f"noise: must be at least 0, got {noise}")


def _target(config: Any) -> Target:
    if config.model_type not in TARGETS:
        raise ValueError(f"dense: cannot upcycle the type '{config.model_type}'; use one of {', '.join(TARGETS)}")
    target = TARGETS[config.model_type]
    for name, allowed in target.off.items():
        if getattr(config, name, None) not in allowed:
            raise ValueError(f"dense: {name} is {getattr(config, name)}, but {target.config.__name__} has no {name}")
    return target


def _moe_config(dense: Any, target: Target, experts: int, top_k: int, hidden_dim: int) -> Any:
    names = (*_COMMON, *target.fields)
    taken = {name: getattr(dense, name) for name in names if hasattr(dense, name)}
    return target.config(**(taken | target.sizes(experts, top_k, hidden_dim)))


@dataclass(frozen=True)
class _Recipe:
    experts: int
    granularity: int
    noise: float
    seed: int
    router_std: float
    dtype: torch.dtype

    def apply(self, state: dict[str, LazyTensor], block: str, has_shared: bool) -> None:
        """Replace the tensors of a dense layer by those of an MoE layer."""
        G = self.granularity
        dense = {name: state.pop(f"{block}.{name}_proj.weight") for name in ("gate", "up", "down")}
        gates, ups = (dense[name].chunk(G, dim=0) for name in ("gate", "up"))
        downs = dense["down"].chunk(G, dim=1)
        firsts, seconds = [], []
        for e in range(self.experts):
            at = f"{block}.experts.{e}"
            first = [self._noisy(part[e % G], f"{at}.{name}") for name, part in {"gate": gates, "up": ups}.items()]
            firsts.append(torch.cat(first, dim=0))  # type: ignore[call-overload]
            seconds.append(self._noisy(_scaled(downs[e % G], G), f"{at}.down"))
        D = dense["gate"].shape[1]
        state[f"{block}.experts.gate_up_proj"] = torch.stack(firsts)  # type: ignore[assignment]
        state[f"{block}.experts.down_proj"] = torch.stack(seconds)  # type: ignore[assignment]
        state[f"{block}.gate.weight"] = _made([self.experts, D], self.dtype, lambda: self._router(D, block))
        if has_shared:
            # It adds nothing at first, but its down projection gets gradients.
            state[f"{block}.shared_expert.gate_proj.weight"] = gates[0]
            state[f"{block}.shared_expert.up_proj.weight"] = ups[0]
            state[f"{block}.shared_expert.down_proj.weight"] = _made(downs[0].shape, self.dtype)
            state[f"{block}.shared_expert_gate.weight"] = _made([1, D], self.dtype)

    def _router(self, dim: int, block: str) -> Tensor:
        rows = torch.randn(self.experts // self.granularity, dim, generator=self._generator(block))
        return (rows * self.router_std).repeat_interleave(self.granularity, dim=0)

    def _noisy(self, tensor: LazyTensor, name: str) -> LazyTensor:
        if not self.noise:
            return tensor

        def make() -> Tensor:
            weight = tensor.read().float()
            return weight + self.noise * weight.std() * torch.randn(weight.shape, generator=self._generator(name))

        return _made(tensor.shape, tensor.dtype, make)

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _made(shape: Any, dtype: torch.dtype, make: Callable[[], Tensor] | None = None) -> LazyTensor:
    """A tensor that is computed as a whole when a box of it is read; zeros by default."""

    def source(box: Box) -> Tensor:
        whole = torch.zeros(shape) if make is None else make()
        return whole[box].to(dtype)

    return LazyTensor(shape, dtype, source)


def _scaled(tensor: LazyTensor, factor: int) -> LazyTensor:
    return LazyTensor(tensor.shape, tensor.dtype, lambda box: tensor.read(box) * factor)


def _check_shapes(state: dict[str, LazyTensor], plain: Any) -> None:
    wanted = plain.state_dict()
    for name, tensor in state.items():
        if name in wanted and wanted[name].shape != tensor.shape:
            raise ValueError(f"'{name}' is {list(tensor.shape)} and not {list(wanted[name].shape)}; this is a bug")
