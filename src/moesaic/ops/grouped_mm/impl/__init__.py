"""Implementations of grouped_mm.

Each module has two functions, and knows nothing of the others:

``forward(x_RK, w_EKN, sizes_BG, out_dtype) -> y_RN``
``weight_grad(x_RK, grad_RN, sizes_BG, shared) -> gw_EKN``

The input gradient is ``forward`` on ``w.mT``. Both functions take any strides and return new tensors.
"""
