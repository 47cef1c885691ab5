"""Forward-mode differentiation, which our operators do not have."""

from torch import Tensor
from torch.autograd import forward_ad


def refuse_forward_ad(name: str, *tensors: Tensor | None) -> None:
    """Raise where a tensor carries a tangent: torch would drop it without a word.

    Raises:
        NotImplementedError: naming the operator and the way out.
    """
    if forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd); use reverse mode, "
            "torch.autograd.grad or backward"
        )
