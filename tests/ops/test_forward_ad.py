"""Forward-mode differentiation is refused, never silently zero."""

import pytest
import torch

from moesaic.ops import combine, experts_mlp, grouped_mm, permute, sort_by_expert


# torch.func.jvp scripts decompositions of its own on first use.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["grouped_mm", "permute", "combine", "experts_mlp"])
def test_tangents_are_refused(name):
    x, w = torch.randn(3, 4), torch.randn(2, 4, 5)
    permutation = sort_by_expert(torch.tensor([[0], [1], [0]]), 2)
    ids, weights = torch.tensor([[0], [1], [0]]), torch.ones(3, 1)
    function = {
        "grouped_mm": lambda x: grouped_mm(x, w, permutation.group_sizes),
        "permute": lambda x: permute(x, permutation),
        "combine": lambda x: combine(x, permutation),
        "experts_mlp": lambda x: experts_mlp(x, ids, weights, w, w, w.mT),
    }[name]
    with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode derivative.*use reverse mode"):
        torch.func.jvp(function, (x,), (x,))
    # Nothing carries a tangent here.
    torch.func.jvp(lambda y: y * function(x).sum(), (x,), (x,))
