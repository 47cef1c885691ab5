"""Long sequences cut over ranks by hand, context parallelism: 2 sequences, each on 2 ranks, against one process.

torchrun --standalone --nproc-per-node 4 examples/context_parallel.py

To parallelize(), the parts of a sequence are sequences of their own (dp). Three things make them parts of one:

1. Attention gathers keys and values, and masks what a query must not see.
2. position_ids count from the beginning of the whole sequence.
3. Labels are shifted before they are cut, and go in as shift_labels. The label of the last token of a part is the first
   token of the next part, which no shift within the part can know.

A sliding window needs a mask of its own, and linear attention cannot be cut so. MoEConfig(aux_loss="sequence") would
balance each part by itself.
"""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moesaic
from moesaic.integrations.transformers import swap_moe
from moesaic.parallel.collectives import all_gather_rows

PARTS, LENGTH, VOCAB = 2, 32, 101


def attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: object
) -> tuple[Tensor, None]:
    """Causal attention of this rank's queries, [B, heads, S / PARTS, d], to the keys of all parts."""
    sizes = [q.shape[2]] * PARTS
    k, v = (all_gather_rows(t.transpose(0, 2), sizes, parts).transpose(0, 2) for t in (k, v))
    first = dist.get_rank(parts) * q.shape[2]
    queries, keys = torch.arange(first, first + q.shape[2]), torch.arange(k.shape[2])
    seen = keys <= queries.unsqueeze(1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=module.scaling, enable_gqa=True)
    return y.transpose(1, 2).contiguous(), None


def make_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=VOCAB, head_dim=16, **sizes, **experts))


dist.init_process_group("gloo")
# Neighbouring ranks have the parts of one sequence.
groups = [dist.new_group(list(range(i, i + PARTS))) for i in range(0, dist.get_world_size(), PARTS)]
parts = groups[dist.get_rank() // PARTS]
AttentionInterface.register("parts", attend)

ids = torch.randint(VOCAB, (len(groups), LENGTH), generator=torch.Generator().manual_seed(1))
shift_labels = F.pad(ids, (0, 1), value=-100)[:, 1:]
reference = make_model()
expected = reference(input_ids=ids, labels=ids).loss
expected.backward()

model = swap_moe(copy.deepcopy(reference))
model.zero_grad()
model.set_attn_implementation("parts")
moesaic.parallelize(model, moesaic.build_meshes(ep=4, device_type="cpu"))

sequence, size = dist.get_rank() // PARTS, LENGTH // PARTS
start = dist.get_rank(parts) * size
mine = (slice(sequence, sequence + 1), slice(start, start + size))
loss = model(
    input_ids=ids[mine],
    position_ids=torch.arange(start, start + size).unsqueeze(0),
    labels=ids[mine],
    shift_labels=shift_labels[mine],
    use_cache=False,
).loss
loss.backward()

dist.all_reduce(total := loss.detach().clone())
torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=0)
worst = 0.0
for name, theirs in reference.named_parameters():
    if ".mlp." in name and "gate.weight" not in name:
        continue  # the experts have another layout here
    ours = model.get_parameter(name.replace("mlp.gate", "mlp.router")).grad
    ours = ours.full_tensor() if isinstance(ours, DTensor) else ours
    worst = max(worst, float((ours - theirs.grad).norm() / theirs.grad.norm()))
assert worst < 1e-4, worst
if dist.get_rank() == 0:
    print(f"loss {float(total):.6f}, one process {float(expected):.6f}; gradients differ by {worst:.0e}")
dist.destroy_process_group()
