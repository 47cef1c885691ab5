"""The expert parameters of torchtitan's modules: their names there, and what operands of ``experts_mlp`` they are.

Legend: E experts, D model dim, F hidden dim, G = 2F: gate and up, interleaved.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from moesaic.integrations.torchtitan.hidden import HiddenAxis
from moesaic.ops import Activation
from moesaic.parallel.placements import TERMS, WEIGHTS


class Form(NamedTuple):
    """One kind of expert.

    Attributes:
        activation: as :func:`moesaic.experts_mlp` names it.
        cuts: for every parameter, the dim along which etp cuts it; None where each etp rank has it whole.
        operands: parameters by torchtitan's names, as operands of ``experts_mlp`` by ours. Views, no copies.
    """

    activation: Activation
    cuts: Mapping[str, int | None]
    operands: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

    def placements(self, name: str) -> tuple[Placement, Placement]:
        """Where a parameter lies on (ep, etp)."""
        cut = self.cuts[name]
        return Shard(0), Replicate() if cut is None else Shard(cut)


SWIGLU = Form(
    "silu",
    {"w1_EFD": 1, "w3_EFD": 1, "w2_EDF": 2},
    lambda p: {"w1": p["w1_EFD"].mT, "w3": p["w3_EFD"].mT, "w2": p["w2_EDF"].mT},
)

GPT_OSS = Form(
    "clamped_swiglu",
    {"mlp1_weight_EGD": 1, "mlp1_bias_EG": 1, "mlp2_weight_EDF": 2, "mlp2_bias_ED": None},
    lambda p: {
        "w1": p["mlp1_weight_EGD"][:, ::2].mT,
        "w3": p["mlp1_weight_EGD"][:, 1::2].mT,
        "w2": p["mlp2_weight_EDF"].mT,
        "b1": p["mlp1_bias_EG"][:, ::2],
        "b3": p["mlp1_bias_EG"][:, 1::2],
        "b2": p["mlp2_bias_ED"],
    },
)


def local_part(weight: Tensor) -> Tensor:
    """This rank's part of a parameter, which is a DTensor in some of torchtitan's backends. Its gradient lies alike."""
    return weight.to_local(grad_placements=weight.placements) if isinstance(weight, DTensor) else weight


def local_operands(experts: nn.Module, form: Form, hidden: HiddenAxis | None) -> dict[str, Tensor]:
    """The operands of this rank.

    Args:
        experts: the module that has the parameters.
        form: what they are.
        hidden: the axis whose ranks have parts of the hidden dim; None if it is not cut.
    """
    operands = form.operands({name: local_part(getattr(experts, name)) for name in form.cuts})
    if hidden is None:
        return operands
    return {name: hidden.counted_once(t) if name in TERMS else t for name, t in operands.items()}


def operands_on(mesh: DeviceMesh, experts: nn.Module, form: Form) -> dict[str, Tensor]:
    """The operands as DTensors on an (ep, etp) mesh, where the parameters lie already."""
    return {
        name: DTensor.from_local(local, mesh, WEIGHTS[name], run_check=False)
        for name, local in local_operands(experts, form, None).items()
    }
