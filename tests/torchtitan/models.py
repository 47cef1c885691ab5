"""torchtitan's debug models, with fewer layers and smaller experts, on tokens that are drawn: `--module` of the tests.

The tokenizer and the data of torchtitan's configs lie in its repository and not in its package.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel
from torchtitan.models.gpt_oss.config_registry import gpt_oss_debugmodel, gpt_oss_debugmodel_flex
from torchtitan.models.qwen3.config_registry import qwen3_moe_debug

from tests.torchtitan.case import BATCH

LAYERS, HIDDEN, LENGTH = 2, 48, 32


class Tokens(BaseDataLoader):
    """The same `BATCH` sequences a step for every layout; a rank gets its part of them."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        vocab: int = 0

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **_: object
    ) -> None:
        self.vocab, self.length, self.microbatch = config.vocab, seq_len, local_batch_size
        self.mine = range(BATCH * dp_rank // dp_world_size, BATCH * (dp_rank + 1) // dp_world_size, local_batch_size)
        self.step = 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        positions = torch.arange(self.length).repeat(self.microbatch, 1)
        while True:
            # Two batches in turn, so that a loss falls.
            seed = torch.Generator().manual_seed(self.step % 2)
            tokens = torch.randint(0, self.vocab, (BATCH, self.length + 1), generator=seed)
            self.step += 1
            for first in self.mine:
                part = tokens[first : first + self.microbatch]
                yield {"input": part[:, :-1].contiguous(), "positions": positions}, part[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: object) -> None:
        super().__init__()

    def encode(self, *_: object) -> list[int]:
        raise NotImplementedError

    def decode(self, *_: object) -> str:
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        raise NotImplementedError


def qwen3() -> Any:
    return _small(qwen3_moe_debug)


def qwen3_64() -> Any:
    """With its own 64 experts, 8 a token: what is sent depends on how many of them are on one rank."""
    return _small(qwen3_moe_debug, experts=64, top_k=8)


def deepseek_v3() -> Any:
    return _small(deepseek_v3_debugmodel)


def gpt_oss() -> Any:
    return _small(gpt_oss_debugmodel_flex)


def gpt_oss_varlen() -> Any:
    return _small(gpt_oss_debugmodel)


def deepseek_v3_muon() -> Any:
    """With DistMuon for the experts, laid out as in torchtitan's Kimi K2."""
    from torch.distributed.tensor import Shard
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
    from torchtitan.distributed.flex_shard import BucketConfig, ComputeLayout

    config = _small(deepseek_v3_debugmodel)
    muon = {"lr": 8e-4, "foreach": False, "adjust_lr_fn": "match_rms_adamw"}
    names = [f"layers.1.moe.routed_experts.inner_experts.{w}" for w in ("w1_EFD", "w2_EDF", "w3_EFD")]
    layout = ComputeLayout(shardings_by_mesh_axis=dict.fromkeys(("dp_shard", "efsdp", "ep"), Shard(0)))
    config.optimizer = OptimizersContainer.Config(
        implementation="foreach",
        param_groups=[
            ParamGroupConfig(pattern="inner_experts", optimizer_name="DistMuon", optimizer_kwargs=muon),
            ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 8e-4}),
        ],
        optimizer_factory_kwargs_by_name={
            "DistMuon": {
                "bucket_configs": (BucketConfig(name="experts", patterns=tuple(names)),),
                "compute_sharding_by_fqn": dict.fromkeys(names, layout),
            }
        },
    )
    return config


def _small(stock: Callable[[], Any], experts: int = 8, top_k: int = 2) -> Any:
    config = stock()
    model = config.model_spec.model
    model.layers = model.layers[:LAYERS]
    for layer in model.layers:
        if (moe := layer.moe) is not None:
            routed = moe.routed_experts
            for part in (moe, moe.router, routed.inner_experts, routed.token_dispatcher):
                part.num_experts = experts
            moe.router.gate.out_features = experts
            moe.router.top_k = routed.token_dispatcher.top_k = top_k
            routed.inner_experts.hidden_dim = HIDDEN
    for _, attention, _, _ in model.traverse(FlexAttention.Config):
        attention.block_size = LENGTH // 4  # context parallelism cuts sequences between blocks of a mask
    config.tokenizer = NoTokenizer.Config()
    config.dataloader = Tokens.Config(vocab=model.vocab_size)
    config.training = dataclasses.replace(
        config.training, seq_len=LENGTH, local_batch_size=BATCH, disable_cuda_graphs=True
    )
    return config
