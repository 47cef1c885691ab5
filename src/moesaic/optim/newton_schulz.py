"""The nearest orthogonal matrix, about, by a few products.

Legend: B matrices, M rows, N columns.
"""

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]

# As torch.optim.Muon has them, from Jordan (2024).
COEFFICIENTS: Coefficients = (3.4445, -4.7750, 2.0315)


def orthogonalize(x_BMN: Tensor, *, coefficients: Coefficients, steps: int, eps: float) -> Tensor:
    """``U V^T``, about, of each matrix ``U S V^T``: singular values end between 0.7 and 1.2.

    Newton-Schulz: ``X <- a X + (b A + c A^2) X`` with ``A = X X^T``, from ``X / max(|X|, eps)``, in the dtype of ``x``.
    A matrix of zeros stays one. All matrices go through each product together, by ``torch.bmm`` and its like. ``x``
    is not changed.
    """
    if x_BMN.numel() == 0:
        return x_BMN
    a, b, c = coefficients
    # The smaller product of the two: A is [M, M] with M <= N.
    tall = x_BMN.shape[1] > x_BMN.shape[2]
    x = x_BMN.mT if tall else x_BMN
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, update, x, beta=a)
    return x.mT if tall else x
