"""Train a model of transformers with its own Trainer: on moesaic's kernels, then with moesaic's layers.

python examples/train_with_trainer.py
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, Trainer, TrainingArguments

from moesaic.integrations.transformers import register, swap_moe


def main() -> None:
    register()
    config = OlmoeConfig(vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_experts=8)
    count_up = [torch.arange(start, start + 16) % 64 for start in range(64)]
    examples = [{"input_ids": ids, "labels": ids} for ids in count_up]
    for depth in (1, 2):
        torch.manual_seed(0)
        # With a checkpoint at hand: from_pretrained("path/to/model", experts_implementation="moesaic").
        model = AutoModelForCausalLM.from_config(config, experts_implementation="moesaic")
        if depth == 2:
            swap_moe(model)
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(folder, num_train_epochs=8, learning_rate=1e-2, report_to="none")
            trainer = Trainer(model, settings, train_dataset=examples)
            loss = trainer.train().training_loss
            trainer.save_model(folder)
            loaded = AutoModelForCausalLM.from_pretrained(folder)  # plain transformers, whatever the depth
        ids = loaded.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=5, do_sample=False)
        print(f"depth {depth}: loss {loss:.3f}; it goes on with {ids[0].tolist()}")


if __name__ == "__main__":
    main()
