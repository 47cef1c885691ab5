"""The hidden dim of experts under torchtitan's tensor parallelism, which cuts it without expert parallelism."""

from typing import NamedTuple

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.distributed import ParallelDims

from moesaic.parallel.local import counted_once


class HiddenAxis(NamedTuple):
    """The axis whose ranks have parts of each expert's hidden dim, and sum their results.

    Attributes:
        mesh: the axis.
        sums_gradients: whether the gradients of what all of its ranks have are summed over it afterwards, as in the
            backend ``spmd_types``. In the others each rank's gradient is the whole one.
    """

    mesh: DeviceMesh
    sums_gradients: bool

    def counted_once(self, bias: Tensor) -> Tensor:
        """A term of the sum that all ranks have: itself on one of them, zeros on the others."""
        if self.sums_gradients:
            return bias * float(self.mesh.get_local_rank() == 0)
        return counted_once(bias, self.mesh)


def hidden_axis(parallel_dims: ParallelDims) -> HiddenAxis | None:
    """The axis along which torchtitan cuts the hidden dim of experts; None if it cuts none."""
    if parallel_dims.ep > 1 or parallel_dims.tp == 1:
        return None
    return HiddenAxis(parallel_dims.get_dense_tp_mesh(), parallel_dims.spmd_backend == "spmd_types")


def check_halves(gate_and_up_EGD: Tensor, axis: HiddenAxis | None) -> None:
    """Raise ``ValueError`` unless each rank gets as many rows of the gate as of the projection up, interleaved."""
    hidden_dim = gate_and_up_EGD.shape[1] // 2
    if axis is not None and hidden_dim % axis.mesh.size():
        raise ValueError(
            f"tensor_parallel_degree: {axis.mesh.size()} does not divide the experts' hidden_dim {hidden_dim}; choose "
            "a divisor of it, for gate and up are interleaved and would come apart"
        )
