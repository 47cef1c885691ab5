"""Triton kernels, and what launches them. Shared by operators, which have an ``impl/triton.py`` each.

Nothing here is imported before an implementation named ``"triton"`` is asked for: importing moesaic needs no triton.

===================  ================================================================================================
``available``        whether the kernels can run on a tensor, and what to do where they cannot
``device``           what of a GPU a launch depends on
``configs``          block sizes by kernel, dtype, shape class and GPU
``tuner``            what was measured to be faster than those, where somebody asked for it
``maps``             tile maps: which rows of which group a program computes, built on the device
``routing``          top-k ids -> rows sorted by expert, on the device
``tiles``            what kernels share: the order of tiles, loads, a product; records of their operands
``matmul``           rows of a group times its weight
``weight_grad``      the sum over a group's rows of outer products
``up_projection``    gather, two products, activation
``warps``            the up projection by groups of warps, in Gluon; off by default
``down_gradient``    the gradient of the hidden rows and of the routing weights
``combine``          the weighted sum of a token's rows
===================  ================================================================================================

Kernels take the number of tiles from the device and never read it to the host, so that they can be captured in a CUDA
graph and replayed with other group sizes.
"""
