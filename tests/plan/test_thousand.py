"""A thousand ranks, as one of them: meshes, the plan, and a step that is traced and sends nothing."""

import pytest
import torch
from benchmarks.fake_world import fake_world, laid_out
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.integrations.transformers import swap_moe
from moesaic.parallel.collectives import sent_bytes
from tests.plan.small import config


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # of fake tensors
# Of fake tensors the logits are a view, which they are not of others.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_a_step_of_one_of_1024_ranks():
    with fake_world(1024):
        meshes = moesaic.build_meshes(tp=4, ep=64, etp=2, dp_replicate=2, device_type="cpu")
        assert (meshes.layout.dp_shard, meshes.layout.edp) == (128, 8)
        with torch.device("meta"):
            sizes = {"num_experts": 128, "num_experts_per_tok": 4, "hidden_size": 128}
            model = swap_moe(AutoModelForCausalLM.from_config(config(**sizes)))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = laid_out(model, meshes, mode, compute="local", capacity=4)
        moe = model.get_submodule("model.layers.0.mlp")
        assert moe.experts.w1.to_local().shape == (1, 128, 8)  # 2 of 128 experts, over edp 8 one row of padding
        before = sent_bytes()
        with mode:
            ids = torch.zeros(1, 64, dtype=torch.int64)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert sent_bytes() > before
        # The last ranks of edp have padding alone.
        grads = [parameter.grad for parameter in model.parameters()]
        assert all(grad is not None for grad in grads)
