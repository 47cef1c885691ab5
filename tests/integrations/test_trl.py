"""TRL on our experts: its SFTTrainer with one argument more, and its GRPOTrainer with the routing that it recorded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import moesaic
from moesaic.integrations.transformers import register, swap_moe
from tests.integrations.families import VOCAB, make_model
from tests.integrations.test_expert_parallel import load, whole
from tests.integrations.trainer_settings import COMPARED

trl = pytest.importorskip("trl", reason="an optional package")
# It takes five seconds to import, and a Trainer of ours is tested without it.
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),
]
datasets = pytest.importorskip("datasets")

WORDS = [f"w{i}" for i in range(VOCAB - 3)]
BATCH, STEPS = 4, 3
SETTINGS = {
    **COMPARED,
    "max_steps": STEPS,
    "bf16": False,
    "activation_checkpointing": False,
    # TRL asks for transformers' balance loss, which is of a rank's own tokens.
    "router_aux_loss_coef": 0.0,
}


def make_tokenizer() -> Any:
    words = {word: n for n, word in enumerate(["<pad>", "<bos>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def make_texts(count: int, length: int) -> list[str]:
    ids = torch.randint(9, (count, length), generator=torch.Generator().manual_seed(3))
    # Each of another length, so that batches have padding and ranks other numbers of labels.
    return [" ".join(WORDS[i] for i in row[: 3 + n % (length - 2)]) for n, row in enumerate(ids)]


def train(model: Any, folder: Path, sequences: int) -> list[float]:
    """The loss of each step of SFTTrainer."""
    settings = trl.SFTConfig(str(folder), per_device_train_batch_size=sequences, **SETTINGS)
    rows = datasets.Dataset.from_dict({"text": make_texts(STEPS * BATCH, 12)})
    trainer = trl.SFTTrainer(model, settings, train_dataset=rows, processing_class=make_tokenizer())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model("Qwen3-MoE").save_pretrained(folder)
    return folder


def test_supervised_tuning(saved, tmp_path):
    """On one process, at depths 1 and 2."""
    register()
    plain = AutoModelForCausalLM.from_pretrained(saved)
    expected = train(plain, tmp_path, BATCH)
    kernels = AutoModelForCausalLM.from_pretrained(saved, experts_implementation="moesaic")
    layers = swap_moe(AutoModelForCausalLM.from_pretrained(saved))
    assert expected[-1] < expected[0]
    assert train(kernels, tmp_path, BATCH) == pytest.approx(expected, rel=1e-4)
    assert train(layers, tmp_path, BATCH) == pytest.approx(expected, rel=1e-4)


def tuned(saved: Path, folder: Path, layout: dict[str, int]) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = load(saved, "moesaic", layout)
    losses = train(model, folder, BATCH // layout["fsdp_size"])
    return losses, {name: whole(parameter).detach() for name, parameter in model.named_parameters()}


def test_supervised_tuning_on_ranks(ranks, saved, tmp_path):
    """Under transformers' expert parallelism. All that changes is the argument of `from_pretrained`."""
    one = AutoModelForCausalLM.from_pretrained(saved)
    expected = train(one, tmp_path, BATCH)
    for losses, weights in ranks(tuned, 2, saved, tmp_path, {"fsdp_size": 2, "ep_size": 2}):
        assert losses == pytest.approx(expected, rel=1e-5)
        for name, parameter in one.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-4, atol=1e-5)


class Recording(trl.GRPOTrainer):
    """Keeps the routing of the forward pass that follows the drawing of completions, beside them in the batch."""

    def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> Any:
        with moesaic.routing.record() as self.recorded:
            return super()._get_per_token_logps_and_entropies(*args, **options)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)
        # TRL shuffles and cuts what is in the batch.
        batch["routed_experts"] = self.recorded.routed_experts().unflatten(0, (len(batch["prompt_ids"]), -1))
        return batch

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs)
        self.same.append(torch.equal(self.recorded.routed_experts(), inputs["routed_experts"].flatten(0, 1)))
        return loss


class Replaying(Recording):
    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        with moesaic.routing.replay(moesaic.routing.Record.from_routed_experts(inputs["routed_experts"])):
            return super()._compute_loss(model, inputs)


def prefer(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(word.endswith("1") for word in text.split())) for text in completions]


def policy_steps(kind: type, folder: Path, steps: int) -> tuple[list[bool], dict[str, torch.Tensor]]:
    """Steps with the same completions: after the first, the policy is another one than that which drew them."""
    torch.manual_seed(0)
    settings = trl.GRPOConfig(
        str(folder),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        num_iterations=3,
        beta=0.0,
        **{**SETTINGS, "max_steps": steps, "learning_rate": 0.1},
    )
    rows = datasets.Dataset.from_dict({"prompt": make_texts(4, 5)})
    model = swap_moe(make_model("Qwen3-MoE"))
    trainer = kind(model, prefer, settings, train_dataset=rows, processing_class=make_tokenizer())
    trainer.same = []
    trainer.train()
    return trainer.same, {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_policy_is_trained_on_the_routing_that_was_recorded(tmp_path):
    by_score, without = policy_steps(Recording, tmp_path, 1)
    same, with_replay = policy_steps(Replaying, tmp_path, 1)
    # The first step is that of the forward pass which was recorded: ids and gradients, and so the weights after it.
    assert by_score == same == [True]
    assert all(torch.equal(with_replay[name], weight) for name, weight in without.items())
    by_score, _ = policy_steps(Recording, tmp_path, 3)
    same, _ = policy_steps(Replaying, tmp_path, 3)
    # Then scores would send tokens elsewhere.
    assert by_score[0]
    assert not all(by_score)
    assert same == [True] * 3
