"""The sharding rules of moesaic's own operators.

Read `b` blocks, `c` rows a block, `g` groups a block, `r` rows, `t` tokens; the other letters are matrix dims.
"""

import torch

import moesaic.ops  # noqa: F401 -- defines the operators
from moesaic.sharding.register import sharding_rule

_ops = torch.ops.moesaic

# A flat group's first row depends on every group before it: rows and experts stay whole, the matrix dims do not.
# In blocks raggedness lies inside a block, so blocks are a dim like any other: with experts of their own they are
# expert parallelism, the last blocks having fewer experts or none, and sharing them they are token parallelism.
# The weight's gradient lies as the weight does, whose shape alone is read.
sharding_rule(
    "r! k, e! k n, e! -> r! n",
    "(b c) k, (b g)? k n, b g -> (b c) n",
    "(b c) k, g! k n, b g! -> (b c) n",
    linear=["x", "w"],
)(_ops.grouped_mm)

sharding_rule(
    "r! n, e! k n, e! -> r! k",
    "(b c) n, (b g)? k n, b g -> (b c) k",
    "(b c) n, g! k n, b g! -> (b c) k",
    linear=["grad", "w"],
    redistribute=["grad"],
)(_ops.grouped_mm_input_grad)

sharding_rule(
    "r! k, r! n, e!, ~e! k n -> e! k n",
    "(b c) k, (b c) n, b g, ~(b g)? k n -> (b g)? k n",
    "(b c) k, (b c) n, b g!, ~g! k n -> g! k n",
    linear=["x", "grad"],
    redistribute=["grad"],
)(_ops.grouped_mm_weight_grad)

# Slots and positions are indices into all rows and all tokens, so both stay whole; a copy `k` of a token does not.
sharding_rule("t! k! -> r!, t! k!, e!")(_ops.sort_by_expert)
sharding_rule("t! d, r!, t! k!, t! k! -> r! d", linear=["x", "weights"])(_ops.permute)
sharding_rule("r! d, r!, t! k!, t! k! -> t! d", linear=["y", "weights"])(_ops.combine)
sharding_rule("r! d, t! d, r!, t! k! -> t! k!", linear=["y", "x"], redistribute=["y", "x"])(_ops.combine_weight_grad)
