"""Implementations of experts_lora. Each has two functions.

``forward(adapted, save, impl) -> Forward``: the experts' results and, if ``save``, the pre-activations of all copies.

``backward(grad_TD, adapted, pre, wanted, impl) -> Gradients``.

``impl`` is what computes the products, by the names of grouped_mm's implementations.
"""
