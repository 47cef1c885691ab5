"""Our layer on (ep 2, etp 2) against Megatron-Core's with the same sizes, weights and tokens, in fp32.

Of Megatron-Core this takes ``MoELayer`` with ``SequentialMLP`` experts and the all-gather dispatcher, which run on
gloo. What does not: the all-to-all dispatcher makes CUDA streams, and under expert tensor parallelism it gathers uneven
rows, which gloo refuses; ``GroupedMLP`` needs the CUDA package ``grouped_gemm`` and bf16; ``TEGroupedMLP`` needs
Transformer Engine, which needs CUDA.

``make test-references`` installs Megatron-Core and runs this.
"""

import copy
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moesaic
from tests.distributed.parity import assert_close, whole

if importlib.util.find_spec("megatron") is None:
    pytest.skip("megatron-core is not installed; `make test-references` does", allow_module_level=True)

TP = EP = ETP = 2
BATCH, LENGTH = 2, 12
CONFIGS = {
    "softmax": moesaic.MoEConfig(dim=16, hidden_dim=24, num_experts=8, top_k=3),
    "sigmoid, bias": moesaic.MoEConfig(
        dim=16, hidden_dim=24, num_experts=8, top_k=3, score="sigmoid", score_bias=True, route_scale=2.5
    ),
}


@pytest.mark.parametrize("routing", CONFIGS)
def test_experts_equal_those_of_megatron(ranks, routing):
    ranks(check, 4, routing)


def check(routing: str) -> None:
    meshes = moesaic.build_meshes(tp=TP, ep=EP, etp=ETP, device_type="cpu")
    one_process = make_moe(CONFIGS[routing])
    x, target = torch.randn(2, LENGTH, BATCH, 16).unbind()
    # A data-parallel rank has its own sequences, a tensor-parallel one its part of each: [S / tp, B / dp, D].
    mine = meshes.sequence_slice(LENGTH), slice(meshes.dp_rank, meshes.dp_rank + 1)
    ours = moesaic.parallelize(copy.deepcopy(one_process), meshes)
    with megatron_on_cpu():
        theirs = make_megatron(one_process, meshes)
        expected, expected_input_grad = run(lambda x: theirs(x)[0], x[mine], target[mine])
    result, input_grad = run(ours, x[mine], target[mine])

    assert_close("output", result, expected)
    assert_close("input gradient", input_grad, expected_input_grad)
    # What Megatron does at the end of its backward pass: the gate's gradient is summed over all ranks that have tokens.
    dist.all_reduce(gate_grad := theirs.router.weight.grad.clone())
    assert_close("gradient of the gate", whole(ours.router.weight.grad), gate_grad)
    w1, w3, w2 = (getattr(ours.experts, name).grad.to_local() for name in ("w1", "w3", "w2"))
    for i, expert in enumerate(theirs.experts.local_experts):
        gate_up = torch.cat([w1[i].mT, w3[i].mT])
        assert_close(f"gradient of fc1 of expert {i}", gate_up, expert.linear_fc1.weight.grad)
        assert_close(f"gradient of fc2 of expert {i}", w2[i].mT, expert.linear_fc2.weight.grad)


def run(layer: Any, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (y - target).square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def make_moe(config: moesaic.MoEConfig) -> moesaic.MoE:
    torch.manual_seed(0)
    moe = moesaic.MoE(config)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if moe.router.bias is not None:
        moe.router.bias[3] = -9.0  # an idle expert
    return moe


def make_megatron(moe: moesaic.MoE, meshes: moesaic.parallel.Meshes) -> Any:
    """Megatron-Core's layer of this rank, with the weights of ``moe``."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=TP, expert_model_parallel_size=EP, expert_tensor_parallel_size=ETP
    )
    coordinates = parallel_state.get_expert_model_parallel_rank(), parallel_state.get_expert_tensor_parallel_rank()
    ep, etp = (meshes.expert.get_local_rank(axis) for axis in ("ep", "etp"))
    assert coordinates == (ep, etp)
    assert parallel_state.get_data_parallel_rank() == meshes.dp_rank

    c = moe.config
    config = TransformerConfig(
        num_layers=1,
        num_attention_heads=4,
        hidden_size=c.dim,
        ffn_hidden_size=c.hidden_dim,
        moe_ffn_hidden_size=c.hidden_dim,
        num_moe_experts=c.num_experts,
        moe_router_topk=c.top_k,
        moe_router_score_function=c.score,
        moe_router_enable_expert_bias=c.score_bias,
        moe_router_topk_scaling_factor=c.route_scale,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        tensor_model_parallel_size=TP,
        expert_model_parallel_size=EP,
        expert_tensor_parallel_size=ETP,
        sequence_parallel=True,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    spec = get_moe_module_spec(use_te=False, num_experts=c.num_experts, moe_grouped_gemm=False)
    layer = MoELayer(config, spec.submodules)
    experts, hidden = c.num_experts // EP, c.hidden_dim // ETP
    columns = slice(etp * hidden, (etp + 1) * hidden)
    with torch.no_grad():
        layer.router.weight.copy_(moe.router.weight)
        if c.score_bias:
            layer.router.expert_bias.copy_(moe.router.bias)
        for i, expert in enumerate(layer.experts.local_experts, ep * experts):
            expert.linear_fc1.weight.copy_(torch.cat([w[i, :, columns].mT for w in (moe.experts.w1, moe.experts.w3)]))
            expert.linear_fc2.weight.copy_(moe.experts.w2[i, columns].mT)
    return layer


@contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Megatron-Core asks CUDA for its device, whatever device its tensors are on."""
    with (
        warnings.catch_warnings(),
        mock.patch("torch.cuda.current_device", return_value=torch.device("cpu")),
    ):
        warnings.simplefilter("ignore")
        from megatron.core.transformer.moe import moe_utils

        # Without Transformer Engine the gate looks for a name that only an import from there would define.
        with mock.patch.object(moe_utils, "te_general_gemm", None, create=True):
            yield
