"""One balance loss over all layers of a model, as transformers has it.

Legend: T tokens, E experts, K top-k, L layers.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moesaic.layers.balance import without_padding
from moesaic.layers.router import Routing


def pooled_balance_loss(routings: Sequence[Routing], top_k: int, reduce_counts: Callable[[Tensor], Tensor]) -> Tensor:
    """This process's part of ``E * sum over e of F_e * P_e``; K for uniform routers over uniform loads.

    ``F_e`` is the mean over the tokens of all layers, ``L T`` in number, of whether e is among the ``top_k`` experts of
    largest logits, without gradient; ``P_e`` the mean of its probability, the softmax of the logits. Padding does not
    count. ``load_balancing_loss_func`` of transformers, given the router logits of all layers, over the tokens of all
    processes. It knows neither sigmoid scores nor biases on them nor groups of experts.

    Args:
        routings: of each layer, of this process's tokens.
        top_k: K.
        reduce_counts: sums counts over all processes. Called once.
    """
    first = _logits(routings[0])
    E = first.shape[1]
    counts_E = torch.zeros(E, dtype=torch.int64, device=first.device)
    probability_sum_E, rows = first.new_zeros(E), counts_E.new_zeros(1)
    for routing in routings:
        mask_T = routing.ids[:, 0] >= 0
        probabilities_TE = _logits(routing).softmax(1)
        probability_sum_E = probability_sum_E + without_padding(probabilities_TE, mask_T).sum(0)
        best_TK = probabilities_TE.topk(top_k, dim=1).indices
        present_TK = mask_T.to(counts_E.dtype).unsqueeze(1).expand(best_TK.shape)
        counts_E = counts_E.scatter_add(0, best_TK.flatten(), present_TK.flatten())
        rows = rows + mask_T.sum()
    total = reduce_counts(torch.cat([counts_E, rows]))
    total_rows = total[-1].clamp(min=1)
    frequency_E = total[:-1].to(probability_sum_E.dtype) / total_rows
    return E * (frequency_E * probability_sum_E).sum() / total_rows


def _logits(routing: Routing) -> Tensor:
    assert routing.logits is not None, "a router gives them"
    return routing.logits
