"""The sharding rules of moesaic's own operators.

Read `b` blocks, `c` rows a block, `g` groups a block, `r` rows, `t` tokens; the other letters are matrix dims.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import moesaic.ops  # noqa: F401 -- defines the operators
from moesaic import on_demand
from moesaic.ops.experts_mlp.activation import ACTIVATIONS
from moesaic.ops.grouped_mm.implementations import IMPLEMENTATIONS
from moesaic.sharding.register import sharding_rule

_ops = torch.ops.moesaic
on_demand.withdraw()

# The flags that the rules stand for.
_impl = {"impl": [None, *IMPLEMENTATIONS]}
_fused = _impl | {"activation": [*ACTIVATIONS]}
_dtypes = [None, torch.float16, torch.bfloat16, torch.float32, torch.float64]

# A flat group's first row depends on every group before it: rows and experts stay whole, the matrix dims do not.
# In blocks raggedness lies inside a block, so blocks are a dim like any other: with experts of their own they are
# expert parallelism, the last blocks having fewer experts or none, and sharing them they are token parallelism.
# The weight's gradient lies as the weight does, whose shape alone is read.
sharding_rule(
    "r! k, e! k n, e! -> r! n",
    "(b c) k, (b g)? k n, b g -> (b c) n",
    "(b c) k, g! k n, b g! -> (b c) n",
    linear=["x", "w"],
    when=_impl | {"out_dtype": _dtypes},
)(_ops.grouped_mm)

sharding_rule(
    "r! n, e! k n, e! -> r! k",
    "(b c) n, (b g)? k n, b g -> (b c) k",
    "(b c) n, g! k n, b g! -> (b c) k",
    linear=["grad", "w"],
    redistribute=["grad"],
    when=_impl,
)(_ops.grouped_mm_input_grad)

sharding_rule(
    "r! k, r! n, e!, ~e! k n -> e! k n",
    "(b c) k, (b c) n, b g, ~(b g)? k n -> (b g)? k n",
    "(b c) k, (b c) n, b g!, ~g! k n -> g! k n",
    linear=["x", "grad"],
    redistribute=["grad"],
    when=_impl,
)(_ops.grouped_mm_weight_grad)

# Slots and positions are indices into all rows and all tokens, so both stay whole; a copy `k` of a token does not.
sharding_rule("t! k! -> r!, t! k!, e!")(_ops.sort_by_expert)
sharding_rule("t! d, r!, t! k!, t! k! -> r! d", linear=["x", "weights"])(_ops.permute)
sharding_rule("r! d, r!, t! k!, t! k! -> t! d", linear=["y", "weights"])(_ops.combine)
sharding_rule("r! d, t! d, r!, t! k! -> t! k!", linear=["y", "x"], redistribute=["y", "x"])(_ops.combine_weight_grad)


# `n` tokens a block, `k` copies a token, `e` experts a block. Blocks are expert parallelism, tokens and copies may be
# cut at will, and the hidden dim `f` is tensor parallelism: column-parallel w1 and w3, row-parallel w2. The bias b2 is
# added to the sum over `f`, and its gradient does not depend on it. The pre-activations lie by token and copy, not
# sorted by expert, and so are dims like any other. Of w3 and b3 together the result is linear with some activations,
# and with others not: it is none of the rule's.
#
# With a list of copies, `c` of them a block, each rule has a second line. The list's numbers are of all tokens and
# copies of a block, so those stay whole; the list itself may be cut, and then the results are sums over its parts.
class CopiesForm(NamedTuple):
    """Tokens, how pre-activations lie, and the list of copies."""

    x: str = "b n d!"
    copy: str = "b n k"
    hidden: str = "b n k f"
    copies: str = "b c!"

    @property
    def tokens(self) -> str:
        return f"{self.x}, {self.copy}, {self.copy}, ~b e"

    @property
    def pre(self) -> str:
        return f"{self.hidden}, {self.hidden}"


FORMS = (CopiesForm(), CopiesForm("b n! d!", "b n! k!", "b c f", "b c"))
LISTS = ({"copies": None}, {"copies": Tensor})
_projections = "(b e)? d! f, (b e)? d! f, (b e)? f d!, (b e)? f, (b e)? f"
_weights = f"{_projections}, +f: (b e)? d!"
_when = [_fused | given for given in LISTS]
sharding_rule(
    *(f"{form.tokens}, {_weights}, {form.copies} -> {form.x}, {form.pre}" for form in FORMS),
    redistribute=["experts"],
    when=_when,
)(_ops.experts_mlp)
sharding_rule(
    *(f"{form.tokens}, {_weights}, {form.copies} -> {form.x}" for form in FORMS),
    linear=["weights", ("w2", "b2")],
    redistribute=["experts"],
    when=_when,
)(_ops.experts_mlp_inference)
_of_biases = "~(b e)? f, ~(b e)? f, +f: (b e)? d!"
sharding_rule(
    *(
        f"{form.x}, {form.tokens}, (b e)? d! f, (b e)? d! f, (b e)? f d!, {_of_biases}, {form.pre}, {form.copies} "
        f"-> {form.x}, {form.copy}, {_projections}, same f: (b e)? d!"
        for form in FORMS
    ),
    linear=["grad"],
    redistribute=["grad", "experts"],
    when=_when,
)(_ops.experts_mlp_backward)

# Adapters, of ranks `p`, `q` and `s`, have the letters of their weights. A factor without `f` is whole where `f` is
# cut, and its gradient is then a sum over `f`. The weights are frozen: no gradient lies as they do.
# What is dropped depends on numbers of copies and of hidden columns, which lie as these do.
_factors = "(b e)? d! p!, (b e)? p! f, (b e)? d! q!, (b e)? q! f, (b e)? f s!, (b e)? s! d!"
sharding_rule(
    *(
        f"{form.tokens}, {_weights}, {_factors}, {form.copy}, f, {form.copies} -> {form.x}, {form.pre}"
        for form in FORMS
    ),
    redistribute=["experts"],
    when=_when,
)(_ops.experts_lora)
sharding_rule(
    *(f"{form.tokens}, {_weights}, {_factors}, {form.copy}, f, {form.copies} -> {form.x}" for form in FORMS),
    linear=["weights"],
    redistribute=["experts"],
    when=_when,
)(_ops.experts_lora_inference)
sharding_rule(
    *(
        f"{form.x}, {form.tokens}, (b e)? d! f, (b e)? d! f, (b e)? f d!, {_of_biases}, {_factors}, {form.copy}, f, "
        f"{form.pre}, {form.copies} -> {form.x}, {form.copy}, {_factors}"
        for form in FORMS
    ),
    linear=["grad"],
    redistribute=["grad", "experts"],
    when=_when,
)(_ops.experts_lora_backward)
