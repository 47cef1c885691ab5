"""Implementations of experts_mlp.

Each module has two functions, and knows nothing of the others:

``forward(problem, save) -> Forward``: the pre-activations are given back only if they are to be saved
``backward(grad_TD, problem, h1_TKF, h3_TKF, needs) -> Gradients``

They take any strides and return new tensors. Half types are accumulated in fp32; the pre-activations and their gated
product are rounded to the operands' dtype, since that is what the next product takes. The sum over copies is rounded
once.
"""
