"""Tuning of the Triton kernels on several ranks: one tunes, all use what it found."""

from collections.abc import Callable

import torch

from moesaic import ranks
from moesaic.ops.triton import available


def tune_kernels(run: Callable[[], object]) -> dict[str, dict[str, object]]:
    """Rank 0 calls ``run()`` and times the configurations of every Triton launch in it; all ranks use the fastest.

    Call it before training, on all ranks. ``run`` is called on rank 0 alone, so it must not communicate: it runs the
    operators, or layers that are not parallelized, on tensors of the sizes that a rank will have, in both passes::

        def steps():
            for tokens in (64, 4096):
                x = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                layer(x).sum().backward()

        moesaic.parallel.tune_kernels(steps)

    What rank 0's file knows already is not timed again; see ``MOESAIC_CACHE_DIR``. Launches that ``run`` did not make
    have their default configurations afterwards: nothing is tuned within a step.

    Returns:
        for each launch, in words, its ``"config"``, and in ``"failed"`` the configurations that failed, and why.

    Raises:
        ValueError: the ranks have different GPUs, or triton versions.
        Exception: what ``run`` raised on rank 0, on all ranks.
    """
    tuner = available.load("tuner")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    ranks.agree({"GPU": tuner.device_name(device), "triton": tuner.triton.__version__}, "GPUs or versions")

    def tune() -> dict[str, dict[str, object]]:
        with tuner.tuning():
            run()
        return tuner.table(device)

    entries = ranks.on_leader(tune)
    tuner.adopt(entries, device)
    return entries
