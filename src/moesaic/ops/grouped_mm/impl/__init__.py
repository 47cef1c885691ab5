"""Implementations of grouped_mm.

Each module has three functions, and knows nothing of the others:

``forward(x_RK, w_EKN, sizes_BG, out_dtype) -> y_RN``
``weight_grad(x_RK, grad_RN, sizes_BG, num_matrices) -> gw_EKN``
``weight_grad_into(into_EKN, x_RK, grad_RN, sizes_BG)``, which adds it to a contiguous tensor of that dtype or fp32

The input gradient is ``forward`` on ``w.mT``. They take any strides; the first two return new tensors. The blocks
share ``G`` matrices or have up to ``B * G`` of their own. Rows of a group without a matrix are an error where sizes are
read to the host; elsewhere they are not read, and zero in ``y``.
"""
