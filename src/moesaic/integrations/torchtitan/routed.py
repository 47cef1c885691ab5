"""Routed experts over ep x etp, inside torchtitan's model, FSDP, optimizers and checkpoints.

Weights keep torchtitan's names, shapes and, without etp, its placements. A token goes once to each rank that has some
of its experts, and its results come back summed.

Legend: B batch, L sequence, D model dim, K top-k, T tokens of this rank, E experts.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

import moesaic
from moesaic.integrations.torchtitan.forms import GPT_OSS, SWIGLU, Form, local_operands, operands_on
from moesaic.integrations.torchtitan.hidden import HiddenAxis, check_halves, hidden_axis
from moesaic.integrations.torchtitan.meshes import ExpertMesh, expert_mesh
from moesaic.integrations.torchtitan.unchecked import unchecked
from moesaic.layers.dispatch import Dispatched, Dispatcher, LocalDispatcher
from moesaic.layers.router import Routing
from moesaic.parallel.dispatch import MeshDispatcher


class _OnMesh(GroupedExperts):
    """Experts that get tokens with their routing. Their parameters are those of the class that is mixed in."""

    form: Form
    etp: int
    expert_mesh: ExpertMesh | None = None
    _hidden_axis: HiddenAxis | None = None

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        self.expert_mesh = expert_mesh(parallel_dims, self.etp)
        self._hidden_axis = hidden_axis(parallel_dims)
        if self.form is GPT_OSS:
            check_halves(self.mlp1_weight_EGD, self._hidden_axis)
        if self.expert_mesh is None or self.etp == 1:  # torchtitan's own placements, in every backend
            super().parallelize(parallel_dims)
            return
        self._parallelized = True
        for name, weight in list(self.named_parameters(recurse=False)):
            placements = self.form.placements(name)
            shard = distribute_tensor(weight.detach(), self.expert_mesh.mesh, placements, src_data_rank=None).clone()
            setattr(self, name, nn.Parameter(shard, requires_grad=weight.requires_grad))

    def forward(self, sent: Dispatched) -> Tensor:
        if self.etp > 1:
            assert self.expert_mesh is not None
            t = operands_on(self.expert_mesh.mesh, self, self.form)
        else:
            t = local_operands(self, self.form, self._hidden_axis)
        return moesaic.experts_mlp(
            sent.x.to(t["w1"].dtype),
            sent.topk_ids,
            sent.topk_weights,
            t["w1"],
            t["w3"],
            t["w2"],
            activation=self.form.activation,
            b1=t.get("b1"),
            b3=t.get("b3"),
            b2=t.get("b2"),
            copies=sent.copies,
        )


class SwiGLUExperts(_OnMesh):
    form = SWIGLU

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        etp: int = 1

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.etp = config.etp


class GptOssExperts(_OnMesh, GptOssGroupedExperts):
    form = GPT_OSS

    @dataclass(kw_only=True, slots=True)
    class Config(GptOssGroupedExperts.Config):
        etp: int = 1

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.etp = config.etp


class MeshRoutedExperts(RoutedExperts):
    """torchtitan's ``local_map`` region. It gets this rank's tokens and their routing, as plain tensors."""

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        pass

    inner_experts: _OnMesh

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.dispatcher: Dispatcher = LocalDispatcher()

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        super().parallelize(parallel_dims)
        over = self.inner_experts.expert_mesh
        if over is not None:
            self.dispatcher = MeshDispatcher(over.mesh, local=self.inner_experts.etp == 1, everyone=over.everyone)

    def forward(
        self,
        x_BLD: Tensor,
        topk_scores_BLK: Tensor,
        topk_expert_ids_BLK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> Tensor:
        experts = self.inner_experts
        if experts.etp > 1 and experts.expert_mesh is None:
            # torchtitan lays nothing out where its ep and tp degrees are 1, so nothing was asked before.
            raise ValueError(
                f"etp: {experts.etp} splits the ranks of expert_parallel_degree, which is 1; set "
                f"--parallelism.expert_parallel_degree to ep * etp, at least {experts.etp}"
            )
        with unchecked():
            routing = Routing(topk_expert_ids_BLK.flatten(0, 1), topk_scores_BLK.flatten(0, 1))
            sent = self.dispatcher.dispatch(x_BLD.flatten(0, 1), routing, experts.num_experts)
            z = self.dispatcher.combine(experts(sent), sent)
            return z.to(x_BLD.dtype).view_as(x_BLD)
