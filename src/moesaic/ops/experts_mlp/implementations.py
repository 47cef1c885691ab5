"""The implementations of experts_mlp, by the names of grouped_mm's."""

from types import ModuleType

from moesaic.ops import native
from moesaic.ops.experts_mlp.impl import cpu, reference
from moesaic.ops.experts_mlp.impl import torch as torch_impl
from moesaic.ops.experts_mlp.impl import triton as triton_impl
from moesaic.ops.experts_mlp.problem import Problem
from moesaic.ops.fastest import Call
from moesaic.ops.implementations import Row, choose, takes_all
from moesaic.ops.triton import available

IMPLEMENTATIONS: dict[str, Row] = {
    "reference": Row(reference, takes_all),
    "torch": Row(torch_impl, takes_all),
    "cpu": Row(cpu, native.refuses),
    "triton": Row(triton_impl, available.refuses),
}


def module_for(operator: str, impl: str | None, problem: Problem) -> ModuleType:
    """What computes this call of an operator."""
    call = Call(operator, (problem.x_TD,), problem.num_lines, problem.num_experts)
    return choose(IMPLEMENTATIONS, impl, call)
