"""Where everything of the expert computation lives, on the (ep, etp) mesh.

===============  ======================  ==============================
tensor           placements              placements of its gradient
===============  ======================  ==============================
tokens           ``[Shard(0), R]``       ``[Shard(0), Partial]``
w1, w3           ``[Shard(0), Shard(2)]``  the same
w2               ``[Shard(0), Shard(1)]``  the same
b1, b3           ``[Shard(0), Shard(1)]``  the same
b2               ``[Shard(0), R]``       the same
result           ``[Shard(0), Partial]``  ``[Shard(0), R]``
===============  ======================  ==============================

Tokens, with their routing, and results are in ``ep`` blocks of equal capacity. w1 and w3 are column-parallel over etp
and w2 row-parallel, so neither direction needs a collective: the sums that ``Partial`` asks for are the reduce-scatters
of the dispatcher. The down bias b2 is not summed over etp but added by one rank of it; its gradient is that of the
result, which every rank of etp has.
"""

from torch.distributed.tensor import Partial, Replicate, Shard

from moesaic.sharding.rule import Placements

ROWS: Placements = (Shard(0), Replicate())
ROW_GRADS: Placements = (Shard(0), Partial())
RESULTS: Placements = (Shard(0), Partial())
RESULT_GRADS: Placements = (Shard(0), Replicate())
COLUMN: Placements = (Shard(0), Shard(2))
ROW: Placements = (Shard(0), Shard(1))
BIAS_COLUMN: Placements = (Shard(0), Shard(1))
DOWN_BIAS: Placements = (Shard(0), Replicate())
WEIGHTS: dict[str, Placements] = {
    "w1": COLUMN,
    "w3": COLUMN,
    "w2": ROW,
    "b1": BIAS_COLUMN,
    "b3": BIAS_COLUMN,
    "b2": DOWN_BIAS,
}
