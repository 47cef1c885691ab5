"""What swap_moe accepts can be saved: classifiers, bare models, users' classes, adapters. Hooks on blocks stay."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from moesaic.integrations.transformers import export_pretrained, swap_moe, unswap_moe
from moesaic.layers import MoE
from moesaic.parallel import parallelize
from tests.distributed.parity import meshes_of
from tests.integrations.families import assert_close, make_model, token_ids
from tests.integrations.test_trainer import train


class Rewards(transformers.Qwen3MoePreTrainedModel):
    """A user's class, whose constructor takes more than a config."""

    def __init__(self, config: Any, width: int):
        super().__init__(config)
        self.model = transformers.Qwen3MoeModel(config)
        self.value = nn.Linear(config.hidden_size, width)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.value(self.model(input_ids=input_ids, **kwargs).last_hidden_state)


def rewards(config: Any) -> Rewards:
    return Rewards(config, width=3)


KINDS = [
    transformers.Qwen3MoeForSequenceClassification,
    transformers.Qwen3MoeForTokenClassification,
    transformers.Qwen3MoeModel,
    rewards,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_is_written_as_transformers_writes_it(tmp_path, kind):
    plain = kind(make_model("Qwen3-MoE").config)
    plain.save_pretrained(tmp_path / "plain")
    model = swap_moe(copy.deepcopy(plain))
    model.save_pretrained(tmp_path / "saved")
    export_pretrained(model, tmp_path / "exported")
    for folder in ("saved", "exported"):
        for file in (tmp_path / "plain").iterdir():
            assert (tmp_path / folder / file.name).read_bytes() == file.read_bytes(), (folder, file.name)


def write_parallel(folder: str) -> None:
    export_pretrained(parallelize(swap_moe(rewards(make_model("Qwen3-MoE").config)), meshes_of({"ep": 2})), folder)


def test_ranks_write_a_class_of_the_users(ranks, tmp_path):
    ranks(write_parallel, 2, str(tmp_path / "out"))
    plain = rewards(make_model("Qwen3-MoE").config)
    loaded = Rewards.from_pretrained(tmp_path / "out", width=3)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_names_are_tried_at_the_swap():
    model = make_model("Mixtral")
    model._weight_conversions = [object()]
    with pytest.raises(ValueError, match="cannot make the names of the files of MixtralForCausalLM.*AttributeError"):
        swap_moe(model)
    assert not any(isinstance(module, MoE) for module in model.modules())


# peft asks for an old name of a property of transformers.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
class TestAdapters:
    IDS = token_ids(2, 9)

    @staticmethod
    def config(**what: Any) -> Any:
        peft = pytest.importorskip("peft")
        return peft.LoraConfig(r=2, task_type="CAUSAL_LM", **({"target_modules": ["q_proj"]} | what))

    @staticmethod
    def drawn(model: Any) -> Any:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        return model

    def test_peft_around_a_swapped_model(self, tmp_path):
        peft = pytest.importorskip("peft")
        plain = make_model("Qwen3-MoE")
        model = self.drawn(peft.get_peft_model(copy.deepcopy(plain), self.config()))
        expected = model(input_ids=self.IDS).logits
        assert_close(swap_moe(model)(input_ids=self.IDS).logits, expected, "logits")
        train(model, tmp_path / "trained")
        expected = model.eval()(input_ids=self.IDS).logits
        # The files are peft's own, and go around plain models.
        again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "trained" / "final").eval()
        assert_close(again(input_ids=self.IDS).logits, expected, "logits")
        with pytest.raises(ValueError, match=r"PeftModelForCausalLM has adapters.*merge_and_unload"):
            export_pretrained(model, tmp_path / "out")
        with pytest.raises(ValueError, match=r"Qwen3MoeForCausalLM has adapters.*the PeftModel's save_pre"):
            model.base_model.model.save_pretrained(tmp_path / "out")

    @pytest.mark.parametrize("on_experts", [False, True])
    def test_adapters_that_transformers_adds(self, tmp_path, on_experts):
        def made() -> Any:
            return swap_moe(make_model("Qwen3-MoE"))

        model = made()
        layer = next(name for name, module in model.named_modules() if isinstance(module, MoE))
        experts = {"target_modules": [], "target_parameters": [f"{layer}.experts.w1", f"{layer}.experts.w2"]}
        model.add_adapter(self.config(**experts if on_experts else {}))
        self.drawn(model).save_pretrained(tmp_path)
        again = made()
        again.load_adapter(tmp_path)
        assert_close(again(input_ids=self.IDS).logits, model(input_ids=self.IDS).logits, "logits")

    def test_adapters_within_a_block_come_after_the_swap(self):
        peft = pytest.importorskip("peft")
        inside = self.config(target_modules=[], target_parameters=["experts.gate_up_proj"])
        with pytest.raises(ValueError, match=r"'.*mlp' \(Qwen3MoeSparseMoeBlock\): adapters wrap .* after swap_moe"):
            swap_moe(peft.get_peft_model(make_model("Qwen3-MoE"), inside))


def block_of(model: Any) -> Any:
    return model.model.layers[1].mlp


def test_hooks_on_a_block_stay():
    model, seen = make_model("Mixtral"), []

    def note(kind: str) -> Any:
        return lambda *args, **kwargs: seen.append(kind)

    block = block_of(model)
    handles = [
        block.register_forward_pre_hook(note("before")),
        block.register_forward_pre_hook(note("with keywords"), with_kwargs=True),
        block.register_forward_hook(note("after")),
        block.register_full_backward_pre_hook(note("backward begins")),
        block.register_full_backward_hook(note("backward")),
    ]
    plain = block.register_forward_hook(lambda module, args, output: output * 2)

    def passes() -> torch.Tensor:
        seen.clear()
        logits = model(input_ids=token_ids(2, 5)).logits
        logits.sum().backward()
        return logits.detach()

    expected, kinds = passes(), list(seen)
    assert len(kinds) == 5
    swap_moe(model)
    assert_close(passes(), expected, "logits")
    assert seen == kinds
    handles[0].remove()
    added = block_of(model).register_forward_hook(note("added"))
    unswap_moe(model)
    assert_close(passes(), expected, "logits")
    assert seen == [*kinds[1:3], "added", *kinds[3:]]
    for handle in (*handles, plain, added):
        handle.remove()
    passes()
    assert seen == []


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (lambda block: block.gate.register_forward_hook(print), r"'gate' has a hook \(forward_hooks\)"),
        (lambda block: block.experts.register_full_backward_hook(print), r"'experts' has a hook \(backward_hooks\)"),
        (
            lambda block: block.register_state_dict_post_hook(lambda *_: None),
            r"the block has a hook \(state_dict_hooks\)",
        ),
        (lambda block: setattr(block.experts, "forward", print), "'experts' has a forward that was set on this module"),
    ],
)
def test_hooks_that_the_layer_has_no_place_for_are_refused(put, message):
    model = make_model("Mixtral")
    put(block_of(model))
    with pytest.raises(ValueError, match=message):
        swap_moe(model)


def test_what_transformers_records_is_no_hook_of_the_users():
    model = make_model("Mixtral")
    model(input_ids=token_ids(1, 4), output_hidden_states=True)
    swap_moe(model)
