"""The sharding rules of the operators with quantised weights.

Letters are those of ``library.py``. A weight is data and scales: ``k`` is its summed dim and ``n`` that of its
outputs. An int8 weight has one scale for all of ``k``. Others have scales for blocks of ``p`` numbers along ``k``, of
``q`` bytes each; then ``k`` counts blocks, and is cut between them. Blocks that run over the ends of rows, ``t`` of
them, leave nothing but experts to be cut. Of scales the results are linear as well, but no weight is partial.
"""

from typing import Any, NamedTuple

import torch

import moesaic.ops  # noqa: F401 -- defines the operators
from moesaic.ops.experts_mlp.activation import ACTIVATIONS
from moesaic.ops.grouped_mm.implementations import IMPLEMENTATIONS
from moesaic.ops.quantized.formats import FORMATS
from moesaic.sharding.library import FORMS, LISTS, CopiesForm
from moesaic.sharding.register import sharding_rule

_ops = torch.ops.moesaic
_ONE_SCALE = [name for name, format in FORMATS.items() if format.block is None]
_BLOCKS = [name for name, format in FORMATS.items() if format.block is not None]
_FLAT = [name for name, format in FORMATS.items() if format.runs_on]
_impl = {"impl": [None, *IMPLEMENTATIONS]}
_dtypes = [None, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def _with_formats(flags: dict[str, list[Any]], each: int) -> list[dict[str, list[Any]]]:
    """Flags of the lines of a rule: so many for one scale an output, for blocks, and for blocks that run on."""
    return [flags | {"format": formats} for formats in (_ONE_SCALE, _BLOCKS, _FLAT) for _ in range(each)]


sharding_rule(
    "r! k, e! n k, e! n, e! -> r! n",
    "(b c) k, (b g)? n k, (b g)? n, b g -> (b c) n",
    "(b c) k, g! n k, g! n, b g! -> (b c) n",
    "r! (k p), e! n k q!, e! n k, e! -> r! n",
    "(b c) (k p), (b g)? n k q!, (b g)? n k, b g -> (b c) n",
    "(b c) (k p), g! n k q!, g! n k, b g! -> (b c) n",
    "r! k!, e! t! q!, e! t!, e! -> r! n!",
    "(b c) k!, (b g)? t! q!, (b g)? t!, b g -> (b c) n!",
    "(b c) k!, g! t! q!, g! t!, b g! -> (b c) n!",
    linear=["x"],
    when=_with_formats(_impl | {"out_dtype": _dtypes}, 3),
)(_ops.quantized_mm)

sharding_rule(
    "r! n, e! n k, e! n, e! -> r! k",
    "(b c) n, (b g)? n k, (b g)? n, b g -> (b c) k",
    "(b c) n, g! n k, g! n, b g! -> (b c) k",
    "r! n, e! n k q!, e! n k, e! -> r! (k p)",
    "(b c) n, (b g)? n k q!, (b g)? n k, b g -> (b c) (k p)",
    "(b c) n, g! n k q!, g! n k, b g! -> (b c) (k p)",
    "r! n!, e! t! q!, e! t!, e! -> r! k!",
    "(b c) n!, (b g)? t! q!, (b g)? t!, b g -> (b c) k!",
    "(b c) n!, g! t! q!, g! t!, b g! -> (b c) k!",
    linear=["grad"],
    redistribute=["grad"],
    when=_with_formats(_impl, 3),
)(_ops.quantized_mm_input_grad)


# As in experts_mlp, `d` is whole. The hidden dim `f` is that of the outputs of w1 and w3 and the summed one of w2: with
# blocks along it, `f` counts those of w2. If the blocks of either run on, it is whole.
class _Form(NamedTuple):
    """One kind of weights: data and scales of w1 and w3, those of w2, and the hidden dim.

    The bias b2 is added to the sum over ``f``, where that can be cut, and its gradient does not depend on it.
    """

    up: str
    down: str
    hidden: str = "f!"
    of_copies: CopiesForm = FORMS[0]

    @property
    def x(self) -> str:
        return self.of_copies.x

    @property
    def operands(self) -> str:
        return f"{self.of_copies.tokens}, {self.up}, {self.up}, {self.down}"

    @property
    def pre(self) -> str:
        h = f"{self.of_copies.hidden.removesuffix('f')}{self.hidden}"
        return f"{h}, {h}"

    @property
    def copies(self) -> str:
        return self.of_copies.copies

    @property
    def factors(self) -> str:
        """Of adapters of ranks ``i``, ``j`` and ``l``: with the letters of their weights, as those of experts_lora."""
        f = self.hidden
        return f"(b e)? d! i!, (b e)? i! {f}, (b e)? d! j!, (b e)? j! {f}, (b e)? {f} l!, (b e)? l! d!"

    @property
    def adapters(self) -> str:
        """Factors, and the numbers of copies and hidden columns, on which dropout depends."""
        return f"{self.factors}, {self.of_copies.copy}, {self.hidden}"

    def biases(self, sign: str = "", of_sum: str = "") -> str:
        of_hidden = f"{sign}(b e)? {self.hidden}"
        return f"{of_hidden}, {of_hidden}, {of_sum if self.hidden != 'f!' else ''}(b e)? d!"


_FLAT_UP, _FLAT_DOWN = "(b e)? t! q!, (b e)? t!", "(b e)? s! q!, (b e)? s!"
_KINDS = (
    _Form("(b e)? f d!, (b e)? f", "(b e)? d! f, (b e)? d!", "f"),
    _Form("(b e)? (f p) a! q!, (b e)? (f p) a!", "(b e)? d! f q!, (b e)? d! f", "(f p)"),
    _Form("(b e)? f! a! q!, (b e)? f! a!", _FLAT_DOWN),
    _Form(_FLAT_UP, "(b e)? d! g! q!, (b e)? d! g!"),
    _Form(_FLAT_UP, _FLAT_DOWN),
)
_FORMS = [form._replace(of_copies=of_copies) for of_copies in FORMS for form in _KINDS]
_when = [
    {**_impl, "activation": [*ACTIVATIONS], "format": formats, **lists}
    for lists in LISTS
    for formats in (_ONE_SCALE, _BLOCKS, _FLAT, _FLAT, _FLAT)
]
sharding_rule(
    *(f"{form.operands}, {form.biases('', '+f: ')}, {form.copies} -> {form.x}, {form.pre}" for form in _FORMS),
    redistribute=["experts"],
    when=_when,
)(_ops.quantized_experts_mlp)

sharding_rule(
    *(f"{form.operands}, {form.biases('', '+f: ')}, {form.copies} -> {form.x}" for form in _FORMS),
    linear=["weights"],
    redistribute=["experts"],
    when=_when,
)(_ops.quantized_experts_mlp_inference)

sharding_rule(
    *(
        f"{form.x}, {form.operands}, {form.biases('~', '+f: ')}, {form.pre}, {form.copies} "
        f"-> {form.x}, {form.of_copies.copy}, {form.biases('', 'same f: ')}"
        for form in _FORMS
    ),
    linear=["grad"],
    redistribute=["grad", "experts"],
    when=_when,
)(_ops.quantized_experts_mlp_backward)

sharding_rule(
    *(
        f"{form.operands}, {form.biases('', '+f: ')}, {form.adapters}, {form.copies} -> {form.x}, {form.pre}"
        for form in _FORMS
    ),
    redistribute=["experts"],
    when=_when,
)(_ops.quantized_experts_lora)

sharding_rule(
    *(f"{form.operands}, {form.biases('', '+f: ')}, {form.adapters}, {form.copies} -> {form.x}" for form in _FORMS),
    linear=["weights"],
    redistribute=["experts"],
    when=_when,
)(_ops.quantized_experts_lora_inference)

sharding_rule(
    *(
        f"{form.x}, {form.operands}, {form.biases('~', '+f: ')}, {form.adapters}, {form.pre}, {form.copies} "
        f"-> {form.x}, {form.of_copies.copy}, {form.factors}"
        for form in _FORMS
    ),
    linear=["grad"],
    redistribute=["grad", "experts"],
    when=_when,
)(_ops.quantized_experts_lora_backward)
