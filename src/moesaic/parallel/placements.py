"""Where everything of the expert computation lies on the (ep, etp) mesh, read from the rules of its operators.

ep cuts blocks, so a rank has whole experts and the rows that go to them. etp cuts the hidden dim of each expert, so
w1 and w3 are split by columns and w2 by rows. Neither pass needs a collective: the sums that ``Partial`` asks for are
the reduce-scatters of the dispatcher.
"""

from dataclasses import replace

import torch

from moesaic.ops.experts_lora.operands import FACTOR_NAMES
from moesaic.ops.quantized import Format
from moesaic.sharding import on
from moesaic.sharding.decide import rule_of
from moesaic.sharding.rule import Placements
from moesaic.sharding.when import stands

_ops = torch.ops.moesaic
# By the names in the operators' schemas: x, ids, weights, w1, ..., the result z, its gradient grad, and grad_x, ...
PLACES = on(_ops.experts_mlp, ep="b", etp="f") | on(_ops.experts_mlp_backward, ep="b", etp="f")
# A weight lies as its gradient does.
WEIGHTS = {name: PLACES[f"grad_{name}"] for name in ("w1", "w3", "w2", "b1", "b3", "b2")}
# So do the factors of adapters, but for sums: those that etp does not cut have gradients that are Partial over it.
_lora = on(_ops.experts_lora, ep="b", etp="f") | on(_ops.experts_lora_backward, ep="b", etp="f")
FACTORS = {name: _lora[name] for name in FACTOR_NAMES}
# With dropout: the numbers of hidden columns.
COLUMNS = _lora["columns"]
GRADIENTS = WEIGHTS | {name: _lora[f"grad_{name}"] for name in FACTOR_NAMES}
_quantized = rule_of(_ops.quantized_experts_mlp)


def places_of_quantized(format: Format) -> dict[str, Placements]:
    """Where data (``w1``) and scales (``s1``) of quantised weights lie, if blocks do not run over the ends of rows."""
    flags = {"format": format, "activation": "silu", "impl": None, "copies": None}
    lines = tuple(line for line in _quantized.lines if stands(line, flags))
    return on(replace(_quantized, lines=lines), ep="b", etp="f")


# Every rank of etp has the bias b2, and it counts once.
TERMS = rule_of(_ops.experts_mlp).terms()
