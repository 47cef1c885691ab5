"""Depth 1: `experts_implementation="moesaic"`."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import OpenAIPrivacyFilterExperts

from moesaic.integrations.transformers import register
from moesaic.integrations.transformers.experts import experts_forward
from tests.integrations.families import (
    FAMILIES,
    assert_close,
    assert_equal_results,
    make_model,
    results_of,
    token_ids,
)

register()
E, D, HIDDEN, K = 5, 32, 24, 3


@use_experts_implementation(has_bias=True)
class BiasedExperts(MixtralExperts):
    """Biases on both projections, and the gate of most: a combination that no model has yet."""

    def __init__(self, config):
        super().__init__(config)
        self.gate_up_proj_bias = nn.Parameter(torch.empty(self.num_experts, 2 * config.intermediate_size))
        self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        outputs = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            gate, up = F.linear(hidden_states, self.gate_up_proj[e], self.gate_up_proj_bias[e]).chunk(2, -1)
            y = F.linear(self.act_fn(gate) * up, self.down_proj[e], self.down_proj_bias[e])
            outputs = outputs + y * (top_k_weights * (top_k_index == e)).sum(-1, keepdim=True)
        return outputs


# All that the interface carries, by the class that needs it.
LAYOUTS = {
    "concatenated": MixtralExperts,
    "transposed": AriaExperts,
    "biases": BiasedExperts,
    "interleaved, transposed, biases, own gate": GptOssExperts,
    "transposed, biases, own gate": OpenAIPrivacyFilterExperts,
    "own gate": DeepseekV4Experts,
    "norm after the experts": MuseSparkExperts,
    "un-gated": NemotronHExperts,
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def make_experts(layout: str, implementation: str = "moesaic", **changes: object) -> nn.Module:
    """One experts module of transformers. A plain object is config enough: the classes read sizes from it."""
    values = {
        **dict.fromkeys(("num_local_experts", "n_routed_experts", "moe_num_experts"), E),
        **dict.fromkeys(("hidden_size", "moe_hidden_size"), D),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), HIDDEN),
        "moe_latent_size": None,
        "mlp_hidden_act": "relu2",
        "hidden_act": "silu",
        "post_norm_eps": 1e-6,
        "swiglu_alpha": 1.7,
        "swiglu_limit": 0.5,
        "_experts_implementation": implementation,
    }
    config = type("Config", (), values | changes)()
    experts = LAYOUTS[layout](config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.4, generator=torch.Generator().manual_seed(parameter.numel()))
    return experts


def make_inputs(num_tokens: int = 17) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(num_tokens, D, generator=generator, requires_grad=True)
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(num_tokens)] or [torch.empty(0)])
    weights = torch.rand(num_tokens, K, generator=generator, requires_grad=True)
    return x, ids.view(num_tokens, K).long(), weights


def run(experts: nn.Module, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """The result and every gradient of a module."""
    y = experts(x, ids, weights)
    leaves = {"x": x, "weights": weights, **dict(experts.named_parameters())}
    cotangent = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    return {"y": y} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), cotangent), strict=True))


SERVED = [family for family in FAMILIES if family != "Llama-4"]


@pytest.mark.parametrize("family", SERVED)
def test_a_model_computes_what_it_did(family):
    model = make_model(family)
    expected = results_of(model)
    model.set_experts_implementation("moesaic")
    assert_equal_results(results_of(model), expected)


@pytest.mark.parametrize(
    "name", ["doge:Doge", "jetmoe:JetMoe", "llama4:Llama4Text", "longcat_flash:LongcatFlash", "step3p7:Step3p7Text"]
)
def test_models_that_ignore_it_say_so(name):
    folder, stem = name.split(":")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    cls, size = getattr(module, f"{stem}Model"), {"num_hidden_layers": 1}
    remedy = r"swap_moe\(\) can replace them" if folder == "llama4" else "leave it out"
    with torch.device("meta"):
        with pytest.warns(UserWarning, match=f"the experts of transformers.models.{folder}.* do not ask .*; {remedy}"):
            model = cls(cls.config_class(**size, experts_implementation="moesaic"))
        assert not any(hasattr(part, "has_gate") for part in model.modules())
        with pytest.warns(UserWarning, match="experts_implementation: the experts of"):
            cls(cls.config_class(**size)).set_experts_implementation("moesaic")
        # Dense models have no experts, and others of transformers are none of our business.
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, experts_implementation="moesaic"))
        cls(cls.config_class(**size, experts_implementation="eager"))


@each_layout
def test_every_layout_computes_what_it_did(layout):
    expected = run(make_experts(layout, "eager"), *make_inputs())
    actual = run(make_experts(layout), *make_inputs())
    for name, value in expected.items():
        assert_close(actual[name], value, name)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "relu2", "mish", "tanh"])
@pytest.mark.parametrize("layout", ["concatenated", "un-gated"])
def test_activations(layout, name):
    of_config = {"hidden_act": name, "mlp_hidden_act": name}
    expected = run(make_experts(layout, "eager", **of_config), *make_inputs())
    with Calls() as calls:
        actual = run(make_experts(layout, **of_config), *make_inputs())
    assert ("experts_mlp" in calls.names) == (name not in ("mish", "tanh"))
    for tensor, value in expected.items():
        assert_close(actual[tensor], value, tensor)


@pytest.mark.parametrize(("alpha", "limit", "fused"), [(1.702, 7.0, True), (1.702, 6.0, False), (1.7, 7.0, False)])
def test_the_gate_of_gpt_oss(alpha, limit, fused):
    layout, options = "interleaved, transposed, biases, own gate", {"swiglu_alpha": alpha, "swiglu_limit": limit}
    x, ids, weights = make_inputs()
    inputs = (3 * x.detach()).requires_grad_(), ids, weights  # some of the pre-activations are beyond the limits
    expected = run(make_experts(layout, "eager", **options), *inputs)
    with Calls() as calls:
        actual = run(make_experts(layout, **options), *inputs)
    assert ("experts_mlp" in calls.names) == fused
    for tensor, value in expected.items():
        assert_close(actual[tensor], value, tensor)


class Calls(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


@each_layout
def test_bf16_is_no_less_accurate(layout):
    inputs = make_inputs()
    exact = make_experts(layout, "eager").bfloat16().double()
    x, weights = (t.detach().bfloat16().double().requires_grad_() for t in (inputs[0], inputs[2]))
    oracle = run(exact, x, inputs[1], weights)
    errors = {}
    for implementation in ("grouped_mm", "moesaic"):
        experts = make_experts(layout, implementation).bfloat16()
        half = [t.detach().bfloat16().requires_grad_() for t in (x, weights)]
        results = run(experts, half[0], inputs[1], half[1])
        errors[implementation] = {n: float((results[n].detach().double() - oracle[n].detach()).norm()) for n in oracle}
    for name, error in errors["moesaic"].items():
        assert error <= 1.5 * errors["grouped_mm"][name], name


@each_layout
def test_no_tokens(layout):
    results = run(make_experts(layout), *make_inputs(0))
    assert results["y"].shape == (0, D)
    assert all(not value.any() for value in results.values())


@each_layout
def test_experts_of_other_ranks(layout):
    """Ids from `num_experts` on are how transformers' expert parallelism marks them: there is no expert here."""
    x, ids, weights = make_inputs()
    away = ids >= E - 2
    experts = make_experts(layout)
    expected = run(experts, x, ids, weights.detach().masked_fill(away, 0).requires_grad_())
    here = copy.deepcopy(experts)
    here.num_experts, here._is_expert_parallel = E - 2, True
    for name, parameter in list(here.named_parameters()):
        if "." not in name:
            setattr(here, name, nn.Parameter(parameter[: E - 2].detach()))
    # Not finite: whatever a row of no expert meets must not be felt.
    actual = run(here, x, torch.where(away, E - 2, ids), torch.where(away, float("nan"), weights))
    for name, value in expected.items():
        value = value.masked_fill(away, 0) if name == "weights" else value
        of_experts = name in experts._parameters
        assert_close(actual[name], value[: E - 2] if of_experts else value, name)


def test_weights_are_not_copied(fresh_python):
    """A few tokens and experts of 100 MB, frozen: a copy of any weight would show, forward or backward."""
    for line in fresh_python(_PEAKS).stdout.splitlines():
        layout, megabytes = line.split(":")
        assert float(megabytes) < 15, layout


_PEAKS = """
import resource
import torch
from tests.integrations.test_experts import LAYOUTS, make_experts

sizes = {"hidden_size": 512, "moe_hidden_size": 512, "intermediate_size": 512, "moe_intermediate_size": 512}
counts = dict.fromkeys(("num_local_experts", "n_routed_experts", "moe_num_experts"), 32)
kept = []  # else the next layout would hide in what this one has freed
for layout in LAYOUTS:
    for size in ({}, sizes):  # the first call of a kind loads libraries
        experts = make_experts(layout, **counts, **size).requires_grad_(False)
        kept.append(experts)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        x = torch.randn(32, size.get("hidden_size", 32), requires_grad=True)
        experts(x, torch.arange(32).view(-1, 1), torch.ones(32, 1)).sum().backward()
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{layout}:{used / 1024}")
"""


@pytest.mark.parametrize("family", ["Mixtral", "gpt-oss"])
def test_from_pretrained(tmp_path, family):
    make_model(family).save_pretrained(tmp_path)
    register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moesaic")
    assert model.get_experts_implementation()[""] == "moesaic"
    expected = results_of(AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager"))
    assert_equal_results(results_of(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert "moesaic" not in (tmp_path / "again" / "config.json").read_text()


def test_registering_again_changes_nothing():
    register()
    assert ALL_EXPERTS_FUNCTIONS["moesaic"] is experts_forward
    assert sum(name == "moesaic" for name in ALL_EXPERTS_FUNCTIONS) == 1


@each_layout
def test_mixed_precision(layout):
    experts, inputs = make_experts(layout), make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        half = experts(*inputs)
    assert half.dtype == torch.float32
    error = (half - experts(*inputs)).abs().max() / experts(*inputs).abs().max()
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("mode", [{"do_sample": False}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_generation(mode):
    model = make_model("Qwen3-MoE")
    arguments = {"max_new_tokens": 8, "min_new_tokens": 8, **mode}
    expected = model.generate(token_ids(2, 5), **arguments)
    model.set_experts_implementation("moesaic")
    assert torch.equal(model.generate(token_ids(2, 5), **arguments), expected)


class Plain(nn.Module):
    """Experts that know nothing of the interface."""


@use_experts_implementation
class Renamed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(E, 2 * HIDDEN, D))


def test_modules_that_cannot_be_served_are_refused():
    inputs = make_inputs()
    with pytest.raises(TypeError, match="Plain does not follow transformers' experts interface; decorate its class"):
        experts_forward(Plain(), *inputs)
    with pytest.raises(TypeError, match="Renamed has no parameter 'gate_up_proj'; use another experts_implementation"):
        experts_forward(Renamed(transformers.MixtralConfig()), *inputs)
    quantized = make_experts("concatenated")
    quantized.down_proj = nn.Parameter(quantized.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match="'down_proj' of MixtralExperts is quantized, torch.float8_e4m3fn; use another"):
        quantized(*inputs)


def test_weights_that_are_dtensors_are_refused(ranks):
    ranks(_refuse_dtensors, 1)


def _refuse_dtensors() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    experts = make_experts("concatenated")
    mesh = init_device_mesh("cpu", (1,))
    experts.down_proj = nn.Parameter(distribute_tensor(experts.down_proj.detach(), mesh, [Shard(0)]))
    with pytest.raises(TypeError, match="'down_proj' of MixtralExperts is a DTensor"):
        experts(*make_inputs())
