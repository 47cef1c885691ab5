"""Qwen3-MoE of transformers, laid over ranks by hand: copies or FSDP2 over dp, experts and MLPs cut over tp; faults."""

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moesaic.testing import Check
from tests.testing.bare import CopyOver, SumOver, groups_of

BATCH, LENGTH, VOCAB, EXPERTS, COEF = 4, 6, 31, 4, 0.1


def build(dropout: float = 0.0) -> nn.Module:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=20,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        mlp_only_layers=[1],
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        attention_bias=True,
        attention_dropout=dropout,
        initializer_range=0.2,
        output_router_logits=True,
        router_aux_loss_coef=COEF,
        use_cache=False,
        attn_implementation="eager",
    )
    model = Qwen3MoeForCausalLM(config).train()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    return model


def inputs(rank, layout):
    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids[layout.rows(rank, BATCH)]}


def loss(model, batch):
    """Shares of the whole: sums over tokens, divided by the number of all; balance of each sequence by itself."""
    ids = batch["input_ids"]
    out = model(**batch, use_cache=False)
    main = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    probabilities = torch.stack([logits.softmax(-1) for logits in out.router_logits])
    return {"main": main / (BATCH * LENGTH), "balance": COEF * probabilities.square().sum() / (BATCH * LENGTH)}


@dataclass(frozen=True)
class Hand:
    fault: str = ""
    fsdp: bool = False

    def __call__(self, model, layout):
        groups, place = groups_of(layout), layout.place(dist.get_rank())
        dp = layout.views[0].get("dp", 1)
        if self.fault == "initialisation" and place.get("dp"):
            torch.manual_seed(7)
            nn.init.normal_(model.lm_head.weight)
        if layout.get("tp", 1) > 1:
            at, size, group = place["tp"], layout["tp"], groups["tp"]
            _cut_experts(model.model.layers[0].mlp.experts, size, at, group, self.fault)
            _cut_mlp(model.model.layers[1].mlp, size, at, group, self.fault)
            if self.fault == "shared counted":
                # Summed over tp once more.
                model.model.layers[1].mlp.register_forward_hook(lambda _m, _a, out: SumOver.apply(out, group))
            _cut_attention(model.model.layers[1].self_attn.o_proj, size, at, group, self.fault)
            if self.fault == "dropout":
                torch.manual_seed(at)
        model.fault, model.dp, model.groups = self.fault, dp, groups
        if self.fsdp and dp > 1:
            _shard(model, layout, self.fault)
            model.groups = {}
        return model


def _cut_experts(experts, size, at, group, fault):
    mine = slice(at * EXPERTS // size, (at + 1) * EXPERTS // size)
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[mine].detach().clone())
    experts.down_proj = nn.Parameter(experts.down_proj[mine].detach().clone())

    def forward(x, ids, weights):
        weights = weights if fault == "router" else CopyOver.apply(weights, group)
        x = CopyOver.apply(x, group)
        out = torch.zeros_like(x)
        for e, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
            gate, up = (x @ gate_up.T).chunk(2, -1)
            out = out + (weights * (ids == mine.start + e)).sum(-1, keepdim=True) * ((F.silu(gate) * up) @ down.T)
        return out if fault == "partial" else SumOver.apply(out, group)

    experts.forward = forward


def _cut_mlp(mlp, size, at, group, fault):
    hidden = len(mlp.gate_proj.weight)
    rows = slice(at * hidden // size, (at + 1) * hidden // size)
    for name in ("gate_proj", "up_proj"):
        linear = getattr(mlp, name)
        linear.weight = nn.Parameter(linear.weight[rows].detach().clone())
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, rows].detach().clone())
    plain = mlp.forward

    def forward(x):
        x = x if fault == "partial in backward" else CopyOver.apply(x, group)
        return SumOver.apply(plain(x), group)

    mlp.forward = forward


def _cut_attention(o_proj, size, at, group, fault):
    """A row-parallel output projection: each rank multiplies its columns."""
    columns = o_proj.weight.shape[1] // size
    mine = slice(at * columns, (at + 1) * columns)
    o_proj.weight = nn.Parameter(o_proj.weight[:, mine].detach().clone())

    def forward(x):
        y = CopyOver.apply(x, group)[..., mine] @ o_proj.weight.T
        if fault == "bias on every rank":
            return SumOver.apply(y + o_proj.bias, group)
        return SumOver.apply(y, group) + o_proj.bias

    o_proj.forward = forward


def _shard(model, layout, fault):
    mesh = init_device_mesh("cpu", (model.dp, layout.world // model.dp), mesh_dim_names=("dp", "rest"))["dp"]
    experts = model.model.layers[0].mlp.experts
    for module in (experts, *model.model.layers, model):
        fully_shard(module, mesh=mesh)
        if not (fault == "experts averaged" and module is experts):
            # Sums, as the loss is divided once; gloo knows no other way to say so.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def backward(model, batch, layout):
    terms = loss(model, batch)
    total = sum(terms.values())
    if model.fault == "loss times dp":
        total = total * model.dp
    if model.fault == "balance":
        total = terms["main"] + terms["balance"] * layout.get("tp", 1)
    total.backward()
    for name, p in model.named_parameters() if model.dp > 1 and model.groups else ():
        wrong = model.fault == "wrong group" and "experts" in name
        dist.all_reduce(p.grad, group=model.groups["tp" if wrong else "dp"])
        if model.fault == "experts averaged" and "experts" in name:
            p.grad /= model.dp
    return total.detach()


def clip(model, max_norm):
    """By what this rank holds."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def check(fault: str = "", layout: dict[str, int] | None = None, fsdp: bool = False) -> Check:
    return Check(
        build=functools.partial(build, 0.5) if fault == "dropout" else build,
        inputs=inputs,
        parallelize=Hand(fault, fsdp),
        layouts=[layout or {"tp": 2}],
        loss=loss,
        backward=backward,
        clip=clip if fault == "clip" else None,
    )
