"""Planted faults: small changes of the source, each with the tests that have to fail on it.

`python -m tests.faults [WORD ...]` applies each, or those whose name has one of the words, to a copy of the source. It
runs the fault's tests, and fails where they pass. `make test-long` runs it, for it takes minutes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# pytest's exit status where tests ran and some failed; others mean that they could not run.
FAILED = 1


class Fault(NamedTuple):
    """`text`, which is in `file` exactly once, becomes `replacement`; then `tests` fail.

    Attributes:
        name: what goes wrong.
        file: below src/moesaic.
        text: what is replaced.
        replacement: by what.
        tests: arguments of pytest.
    """

    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]


_PARITY = "tests/distributed/test_moe_parity.py::test_every_layout"
_PIPELINE = "tests/distributed/test_pipeline.py::test_a_pipeline_equals_one_process"
_NORM = ("tests/distributed/test_gradients.py::test_norm_over_all_meshes[2.0-None]",)

FAULTS = (
    Fault(
        "a check does not add up what ranks have",
        "testing/diagnose.py",
        "return torch.stack([self.values[r] for r in group]).sum(0)",
        "return self.values[group[0]]",
        ("tests/testing/test_diagnose.py",),
    ),
    Fault(
        "a tie of the routing is a fault to a check",
        "testing/routing.py",
        "mine.ids = torch.where(tied[:, None], theirs, chosen)",
        "mine.ids = chosen",
        ("tests/testing/test_check.py::test_ties_of_the_routing_are_no_fault",),
    ),
    Fault(
        "a replicated parameter's gradient is not summed over tp",
        "parallel/local.py",
        "grads = [Partial() if p.is_replicate() else p for p in parameter.placements]",
        "grads = list(parameter.placements)",
        ("tests/distributed/test_plan.py::test_tokens_may_be_a_dtensor",),
    ),
    Fault(
        "the capacity of a block is rounded down",
        "parallel/traffic.py",
        "return -(-rows // step) * step",
        "return rows // step * step",
        (f"{_PARITY}[4-tp1 dp_replicate1 ep4 etp1]",),
    ),
    Fault(
        "uneven experts are divided by the rounded-down number a rank",
        "parallel/dispatch.py",
        "experts_per_rank = -(-num_experts // P)",
        "experts_per_rank = num_experts // P",
        ("tests/distributed/test_uneven_experts.py::test_layout[2-tp2 ep2]",),
    ),
    Fault(
        "the size of an all-to-all is that of what is sent",
        "parallel/traffic.py",
        "rows_PQP[:, etp_rank, ep_rank]]",
        "rows_PQP[ep_rank, etp_rank]]",
        (f"{_PARITY}[2-tp2 dp_replicate1 ep2 etp1]",),
    ),
    Fault(
        "a rank of a node takes what crossed to it for what its neighbours pass on",
        "parallel/traffic.py",
        "passed_NLP[:, :, ep_rank].sum(0),",
        "passed_NLP[:, place, nodes].sum(0),",
        ("tests/distributed/test_two_hops.py::test_rows_and_gradients_arrive[tp2 ep4, 2 on a node]",),
    ),
    Fault(
        "a token crosses to a node for each of its ranks",
        "parallel/nodes.py",
        "return NodeGroups(*mine)",
        "return NodeGroups(*reversed(mine))",
        ("tests/distributed/test_wire_bytes.py::test_two_hops_are_at_the_bound_of_distinct_nodes[8-4]",),
    ),
    Fault(
        "balance losses see this rank's counts only",
        "layers/router.py",
        "total = self.reduce_counts(numbers)",
        "total = numbers",
        (f"{_PARITY}[2-tp2 dp_replicate1 ep2 etp1]",),
    ),
    Fault(
        "FSDP divides gradients",
        "parallel/fsdp.py",
        "wrapped.set_gradient_divide_factor(1.0)",
        "wrapped.set_gradient_divide_factor(2.0)",
        ("tests/distributed/test_plan.py::test_any_model_with_moe_layers_is_taken_without_tp",),
    ),
    Fault(
        "the loss is a mean over one rank's labels",
        "parallel/loss.py",
        "sum_over_ranks((mine != ignore_index).sum(), group)",
        "(mine != ignore_index).sum()",
        ("tests/distributed/test_loss.py::test_every_layout_gives_the_global_mean",),
    ),
    Fault(
        "the loss of a language model inside a wrapper stays one rank's",
        "parallel/wrapped.py",
        "        if not _is_language_model(module):",
        "        if module is not model or not _is_language_model(module):",
        ("tests/distributed/test_wrapped.py::test_loss_and_gradients_are_those_of_one_process",),
    ),
    Fault(
        "hooks on a block are lost with it",
        "integrations/transformers/swap.py",
        "    hooks.carry(block, layer)\n",
        "",
        ("tests/integrations/test_kinds_of_models.py::test_hooks_on_a_block_stay",),
    ),
    Fault(
        "gradients are scaled twice",
        "parallel/gradients.py",
        "[_holder(g) for g in grads]",
        "[_holder(g) for g in grads] * 2",
        _NORM,
    ),
    Fault(
        "copies of a gradient count as often as there are",
        "parallel/gradients.py",
        " / (1 if math.isinf(p) else n)",
        "",
        _NORM,
    ),
    Fault(
        "the load-balancing loss is doubled",
        "layers/balance.py",
        "(share_E * probability_sum_E).sum() / num_tokens",
        "(share_E * probability_sum_E).sum() * 2 / num_tokens",
        ("tests/layers/test_balance.py",),
    ),
    Fault(
        "load is counted again in a recomputed forward",
        "layers/recompute.py",
        "    if not is_recomputing() and not is_uncounted():\n",
        "    if not is_uncounted():\n",
        ("tests/layers/test_recompute.py",),
    ),
    Fault(
        "load is counted in a pass that is not to count",
        "layers/recompute.py",
        "    if not is_recomputing() and not is_uncounted():\n",
        "    if not is_recomputing():\n",
        ("tests/layers/test_attach.py", f"{_PIPELINE}[Schedule1F1B-layout1-dtensor]"),
    ),
    Fault(
        "an attached balance loss has no scale",
        "layers/balance.py",
        "torch.as_tensor(value, ",
        "torch.as_tensor(1.0, ",
        (f"{_PIPELINE}[Schedule1F1B-layout1-dtensor]",),
    ),
    Fault(
        "a stage clips by its own norm",
        "parallel/gradients.py",
        "        dist.all_reduce(total, op, group=group)\n",
        "",
        (f"{_PIPELINE}[ScheduleGPipe-layout3-local]",),
    ),
    Fault(
        "ranks do not compare their models",
        "parallel/plan.py",
        "    check_same(describe(model), all_ranks)\n",
        "",
        ("tests/distributed/test_brought.py",),
    ),
    Fault(
        "the bias of the router's logits is dropped",
        "layers/router.py",
        "logits_TE = logits_TE + self.logit_bias.to(gate_dtype)",
        "pass",
        ("tests/layers/test_router.py", "tests/layers/test_moe.py"),
    ),
    Fault(
        "normalisation of routing weights has no gradient",
        "layers/router.py",
        "weights_TK / (weights_TK.sum(1, keepdim=True)",
        "weights_TK / (weights_TK.sum(1, keepdim=True).detach()",
        ("tests/layers/test_router.py", "tests/layers/test_moe.py"),
    ),
    Fault(
        "a sharding rule admits groups that are cut beside shared weights",
        "sharding/library.py",
        '"(b c) k, g! k n, b g! -> (b c) n"',
        '"(b c) k, g k n, b g -> (b c) n"',
        ("tests/sharding/test_admission.py", "tests/sharding/test_placing.py", "tests/test_examples.py"),
    ),
    Fault(
        "a sum over a sharded contraction is taken for complete",
        "sharding/library.py",
        '"r! k, e! k n, e! -> r! n"',
        '"r! k!, e! k! n, e! -> r! n"',
        ("tests/sharding/test_admission.py", "tests/sharding/test_placing.py"),
    ),
    Fault(
        "reliability: weights in the middle of an update are saved",
        "train/step.py",
        "    training.whole = False\n",
        "",
        ("tests/reliability/test_errors_on_a_rank.py", "-k", "weights"),
    ),
    Fault(
        "reliability: a step that failed has used its data",
        "train/step.py",
        "            training.loader.sample = sample\n",
        "            pass\n",
        ("tests/reliability/test_errors_on_a_rank.py", "-k", "forward"),
    ),
    Fault(
        "reliability: what is saved in the background is not a copy",
        "checkpoint/store.py",
        "background.copied(state)",
        "state",
        ("tests/reliability/test_background.py",),
    ),
    Fault(
        "reliability: a replacement that was interrupted is not undone",
        "checkpoint/exchange.py",
        "if not final.exists() and old.is_dir() and is_whole(old):",
        "if False:",
        ("tests/reliability/test_kills.py",),
    ),
    Fault(
        "reliability: an index may lead out of its folder",
        "integrations/transformers/files.py",
        "if not isinstance(file, str) or not is_plain(file):",
        "if not isinstance(file, str):",
        ("tests/reliability/test_damaged_models.py", "-k", "index"),
    ),
    Fault(
        "reliability: a config may name a kernel of the hub",
        "integrations/transformers/configs.py",
        "        only_built_in(config, file or path)\n",
        "",
        ("tests/reliability/test_damaged_models.py", "-k", "kernel"),
    ),
)


def changed(source: str, fault: Fault) -> str:
    """The source with the fault.

    Raises:
        ValueError: its text is not there exactly once.
    """
    if (times := source.count(fault.text)) != 1:
        raise ValueError(f"{fault.file} has {fault.text!r} {times} times, not once; bring the table up to date")
    return source.replace(fault.text, fault.replacement)


# The finder of an editable install comes before PYTHONPATH: ranks would import the source without the fault.
_WITHOUT_EDITABLE_INSTALL = """import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")]
"""


def is_caught(fault: Fault) -> bool:
    """Whether the fault's tests fail."""
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        shutil.copytree(ROOT / "src", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        file = Path(folder, "moesaic", fault.file)
        file.write_text(changed(file.read_text(), fault))
        Path(folder, "sitecustomize.py").write_text(_WITHOUT_EDITABLE_INSTALL)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not long", "-p", "no:cacheprovider", *fault.tests]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": folder}, capture_output=True, text=True
        )
    if done.returncode not in (0, FAILED):
        raise RuntimeError(f"the tests of {fault.name!r} could not run\n{done.stdout}\n{done.stderr}")
    return done.returncode == FAILED


def main(words: list[str]) -> int:
    chosen = [f for f in FAULTS if not words or any(word in f.name for word in words)]
    missed = 0
    for fault in chosen:
        start = time.monotonic()
        caught = is_caught(fault)
        missed += not caught
        print(f"{'caught' if caught else 'MISSED'}  {time.monotonic() - start:4.0f} s  {fault.name}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
