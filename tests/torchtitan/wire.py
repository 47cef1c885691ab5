"""Bytes that one training step of a rank hands to other ranks, by kind of collective.

An all-gather hands its part to each other rank, a reduce-scatter each other rank's part to it, an all-reduce is both,
and an all-to-all what its sizes say. How a network carries them is its own affair.
"""

from collections import Counter
from typing import Any

import torch.distributed as dist
from benchmarks.wire_bytes import SENDS_NOTHING
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.testing.pool import Ranks
from tests.torchtitan.case import Case, fresh, set_weights, trainer_of


class Count(TorchDispatchMode):
    """Adds up what this rank sends while it is active.

    Raises:
        NotImplementedError: a collective whose bytes it does not know.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional") and name not in SENDS_NOTHING:
            named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
            kind, sent = _bytes(name, named)
            self.sent[kind] += sent
        return func(*args, **kwargs or {})


def _bytes(name: str, args: dict[str, Any]) -> tuple[str, int]:
    [group] = (args[key] for key in ("process_group", "group_name", "group") if key in args)
    group = _resolve_process_group(group) if isinstance(group, str) else dist.ProcessGroup.unbox(group)
    others, ranks = group.size() - 1, group.size()
    match name:
        case "alltoall_base_" | "all_to_all_single":
            sent = args["input"]
            splits = args.get("input_split_sizes")
            rows = sum(splits) - splits[group.rank()] if splits else len(sent) * others // ranks
            return "all-to-all", rows * sent[:1].nbytes if len(sent) else 0
        case "_allgather_base_":
            return "all-gather", others * args["input_tensor"].nbytes
        case "all_gather_into_tensor" | "all_gather_into_tensor_out":
            return "all-gather", others * args["input"].nbytes
        case "_reduce_scatter_base_":
            return "reduce-scatter", args["input_tensor"].nbytes * others // ranks
        case "reduce_scatter_tensor":
            return "reduce-scatter", args["input"].nbytes * others // ranks
        case "allreduce_":
            return "all-reduce", sum(2 * t.nbytes * others // ranks for t in args["tensors"])
        case "all_reduce" | "all_reduce_":
            return "all-reduce", 2 * args["input"].nbytes * others // ranks
        case "barrier":
            return "barrier", 0
    raise NotImplementedError(f"bytes of the collective '{name}'")


def sent_in_a_step(case: Case) -> dict[str, int]:
    """Of the second step, so that nothing that happens once is in it."""
    with fresh(case), trainer_of(case) as trainer:
        set_weights(trainer)
        counts: list[Counter[str]] = []
        step = trainer.train_step

        def counted(data: Any) -> None:
            with Count() as count:
                step(data)
            counts.append(count.sent)

        trainer.train_step = counted
        trainer.train()
        return {kind: sent for kind, sent in counts[1].items() if sent}


def add(ranks: list[dict[str, int]]) -> Counter[str]:
    """What all ranks send together."""
    total: Counter[str] = Counter()
    for sent in ranks:
        total.update(sent)
    return total


def table() -> None:
    """What docs/torchtitan.md says: `python -c 'import tests.torchtitan.wire as w; w.table()'`."""
    layouts: tuple[dict[str, int], ...] = ({"ep": 8}, {"tp": 2, "ep": 8}, {"tp": 2, "ep": 4})
    with Ranks(8) as eight:
        for layout in layouts:
            for override, etp in (("", 1), ("routed_experts", 1), ("routed_experts", 2)):
                case = Case("qwen3_64", override, steps=2, etp=etp, **layout)
                print(case, dict(sorted(add(eight(sent_in_a_step, case)).items())), flush=True)
