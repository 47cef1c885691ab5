"""Fine-tune a model on conversations with the training program: first all weights, then low-rank adapters.

python examples/finetune_chat.py          # in a temporary folder
python examples/finetune_chat.py chats    # in this new folder, and longer; then ask the model:
moesaic generate chats/tuned "what comes after 7?" --chat

With a model of your own it is one line; several processes share its experts and its sequences:
torchrun --nproc-per-node 8 -m moesaic train --model path/to/model --data chats.jsonl --ep 8 --dtype bf16 --seq-len 2048
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from moesaic.cli import main
from moesaic.train.tokenizer import train_bpe

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ message.content }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def write_chats(path: Path) -> None:
    """Questions and their answers, one conversation a line."""
    chats = []
    for number in range(100):
        question = {"role": "user", "content": f"what comes after {number}?"}
        chats.append({"messages": [question, {"role": "assistant", "content": f"it is {number + 1}"}]})
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))


def write_model(folder: Path, chats: Path) -> None:
    """A stand-in for a model that somebody has trained: random weights, a tokenizer, a chat template."""
    tokenizer = train_bpe([chats.read_text()], 320)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = Qwen3MoeConfig(vocab_size=320, head_dim=16, eos_token_id=tokenizer.eos_token_id, **sizes, **experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def finetune(folder: Path, steps: int) -> None:
    write_chats(folder / "chats.jsonl")
    write_model(folder / "model", folder / "chats.jsonl")
    data = ["--data", str(folder / "chats.jsonl"), "--seq-len", "64", "--batch-size", "8", "--sample-tokens", "12"]
    tuned = str(folder / "tuned")
    weights = ["--model", str(folder / "model"), "--out", tuned, "--steps", str(steps), "--lr", "3e-3"]
    assert main(["train", *data, *weights]) == 0
    # What a run exports is a pretrained model like any other.
    if importlib.util.find_spec("peft") is not None:
        adapters = ["--lora-rank", "8", "--model", f"{tuned}/export", "--out", str(folder / "adapted"), "--steps", "20"]
        assert main(["train", *data, *adapters]) == 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir()
        finetune(Path(sys.argv[1]), steps=240)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            finetune(Path(temporary), steps=60)
