"""The table of docs/transformers.md: which family runs at which depth, as it turns out when one tries."""

from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode

import moesaic
from moesaic.integrations.transformers import register, swap_moe
from tests.integrations.families import FAMILIES, make_model, token_ids
from tests.integrations.test_experts import SERVED
from tests.integrations.test_swap import SWAPPED

DOCUMENT = Path(__file__).parents[2] / "docs" / "transformers.md"
# What stands in the table where a depth is not there.
WHY_NOT = {
    ("Llama-4", 1): "its experts do not go through transformers' interface",
    ("gpt-oss", 2): "expert biases, a clamped gate, a router bias",
    ("Phi-MoE", 2): "its router, SparseMixer, is random in training",
    ("Nemotron-H", 2): "un-gated experts",
}


class Ours(TorchDispatchMode):
    """Whether an operator of ours is called."""

    called = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called |= func.namespace == "moesaic"
        return func(*args, **(kwargs or {}))


def runs_on_our_kernels(family: str) -> bool:
    register()
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


def test_the_table_is_what_one_finds():
    assert [family for family in FAMILIES if runs_on_our_kernels(family)] == SERVED
    assert [family for family in FAMILIES if runs_with_our_layers(family)] == SWAPPED
    rows = []
    for family, (stem, _) in FAMILIES.items():
        cells = []
        for depth, tested, text in ((1, SERVED, "results, gradients, routing"), (2, SWAPPED, "also round trip, files")):
            cells.append(text if family in tested else f"no: {WHY_NOT[family, depth]}")
        rows.append(f"| {family} | `{stem}ForCausalLM` | {' | '.join(cells)} |")
    assert "\n".join(rows) in DOCUMENT.read_text(), "\n".join(["the table should be:", *rows])
