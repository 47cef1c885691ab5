"""Train a model over a mesh with transformers' own Trainer: tensor, expert and data parallel, on 4 processes.

torchrun --nproc-per-node 4 examples/train_on_a_mesh_with_trainer.py
"""

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Trainer, TrainingArguments

import moesaic
from moesaic.integrations.transformers import MeshTrainerMixin, swap_moe


class MeshTrainer(MeshTrainerMixin, Trainer):
    pass


def main() -> None:
    dist.init_process_group("gloo")
    meshes = moesaic.build_meshes(tp=2, ep=2, etp=2, device_type="cpu")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    torch.manual_seed(0)
    # With a checkpoint at hand: load_pretrained("path/to/model", meshes=meshes).
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(vocab_size=64, head_dim=16, **sizes, **experts))
    moesaic.parallelize(swap_moe(model), meshes)
    count_up = [torch.arange(start, start + 16) % 64 for start in range(64)]
    examples = [{"input_ids": ids, "labels": ids} for ids in count_up]
    settings = TrainingArguments(
        "runs/mesh", max_steps=4, learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no"
    )
    trainer = MeshTrainer(model, settings, meshes=meshes, train_dataset=examples)
    before, after = trainer.evaluate(examples[:8])["eval_loss"], trainer.train().training_loss
    if dist.get_rank() == 0:
        print(f"loss {before:.3f} before, {after:.3f} on average in 4 steps")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
