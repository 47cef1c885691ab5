"""Tiny pretrained models with a tokenizer, and conversations, for tests of fine-tuning."""

import json
import random

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moesaic.train.tokenizer import train_bpe

MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</end>"
    "{% endgeneration %}{% else %}{{ m.content }}</end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# As some models have it: of answers that are not the last the thoughts are taken away.
CHANGING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if not loop.last and m.role == 'assistant' %}*{% endif %}</end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

COMMON = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 12, "norm_topk_prob": True},
    "deepseek_v3": {
        "moe_intermediate_size": 12,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


def conversation(chance: random.Random) -> dict:
    """The answer is the question's words in capitals."""
    messages = [{"role": "system", "content": "be loud"}]
    for _ in range(chance.randint(1, 2)):
        words = chance.choices(["one", "two", "three", "four", "five"], k=chance.randint(1, 3))
        messages += [
            {"role": "user", "content": " ".join(words)},
            {"role": "assistant", "content": " ".join(words).upper()},
        ]
    return {"messages": messages}


def write_chats(path, count=60, seed=0):
    """A .jsonl file of conversations."""
    chance = random.Random(seed)
    path.write_text("".join(json.dumps(conversation(chance)) + "\n" for _ in range(count)))
    return path


def tiny_tokenizer(template=PLAIN):
    chance = random.Random(1)
    texts = [json.dumps(conversation(chance)) for _ in range(50)]
    tokenizer = train_bpe(texts, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<system>", "<user>", "<assistant>", "</end>"]})
    tokenizer.chat_template = template
    return tokenizer


def write_model(folder, family, *, dtype=torch.float32, template=PLAIN, **changes):
    """A pretrained model, as `save_pretrained` leaves it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(COMMON | FAMILIES[family] | changes))
    tokenizer = tiny_tokenizer(template)
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    config.bos_token_id = None
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
