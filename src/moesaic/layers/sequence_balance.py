"""The balance loss of each sequence on its own.

Legend: T tokens, E experts, K top-k, B sequences, S tokens of a sequence that are here.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moesaic.layers.balance import normalized, without_padding


def sequence_counts(
    scores: Float[Tensor, "T E"], top_k: int, num_sequences: int, token_mask: Bool[Tensor, " T"] | None
) -> Int[Tensor, "B E"]:
    """The number of tokens in each sequence that have an expert among their ``top_k`` best scores.

    Only the scores count. Groups of experts and the bias on the scores change which experts are chosen, but not this
    number, as in equation 18 of DeepSeek-V3 and in Megatron-Core.
    """
    E = scores.shape[1]
    ids_TK = scores.topk(top_k, dim=1).indices
    present_TK = torch.ones_like(ids_TK)
    if token_mask is not None:
        present_TK = present_TK * token_mask.unsqueeze(1)
    counts_BE = torch.zeros(num_sequences, E, dtype=torch.int64, device=scores.device)
    # Not unflatten: if there are no tokens here, it cannot tell the length of the sequences.
    shape = (num_sequences, len(ids_TK) // num_sequences * top_k)
    return counts_BE.scatter_add(1, ids_TK.reshape(shape), present_TK.reshape(shape))


def sequence_balance_loss(
    scores: Float[Tensor, "T E"],
    total_counts: Int[Tensor, "B E"],
    top_k: int,
    num_sequences: Int[Tensor, ""],
    token_mask: Bool[Tensor, " T"] | None = None,
) -> Tensor:
    """This process's part of the mean over sequences of ``E * sum over e of f_e * P_e``.

    ``f_e`` is the share of expert e in the tokens' ``top_k`` best scores. It has no gradient. ``P_e`` is the mean score
    of expert e, after the scores of each token are normalised to sum to 1. Both are over the tokens of one sequence,
    without padding. The loss is 1 if all shares and all scores are equal. It is the complementary loss of DeepSeek-V3
    (arXiv 2412.19437, equations 17 to 20; a count times ``E / (K T)`` there is our ``E f_e``), and Megatron-Core's
    ``seq_aux_loss``.

    Args:
        scores: the scores of this process's tokens, sequence by sequence. All sequences have the same number of tokens.
        total_counts: :func:`sequence_counts` of the same sequences, over all processes that have a part of them.
        top_k: K.
        num_sequences: the number of sequences of all processes that are not padding only.
        token_mask: False for padding; None if there is no padding.
    """
    B, E = total_counts.shape
    total_B1 = total_counts.sum(1, keepdim=True).clamp(min=1)
    share_BE = total_counts.to(scores.dtype) / total_B1
    probability_sum_BE = without_padding(normalized(scores), token_mask).view(B, len(scores) // B, E).sum(1)
    probability_BE = probability_sum_BE / (total_B1 / top_k)
    return E * (share_BE * probability_BE).sum() / num_sequences
