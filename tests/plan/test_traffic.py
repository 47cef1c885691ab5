"""What a rank is said to send is what it sends, counted on gloo ranks: bytes and calls of every collective."""

from collections import Counter
from contextlib import nullcontext
from math import prod
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.integrations.transformers import swap_moe
from moesaic.parallel import Pipeline, no_sync, resolve_layout, split_into_stages
from moesaic.parallel.recompute import Recompute
from moesaic.plan.choice import Choice, Job
from moesaic.plan.stages import stages
from moesaic.plan.traffic import collectives_of
from tests.plan.small import DIM, config, small

SEQ_LEN, SEQUENCES = 16, 2

KINDS = {
    "all_to_all_single": "all-to-all",
    "alltoall_base_": "all-to-all",
    "all_gather_into_tensor": "all-gather",
    "_allgather_base_": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "allreduce_": "all-reduce",
    "send": "send",
}


class CountSent(TorchDispatchMode):
    """Bytes that this rank sends to others, and calls, by kind. Of a ring what goes around it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional") and name in KINDS:
            self._count(KINDS[name], name, args)
        return func(*args, **kwargs or {})

    def _count(self, kind: str, name: str, args: tuple[Any, ...]) -> None:
        functional = name in ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
        tensor = args[0] if functional or name.startswith("all_reduce") else args[1]
        if name in ("allreduce_", "send"):
            tensor = args[0][0]
        group = [a for a in args if isinstance(a, str)][-1] if functional or name == "all_reduce_" else args[2]
        if name in ("allreduce_", "send"):
            group = args[1]
        n, rank = _size_and_rank(group)
        if n == 1:
            return
        if kind == "all-to-all":
            splits = args[2] if functional else args[4]
            rows = sum(splits) - splits[rank] if splits else tensor.shape[0] * (n - 1) // n
            size = rows * prod(tensor.shape[1:]) * tensor.itemsize
        else:
            size = tensor.nbytes * _AROUND[kind](n)
        if tensor.dtype == torch.int64 and kind == "all-reduce":
            return  # a number of tokens
        self.sent[kind] += size
        self.calls[kind] += 1


_AROUND: dict[str, Any] = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "send": lambda n: 1,
}


def _size_and_rank(group: Any) -> tuple[int, int]:
    if isinstance(group, str):
        group = torch._C._distributed_c10d._resolve_process_group(group)
    elif isinstance(group, torch.ScriptObject):
        group = dist.ProcessGroup.unbox(group)
    return dist.get_world_size(group), dist.get_rank(group)


class Way(NamedTuple):
    """A layout of four ranks, what is computed again, how many ranks a node has, and passes of a step."""

    sizes: dict[str, int]
    recompute: Recompute = "none"
    per_node: int = 4
    passes: int = 1


def count(way: Way) -> tuple[Counter[str], Counter[str]]:
    meshes = moesaic.build_meshes(**way.sizes, device_type="cpu", ranks_per_node=way.per_node)
    torch.manual_seed(0)
    # Its masks are tensors, which a mode can see.
    model: Any = swap_moe(AutoModelForCausalLM.from_config(config(), attn_implementation="eager"))
    if meshes.pp_size > 1:
        model = split_into_stages(model, meshes)
    model = moesaic.parallelize(model, meshes, compute="local", recompute=way.recompute)
    ids = torch.randint(128, (SEQUENCES, SEQ_LEN))
    pipeline = Pipeline(model, microbatches=way.passes) if meshes.pp_size > 1 else None

    def step() -> None:
        if pipeline is not None:
            pipeline.step(ids, ids, lambda logits, targets: logits.square().sum())
            return
        for number, part in enumerate(ids.chunk(way.passes), start=1):
            with nullcontext() if number == way.passes else no_sync(model):
                model(input_ids=part, labels=part, use_cache=False).loss.backward()

    if pipeline is not None:
        step()  # the first one sends a number from stage to stage besides
    with CountSent() as counted:
        step()
    return counted.sent, counted.calls


def expected(way: Way, rank: int) -> tuple[Counter[str], Counter[str]]:
    layout = resolve_layout(4, **way.sizes)
    job = Job(SEQ_LEN, SEQUENCES * layout.dp_size)
    stage = stages(small().shapes, layout.pp)[rank // layout.stage_size]
    choice = Choice(layout, SEQUENCES // way.passes, way.recompute)
    sent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for collective in collectives_of(stage, choice, job, DIM, 4, way.per_node):
        if collective.group.size > 1:
            sent[collective.kind] += collective.sent
            calls[collective.kind] += collective.calls
    return sent, calls


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        Way({"tp": 4, "ep": 2, "etp": 2}),
        Way({"ep": 4}),
        Way({"tp": 2, "ep": 2}),
        Way({"dp_replicate": 2, "dp_shard": 2, "etp": 4}),
        Way({"cp": 2, "ep": 2}),
        Way({"cp": 4, "ep": 4}),
        Way({"cp": 2, "tp": 2, "ep": 4}),
        Way({"pp": 2, "ep": 2}, passes=2),
        Way({"ep": 2}, passes=2),
        Way({"tp": 2, "ep": 4}, "full"),
        Way({"tp": 2, "ep": 4}, "selective"),
        Way({"ep": 2, "etp": 2}, "experts"),
        Way({"ep": 4}, per_node=2),
    ],
    ids=str,
)
def test_bytes_and_calls_are_those_on_ranks(same_ranks, way):
    for rank, (counted_sent, counted_calls) in enumerate(same_ranks(count, 4, way)):
        sent, calls = expected(way, rank)
        assert counted_sent == sent
        assert counted_calls == calls
