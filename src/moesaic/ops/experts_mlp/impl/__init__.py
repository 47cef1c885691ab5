"""Implementations of experts_mlp.

Each module has two functions, and knows nothing of the others:

``forward(problem, save) -> Forward``: what the projections gave is kept only if it is to be saved
``backward(grad_TD, problem, pre, wanted) -> Gradients``: the gradients of tokens and routing weights are given back,
those of projections go to the targets in ``wanted``

They take any strides. Half types are accumulated in fp32; what the projections give and the hidden rows are rounded to
the operands' dtype, since that is what the next product takes. The sum over copies is rounded once.
"""
