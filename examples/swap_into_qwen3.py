"""Swap moesaic's layers into a Qwen3-MoE of transformers, take a training step, and write it back.

python examples/swap_into_qwen3.py
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moesaic
from moesaic.integrations.transformers import export_pretrained, swap_moe


def main() -> None:
    torch.manual_seed(0)
    # With a checkpoint at hand: AutoModelForCausalLM.from_pretrained("path/to/qwen3-moe").
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(256, (2, 33))
    before = model(input_ids=ids).logits

    swap_moe(model, aux_loss_coef=0.01)
    print(f"swapped in; logits moved by {(model(input_ids=ids).logits - before).abs().max():.1g}")

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(3):
        with moesaic.balance_losses() as balance:
            logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        (loss + sum(balance)).backward()
        moesaic.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}, balance {sum(balance).item():.4f}")

    with tempfile.TemporaryDirectory() as folder:
        export_pretrained(model, folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    difference = (loaded(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()
    print(f"written, and loaded by plain transformers; logits differ by {difference:.1g}")


if __name__ == "__main__":
    main()
