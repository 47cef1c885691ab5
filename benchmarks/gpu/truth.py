"""Errors against the experts in fp64, one expert at a time: forward and every gradient."""

import torch
import torch.nn.functional as F
from benchmarks.gpu.common import error
from benchmarks.gpu.shapes import Weights
from torch import Tensor

# What each contender computes, by name.
Results = dict[str, Tensor]
NAMES = ("z", "x", "weights", *Weights._fields)


def errors(
    x: Tensor, ids: Tensor, weights: Tensor, w: Weights, grad: Tensor, contenders: dict[str, Results]
) -> dict[str, dict[str, float]]:
    """For each contender and result the relative error in the Frobenius norm.

    ``w`` in fp64 would not fit: of each expert's gradients only the squared distances are kept.
    """
    with torch.no_grad():
        z, gx = (torch.zeros_like(x, dtype=torch.float64) for _ in range(2))
        gweights = torch.zeros_like(weights, dtype=torch.float64).flatten()
        apart = {name: dict.fromkeys(Weights._fields, torch.zeros((), dtype=torch.float64)) for name in contenders}
        norms = dict.fromkeys(Weights._fields, torch.zeros((), dtype=torch.float64))
        order = ids.flatten().argsort(stable=True)
        start = 0
        for e, size in enumerate(torch.bincount(ids.flatten(), minlength=w.w1.shape[0]).tolist()):
            slots = order[start : start + size]
            start += size
            tokens = slots // ids.shape[1]
            w1, w3, w2 = (t[e].double() for t in w)
            x_e, g, scale = x[tokens].double(), grad[tokens].double(), weights.flatten()[slots].double().unsqueeze(1)
            h1, h3 = x_e @ w1, x_e @ w3
            sigmoid = torch.sigmoid(h1)
            a = F.silu(h1) * h3
            y = a @ w2
            z.index_add_(0, tokens, y * scale)
            gweights[slots] = (y * g).sum(1)
            gy = g * scale
            ga = gy @ w2.mT
            gh1, gh3 = ga * h3 * sigmoid * (1 + h1 * (1 - sigmoid)), ga * F.silu(h1)
            gx.index_add_(0, tokens, gh1 @ w1.mT + gh3 @ w3.mT)
            exact = {"w1": x_e.mT @ gh1, "w3": x_e.mT @ gh3, "w2": a.mT @ gy}
            for name, t in exact.items():
                norms[name] = norms[name].to(t.device) + t.square().sum()
                for contender, results in contenders.items():
                    distance = (results[name][e].double() - t).square().sum()
                    apart[contender][name] = apart[contender][name].to(t.device) + distance
        whole = {"z": z, "x": gx, "weights": gweights.view_as(weights)}
        found: dict[str, dict[str, float]] = {}
        for contender, results in contenders.items():
            found[contender] = {name: error(results[name], t) for name, t in whole.items()}
            for name, squares in apart[contender].items():
                found[contender][name] = float((squares / norms[name].clamp(min=1e-60)).sqrt())
        return found
