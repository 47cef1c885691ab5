"""The interface of fanshiqing/grouped_gemm (and of tgale96/grouped_gemm, whose ``gmm`` it has), computed by moesaic.

Replace ``import grouped_gemm`` by ``import moesaic.compat.grouped_gemm as grouped_gemm``, and
``from grouped_gemm import ops`` by ``from moesaic.compat.grouped_gemm import ops``. What is better here:

* every dtype of :func:`moesaic.grouped_mm`, any strides, CPU and CUDA;
* ``batch_sizes`` may be on any device, and may be all zero;
* gradients of any order, ``torch.compile``, and the same bits in every run.

Not here, and refused by name: ``sinkhorn``, and fp8 operands.
"""

from moesaic.compat.grouped_gemm import backend, ops
from moesaic.compat.grouped_gemm.ops import gmm, permute, sinkhorn_kernel, unpermute

__all__ = ["backend", "gmm", "ops", "permute", "sinkhorn_kernel", "unpermute"]
