"""The hidden dim of experts under torchtitan's tensor parallelism, which cuts it where there is no expert parallelism."""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.distributed import ParallelDims


def hidden_axis(parallel_dims: ParallelDims) -> DeviceMesh | None:
    """The axis whose ranks have parts of each expert's hidden dim, and sum their results; None if there is none."""
    if parallel_dims.ep > 1 or parallel_dims.tp == 1:
        return None
    return parallel_dims.get_dense_tp_mesh()


def check_halves(gate_and_up_EGD: Tensor, axis: DeviceMesh | None) -> None:
    """Raise ``ValueError`` unless each rank gets as many rows of the gate as of the projection up, interleaved."""
    hidden_dim = gate_and_up_EGD.shape[1] // 2
    if axis is not None and hidden_dim % axis.size():
        raise ValueError(
            f"tensor_parallel_degree: {axis.size()} does not divide the experts' hidden_dim {hidden_dim}; choose a "
            "divisor of it, for gate and up are interleaved and would come apart"
        )
