"""The instruction sets of this machine, for tests that run the CPU kernels on each; and which dtypes they have.

`python -m tests.ops.cpu_isa` prints them without the usual one, which is the default, and without AMX, which is bf16
alone.
"""

import pytest
import torch
from hypothesis import HealthCheck, settings

from moesaic.ops import native
from moesaic.ops.native import DTYPES, Kernels, kernels
from moesaic.ops.processor import INSTRUCTION_SETS, processor
from tests.ops import strategies

_LOADED = kernels()
HERE = tuple(
    name
    for i, name in enumerate(INSTRUCTION_SETS)
    if isinstance(_LOADED, Kernels) and _LOADED.library.moesaic_cpu_has_isa(i)
)
TILED = tuple(name for name in HERE if name.startswith("amx"))

# For tests that run every implementation: its name where the kernels are.
CPU = ("cpu",) if HERE else ()

each_isa = pytest.mark.parametrize("isa", HERE)
# Tiles are of bf16: in fp32 these instruction sets have another's kernels.
each_isa_in_fp32 = pytest.mark.parametrize("isa", [isa for isa in HERE if isa not in TILED])
each_isa_and_dtype = pytest.mark.parametrize(
    ("isa", "dtype"), [(isa, dtype) for isa in HERE for dtype in DTYPES if isa not in TILED or dtype is torch.bfloat16]
)
# The fixture only says which instruction set all examples use.
same_for_all_examples = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

needs_kernels = pytest.mark.skipif(not HERE, reason=f"no CPU kernels: {_LOADED}")


def use(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    """Let ``impl="cpu"`` run on an instruction set."""
    loaded = Kernels(_LOADED.library, INSTRUCTION_SETS.index(isa))
    monkeypatch.setattr(native, "kernels", lambda: loaded)


def dtypes_of(impl: str | None) -> tuple[torch.dtype, ...]:
    """The dtypes that an implementation computes in."""
    return tuple(DTYPES) if impl == "cpu" else strategies.DTYPES


def skip_unless_supported(impl: str | None, dtype: torch.dtype, device: str = "cpu") -> None:
    if dtype not in dtypes_of(impl) or (impl == "cpu" and device != "cpu"):
        pytest.skip(f"{impl} has no {dtype} on {device}")


if __name__ == "__main__":
    print("none", *(name for name in HERE if name not in (*TILED, processor().usual)))
