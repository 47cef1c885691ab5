"""The table of docs/transformers.md: which family runs at which depth, as it turns out when one tries."""

import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moesaic
from moesaic.integrations.transformers import register, swap_moe
from moesaic.integrations.transformers.families import WHY_NOT as WHY_NOT_2
from tests.distributed.test_families import PLANNED
from tests.distributed.test_folders import WITH_TP
from tests.distributed.test_plan import fake_meshes
from tests.integrations.families import FAMILIES, make_model, token_ids
from tests.integrations.folders import NAMED, OTHERS, SINCE_5_24, make
from tests.integrations.test_experts import SERVED
from tests.integrations.test_folders import FOLDERS
from tests.integrations.test_swap import SWAPPED

DOCUMENT = Path(__file__).parents[2] / "docs" / "transformers.md"
# What stands in the table where a depth is not there.
WHY_NOT = {
    ("Llama-4", 1): "its experts do not go through transformers' interface",
    ("Phi-MoE", 2): "its router, SparseMixer, is random in training",
    ("Qwen3-Next", 3): "its linear attention needs tp 1",
    ("MiniMax", 3): "its lightning attention needs tp 1",
    ("Phi-MoE", 3): "no depth 2",
    ("Nemotron-H", 3): "its Mamba layers need tp 1",
}


class Ours(TorchDispatchMode):
    """Whether an operator of ours is called."""

    called = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called |= func.namespace == "moesaic"
        return func(*args, **(kwargs or {}))


def runs_on_our_kernels(family: str) -> bool:
    register()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="experts_implementation: the experts of transformers.models.llama4")
        model = make_model(family, experts_implementation="moesaic")
    with Ours() as ours:
        model(input_ids=token_ids(1, 5))
    return ours.called


def runs_with_our_layers(family: str) -> bool:
    try:
        model = swap_moe(make_model(family))
    except ValueError:
        return False
    return any(isinstance(module, moesaic.MoE) for module in model.modules())


def runs_with_tp(family: str) -> bool:
    try:
        moesaic.parallelize(swap_moe(make_model(family)), fake_meshes(2, tp=2))
    except ValueError:
        return False
    return True


def leaves_padding_out(family: str) -> bool:
    """Whether experts get the tokens of a batch that are no padding, and no other."""
    try:
        model = swap_moe(make_model(family)).train()
    except ValueError:
        return False
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    model(input_ids=token_ids(2, 5), attention_mask=mask)
    layers = [module for module in model.modules() if isinstance(module, moesaic.MoE)]
    return all(layer.router.load.sum() == mask.sum() * layer.config.top_k for layer in layers)


# Tests of losses with padding go over the same families as those of the depth.
def padding_text(family: str) -> str:
    if family not in SWAPPED:
        return "no: no depth 2"
    return "depths 2 and 3" if family in PLANNED else "depths 2 and 3, with tp 1"


TESTED = (
    (1, SERVED, "results, gradients, routing"),
    (2, SWAPPED, "also round trip, files"),
    (3, list(PLANNED), "results, gradients, a step"),
)


def folder_row(folder: str) -> str:
    name = NAMED.get(folder)
    model = f"{FAMILIES[name][0]}ForCausalLM" if name else OTHERS[folder].model
    depth_2, depth_3 = f"no: {WHY_NOT_2.get(folder)}", "no"
    if folder not in WHY_NOT_2:
        depth_2, depth_3 = "yes", "yes" if name in PLANNED or folder in WITH_TP else "tp 1"
    since = " (5.24)" if folder in SINCE_5_24 else ""
    return f"| {folder}{since} | `{model}` | yes | {depth_2} | {depth_3} |"


def test_the_table_of_folders_is_complete():
    rows = [folder_row(folder) for folder in sorted([*NAMED, *OTHERS])]
    assert "\n".join(rows) in DOCUMENT.read_text(), "\n".join(["the table should be:", *rows])


@pytest.mark.long
@pytest.mark.parametrize("folder", FOLDERS)
def test_tp_is_where_the_table_has_it(folder):
    if folder_row(folder).endswith("| yes |"):
        moesaic.parallelize(swap_moe(make(folder)), fake_meshes(2, tp=2))
    else:
        with pytest.raises(ValueError, match="cannot replace the blocks|use tp=1"):
            moesaic.parallelize(swap_moe(make(folder)), fake_meshes(2, tp=2))


def test_the_table_is_what_one_finds():
    assert [family for family in FAMILIES if runs_on_our_kernels(family)] == SERVED
    assert [family for family in FAMILIES if runs_with_our_layers(family)] == SWAPPED
    assert [family for family in FAMILIES if runs_with_tp(family)] == list(PLANNED)
    assert [family for family in FAMILIES if leaves_padding_out(family)] == SWAPPED
    rows = []
    for family, (stem, _) in FAMILIES.items():
        cells = []
        for depth, tested, text in TESTED:
            cells.append(text if family in tested else f"no: {WHY_NOT[family, depth]}")
        cells.append(padding_text(family))
        rows.append(f"| {family} | `{stem}ForCausalLM` | {' | '.join(cells)} |")
    assert "\n".join(rows) in DOCUMENT.read_text(), "\n".join(["the table should be:", *rows])
