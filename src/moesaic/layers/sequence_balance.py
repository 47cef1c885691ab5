"""The balance loss of each sequence by itself.

Legend: T tokens, E experts, K top-k, B sequences, S tokens of a sequence that are here.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moesaic.layers.balance import normalized, without_padding


def sequence_counts(
    scores: Float[Tensor, "T E"], top_k: int, num_sequences: int, token_mask: Bool[Tensor, " T"] | None
) -> Int[Tensor, "B E"]:
    """How many tokens of each sequence have each expert among their ``top_k`` best scores.

    Of the scores alone: groups of experts and the bias of loss-free balance change which experts are chosen, and not
    this count, as in DeepSeek-V3's equation 18 and in Megatron-Core.
    """
    E = scores.shape[1]
    ids_TK = scores.topk(top_k, dim=1).indices
    present_TK = torch.ones_like(ids_TK)
    if token_mask is not None:
        present_TK = present_TK * token_mask.unsqueeze(1)
    counts_BE = torch.zeros(num_sequences, E, dtype=torch.int64, device=scores.device)
    # Not unflatten, which cannot tell how long sequences are of which nothing is here.
    shape = (num_sequences, len(ids_TK) // num_sequences * top_k)
    return counts_BE.scatter_add(1, ids_TK.reshape(shape), present_TK.reshape(shape))


def sequence_balance_loss(
    scores: Float[Tensor, "T E"],
    total_counts: Int[Tensor, "B E"],
    top_k: int,
    num_sequences: Int[Tensor, ""],
    token_mask: Bool[Tensor, " T"] | None = None,
) -> Tensor:
    """This process's part of the mean over sequences of ``E * sum over e of f_e * P_e``; 1 where all is uniform.

    ``f_e`` is the share that expert e has of the tokens' ``top_k`` best scores, without gradient; ``P_e`` the mean of
    its score, scores normalised to sum 1 a token. Both are over the tokens of one sequence, without padding. The
    complementary loss of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20; there ``E / (K T)`` times a count is our
    ``E f_e``), Megatron-Core's ``seq_aux_loss``.

    Args:
        scores: of this process's tokens, sequence by sequence, of each the same number.
        total_counts: :func:`sequence_counts` of the same sequences, over all processes that have a part of them.
        top_k: K.
        num_sequences: sequences over all processes that have a token which is not padding.
        token_mask: False for padding; None where there is none.
    """
    B, E = total_counts.shape
    total_B1 = total_counts.sum(1, keepdim=True).clamp(min=1)
    share_BE = total_counts.to(scores.dtype) / total_B1
    probability_sum_BE = without_padding(normalized(scores), token_mask).view(B, len(scores) // B, E).sum(1)
    probability_BE = probability_sum_BE / (total_B1 / top_k)
    return E * (share_BE * probability_BE).sum() / num_sequences
