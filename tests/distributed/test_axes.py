"""All axes together: losses, gradients, norms, and weights after three steps, over a covering design of layouts."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import moesaic
from moesaic.integrations.transformers import swap_moe
from moesaic.layers import attach_balance_losses
from moesaic.parallel import build_meshes, resolve_layout, split_into_stages
from moesaic.parallel.schedules import SCHEDULES, check_schedule
from moesaic.parallel.split import names_in_whole
from moesaic.train.config import TrainConfig
from moesaic.train.guard import ForwardGuard
from moesaic.train.loader import IGNORED, BatchLoader, Row
from moesaic.train.optimizer import build_optimizer
from moesaic.train.pipelining import passes, pipeline_config, pipeline_of
from moesaic.train.step import train_step
from moesaic.train.training import Training
from tests.distributed.layouts_of_axes import Layout, covering, world_size
from tests.distributed.parity import LocalAdamW, assert_close, whole
from tests.integrations.families import VOCAB, make_model

# Every two choices on at most 4 ranks, and every three on at most 8.
PAIRS, TRIPLES = covering(2, most_ranks=4), covering(3)
STEPS, BATCH, LENGTH, NUM_LAYERS = 3, 8, 11, 4
_HEADS = {"num_attention_heads": 8, "num_hidden_layers": NUM_LAYERS, "tie_word_embeddings": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3-MoE": {**_HEADS, "num_key_value_heads": 4, "head_dim": 4},
    "DeepSeek-V3": {**_HEADS, "num_key_value_heads": 8, "first_k_dense_replace": 1},
}


class Result(NamedTuple):
    """What steps came to: three numbers of each, the gradients of the first one, the weights after the last one."""

    numbers: list[Tensor]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def assert_same(actual: Result, expected: Result, when: str) -> None:
    for step, (mine, theirs) in enumerate(zip(actual.numbers, expected.numbers, strict=True)):
        for what, a, b in zip(("loss", "balance loss", "norm"), mine, theirs, strict=True):
            assert_close(f"{what} of step {step}{when}", a, b)
    for what in ("gradients", "weights"):
        for name, tensor in getattr(actual, what).items():
            assert_close(f"{what} of {name}{when}", tensor, getattr(expected, what)[name])


def named(layout: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in layout.items() if size > 1) or "one rank"


class Numbers:
    """Rows to learn, of some of whose tokens nothing is learned."""

    seq_len = LENGTH

    def __init__(self) -> None:
        chance = np.random.RandomState(1)
        self.tokens = chance.randint(3, VOCAB, (STEPS * BATCH, LENGTH + 1))
        self.learned = chance.rand(STEPS * BATCH, LENGTH) < np.linspace(0.3, 0.9, STEPS * BATCH)[:, None]

    def __len__(self) -> int:
        return len(self.tokens)

    def row(self, index: int) -> Row:
        row = self.tokens[index].astype(np.int64)
        return Row(row[:-1], np.where(self.learned[index], row[1:], IGNORED), None)

    def num_targets(self, index: int) -> int:
        return int(self.learned[index].sum())


def settings(layout: Mapping[str, int], schedule: str = "1f1b", **others: Any) -> TrainConfig:
    """A balance loss of each sequence, whose mean does not depend on how a batch is cut."""
    options = {"lr": 1e-2, "steps": STEPS, "warmup_steps": 0, "weight_decay": 0.1, "max_grad_norm": 0.3}
    return TrainConfig(batch_size=BATCH, pp_schedule=schedule, **options, **layout, **others)


def trained(family: str, config: TrainConfig) -> Result:
    """Three steps of the training program."""
    torch.manual_seed(0)
    model: nn.Module = make_model(family, use_cache=False, **FAMILIES[family])
    model = swap_moe(model, aux_loss_coef=0.5, aux_loss="sequence", z_loss_coef=0.1).train()
    sizes = {axis: getattr(config, axis) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp")}
    meshes = build_meshes(**sizes, device_type="cpu")
    if meshes.pp_size > 1:
        model = split_into_stages(model, meshes, pipeline_config(config))
    moesaic.parallelize(model, meshes)
    names, gradients = names_in_whole(model), {}
    optimizer = build_optimizer(model, config)
    for group in optimizer.param_groups:
        # Without an eps near the size of gradients the first step is their sign, that of rounding errors too.
        group["eps"] = 1e-3

    def note(*_: Any) -> None:
        if not gradients:
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None, name
                gradients[names[name]] = whole(parameter.grad).clone()

    optimizer.register_step_pre_hook(note)
    options = {"dp_rank": meshes.dp_rank, "dp_size": meshes.dp_size, "passes": passes(config)}
    loader = BatchLoader(Numbers(), batch_size=BATCH, seed=0, **options)
    training = Training(model, optimizer, loader, {}, pipeline=pipeline_of(model, config))
    cpu = torch.device("cpu")
    guard = ForwardGuard(model, cpu)
    steps = [train_step(training, config, meshes=meshes, guard=guard, device=cpu) for _ in range(STEPS)]
    numbers = [torch.tensor([s.loss, s.balance_loss, s.grad_norm]) for s in steps]
    return Result(numbers, gradients, {names[n]: whole(p).clone() for n, p in model.named_parameters()})


def schedules_of(layout: Layout) -> list[str]:
    """Those that can be, over these ranks and layers."""

    def can_be(name: str) -> bool:
        try:
            check_schedule(name, resolve_layout(world_size(layout), **layout))
        except ValueError:
            return False
        return layout["pp"] * SCHEDULES[name].stages_per_rank <= NUM_LAYERS

    return list(filter(can_be, SCHEDULES))


def check_training(family: str, layouts: list[tuple[Layout, str]], expected: Result) -> None:
    for layout, schedule in layouts:
        rows = BATCH // (layout["dp_replicate"] * layout["dp_shard"])
        microbatches = {"microbatches": rows} if layout["pp"] > 1 else {}
        actual = trained(family, settings(layout, schedule, **microbatches))
        assert_same(actual, expected, f", {named(layout)}, {schedule}")


def run_by_size(same_ranks: Callable[..., Any], check: Any, layouts: list[Layout], *args: Any) -> None:
    """All layouts, those of as many ranks together. Every schedule has its turn."""
    turns = dict.fromkeys(SCHEDULES, 0)
    for size in sorted(set(map(world_size, layouts))):
        chosen = []
        for layout in layouts:
            if world_size(layout) == size:
                schedule = min(schedules_of(layout), key=lambda name: turns[name])
                turns[schedule] += layout["pp"] > 1
                chosen.append((layout, schedule))
        same_ranks(check, size, args[0], chosen, *args[1:])


# In CI each of the pairs is tried with one of three models.
@pytest.mark.slow
@pytest.mark.parametrize(("family", "layouts"), [("Qwen3-MoE", PAIRS[::3]), ("DeepSeek-V3", PAIRS[1::3])])
def test_training_is_that_of_one_process(same_ranks, family, layouts):
    run_by_size(same_ranks, check_training, layouts, family, trained(family, settings({})))


@pytest.mark.long
@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_that_of_one_process_in_every_three_choices(same_ranks, family, part):
    run_by_size(same_ranks, check_training, TRIPLES[part::8], family, trained(family, settings({})))


DIM, TOKENS, MICROBATCHES = 16, 32, 4
CONFIG = moesaic.MoEConfig(dim=DIM, hidden_dim=24, num_experts=4, top_k=2, aux_loss_coef=0.5, z_loss_coef=0.1)


class Stack(nn.Module):
    """Some of a stack of MoE blocks."""

    def __init__(self, blocks: range) -> None:
        super().__init__()
        torch.manual_seed(0)
        everything = [moesaic.MoE(CONFIG).double() for _ in range(NUM_LAYERS)]
        for parameter in nn.ModuleList(everything).parameters():
            nn.init.normal_(parameter, std=0.3)
        self.blocks = nn.ModuleDict({str(i): everything[i] for i in blocks})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = x + block(x)
        return x


def distance(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().sum() / (TOKENS * MICROBATCHES)


def stacked(layout: Mapping[str, int]) -> Result:
    """Three steps of a stack of blocks, each in four microbatches; every rank has tokens of its own."""
    meshes = build_meshes(**layout, device_type="cpu")
    size = NUM_LAYERS // meshes.pp_size
    model = Stack(range(meshes.pp_rank * size, (meshes.pp_rank + 1) * size))
    for block in model.blocks.values():
        moesaic.parallelize(block, meshes)
    attach_balance_losses(model, 1 / MICROBATCHES)
    ranks = meshes.layout.stage_size
    rank = dist.get_rank(meshes.all_ranks()) if meshes.is_distributed else 0
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(2, STEPS, MICROBATCHES, TOKENS, DIM, dtype=torch.float64, generator=generator)
    mine = data[:, :, :, rank * TOKENS // ranks : (rank + 1) * TOKENS // ranks].flatten(2, 3)
    schedule: Any = None
    if meshes.pp_size > 1:
        like = mine[0, 0, : TOKENS // ranks].clone().requires_grad_()
        options = {"input_args": like, "output_args": like, "group": meshes.stages}
        stage = PipelineStage(model, meshes.pp_rank, meshes.pp_size, torch.device("cpu"), **options)
        schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=distance, scale_grads=False)
    optimizer = LocalAdamW(model.parameters(), lr=1e-2, eps=1e-3)
    numbers, gradients = [], {}
    for x, target in mine.transpose(0, 1):
        losses: list[Tensor] = []
        with moesaic.balance_losses() as balance:
            if schedule is None:
                for part, wanted in zip(x.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True):
                    losses.append(distance(model(part), wanted))
                    losses[-1].backward()
            elif meshes.pp_rank == 0:
                schedule.step(x)
            else:
                schedule.step(target=target, losses=losses)
        sums = torch.stack([sum(losses, torch.zeros(())), sum(balance) / MICROBATCHES]).detach().double()
        if dist.is_initialized():
            dist.all_reduce(sums)
        norm = moesaic.clip_grad_norm_(model.parameters(), 0.3, group=meshes.stages)
        numbers.append(torch.cat([sums, norm.view(1)]))
        gradients = gradients or {name: whole(p.grad).clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return Result(numbers, gradients, {name: whole(p).clone() for name, p in model.named_parameters()})


def check_stack(expected: Result, layouts: list[tuple[Layout, str]]) -> None:
    for layout, _ in layouts:
        assert_same(stacked(layout), expected, f", {named(layout)}")


@pytest.mark.slow
def test_a_stack_of_blocks_is_that_of_one_process(same_ranks):
    run_by_size(same_ranks, check_stack, PAIRS[2::3], stacked({}))


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_a_stack_of_blocks_is_that_of_one_process_in_every_three_choices(same_ranks, part):
    run_by_size(same_ranks, check_stack, TRIPLES[part::4], stacked({}))


def test_there_are_sixty_layouts():
    """They differ in kind, and each is legal."""
    assert len(TRIPLES) >= 60
    assert len(PAIRS) >= 12
    for layout in (*PAIRS, *TRIPLES):
        assert resolve_layout(world_size(layout), **layout).world_size <= 8
    assert {axis: max(layout[axis] for layout in TRIPLES) for axis in TRIPLES[0]} == {
        **dict.fromkeys(("pp", "dp_shard", "tp", "ep", "etp"), 4),
        **dict.fromkeys(("dp_replicate", "cp"), 2),
    }
