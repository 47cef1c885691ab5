"""Block sizes by kernel, dtype, shape class and GPU, and the tuner that may replace them.

The table is a guess that compiles without spills into the shared memory there is: it awaits measurement on a GPU.
``MOESAIC_TRITON_AUTOTUNE=1`` in the environment has each launch timed in a few configurations the first time it is met;
see :mod:`moesaic.ops.triton.tuner`. Without it no call takes longer than compilation.

Legend: M, N, K the block of the result and of the sum. In ``weight_grad`` M x N is a block of the gradient, and the sum
is over rows.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.ops.choices import shape_class
from moesaic.ops.triton import device, tuner
from moesaic.ops.triton.maps import Groups
from moesaic.ops.triton.tiles import precision


@dataclass(frozen=True)
class Config:
    """How a kernel is launched: block sizes, height of a band of tiles, warps, stages, programs a multiprocessor.

    ``specialized``: one group of warps loads while others multiply and store, where all comes by descriptor.
    """

    BM: int
    BN: int
    BK: int
    GROUP_M: int = 8
    warps: int = 8
    stages: int = 3
    ctas: int = 1
    specialized: bool = False

    def grid(self, num_sms: int, pieces: int) -> tuple[int]:
        """Programs of a persistent kernel: as many as the GPU holds at once, and no more than there are pieces."""
        return (min(num_sms * self.ctas, pieces),)

    def options(self) -> dict[str, int]:
        """What a kernel is launched with."""
        blocks = {"BM": self.BM, "BN": self.BN, "BK": self.BK, "GROUP_M": self.GROUP_M}
        return blocks | {"num_warps": self.warps, "num_stages": self.stages}


_HALF_TABLE = {
    ("matmul", "few"): {
        "hopper": Config(16, 64, 128, warps=4, stages=4, ctas=2),
        "ampere": Config(16, 64, 128, warps=4, stages=3, ctas=2),
        "small": Config(16, 64, 64, warps=4, stages=3, ctas=2),
    },
    ("matmul", "some"): {
        "hopper": Config(64, 128, 64, warps=4, stages=4, ctas=2),
        "ampere": Config(64, 128, 64, warps=4, stages=3),
        "small": Config(64, 64, 64, warps=4, stages=2),
    },
    ("matmul", "many"): {
        "hopper": Config(128, 256, 64, warps=4, stages=4, specialized=True),
        "ampere": Config(128, 128, 64, warps=8, stages=3),
        "small": Config(128, 64, 64, warps=4, stages=2),
    },
    ("up_projection", "few"): {
        "hopper": Config(16, 64, 64, warps=4, stages=4, ctas=2),
        "ampere": Config(16, 64, 64, warps=4, stages=3, ctas=2),
        "small": Config(16, 64, 64, warps=4, stages=2, ctas=2),
    },
    ("up_projection", "some"): {
        "hopper": Config(64, 64, 64, warps=4, stages=4, ctas=2),
        "ampere": Config(64, 64, 64, warps=4, stages=3),
        "small": Config(64, 64, 64, warps=4, stages=2),
    },
    ("up_projection", "many"): {
        "hopper": Config(128, 128, 64, warps=8, stages=4),
        # 128 columns of both projections are more than its registers hold.
        "ampere": Config(128, 64, 64, warps=8, stages=3),
        "small": Config(64, 64, 64, warps=4, stages=2),
    },
    ("down_gradient", "few"): {
        "hopper": Config(16, 64, 128, warps=4, stages=4, ctas=2),
        "ampere": Config(16, 64, 128, warps=4, stages=3, ctas=2),
        "small": Config(16, 64, 64, warps=4, stages=2, ctas=2),
    },
    ("down_gradient", "some"): {
        "hopper": Config(64, 128, 64, warps=4, stages=4, ctas=2),
        "ampere": Config(64, 64, 64, warps=4, stages=3),
        "small": Config(64, 64, 64, warps=4, stages=2),
    },
    ("down_gradient", "many"): {
        "hopper": Config(128, 128, 64, warps=8, stages=4),
        "ampere": Config(128, 128, 32, warps=8, stages=4),
        "small": Config(64, 64, 64, warps=4, stages=2),
    },
    ("weight_grad", "few"): {
        "hopper": Config(128, 128, 16, warps=8, stages=3),
        "ampere": Config(128, 128, 16, warps=8, stages=3),
        "small": Config(64, 64, 16, warps=4, stages=2),
    },
    ("weight_grad", "some"): {
        "hopper": Config(128, 128, 64, warps=8, stages=3),
        "ampere": Config(128, 128, 32, warps=8, stages=3),
        "small": Config(64, 64, 32, warps=4, stages=2),
    },
    ("weight_grad", "many"): {
        "hopper": Config(128, 256, 64, warps=8, stages=3),
        "ampere": Config(128, 128, 64, warps=8, stages=3),
        "small": Config(64, 64, 64, warps=4, stages=2),
    },
}

# Without tensor cores (TF32 is off by default) registers are the limit.
_FP32 = {
    "few": Config(16, 64, 32, warps=4, stages=3, ctas=2),
    "some": Config(64, 64, 32, warps=8, stages=2),
    "many": Config(64, 64, 32, warps=8, stages=2),
}

_INTERPRETED = Config(32, 32, 32, GROUP_M=2)


# Of kernels whose configuration a program has fixed, by `using`.
_FIXED: dict[str, Config] = {}


@contextlib.contextmanager
def using(kernel: str, config: Config) -> Iterator[None]:
    """Within, every launch of ``kernel`` is in this configuration; for measurements."""
    _FIXED[kernel] = config
    try:
        yield
    finally:
        del _FIXED[kernel]


class Launch(NamedTuple):
    """What the best configuration of a launch depends on, beside the GPU.

    Attributes:
        kernel: its row of the table.
        x: an operand, for its dtype and device.
        K, N: the matrix dims.
        groups: of its rows.
        compiled_for: the constants of the kernel but for the configuration and what follows from it, and the layouts of
            its operands.
        gathers, adds: of ``weight_grad``: whether rows are gathered, and whether it adds to what is there.
        by_descriptor, can_specialize: of ``matmul``: whether all that it loads comes by descriptor, and whether groups
            of warps may then do different things.
    """

    kernel: str
    x: Tensor
    K: int
    N: int
    groups: Groups
    compiled_for: Mapping[str, object]
    gathers: bool = False
    adds: bool = False
    by_descriptor: bool = False
    can_specialize: bool = False

    @property
    def is_unaligned(self) -> bool:
        """Whether elements of an operand come one by one."""
        return any("unaligned" in str(layout) for layout in self.compiled_for.values())

    @property
    def key(self) -> str:
        """In words: launches with the same are tuned once. Of the rows it has the power of two."""
        (B, G), rows = self.groups.bounds.shape, self.groups.num_rows
        names = ("gathers", "adds", "by_descriptor", "can_specialize")
        told = {**self.compiled_for, **{name: getattr(self, name) for name in names}}
        return (
            f"{self.kernel} {self.x.dtype} {precision(self.x.dtype)} K={self.K} N={self.N} blocks={B} groups={G - 2} "
            f"shared={self.groups.is_shared} rows=2^{rows.bit_length()} "
            + " ".join(f"{name}={value}" for name, value in sorted(told.items()))
        )


def choose(launch: Launch, run: Callable[[Config], object]) -> Config:
    """The configuration of a launch; ``run(config)`` is the launch, for the tuner to time."""
    if launch.kernel in _FIXED:
        return _FIXED[launch.kernel]
    default = default_of(launch)
    return default if tuner.mode() == "off" else tuner.best(launch.key, default, launch.x.device, run)


def default_of(launch: Launch) -> Config:
    """The configuration that the table has for a launch."""
    B, G = launch.groups.bounds.shape[0], launch.groups.bounds.shape[1] - 2
    shape = shape_class(launch.groups.num_rows, B * G)
    gpu = device.describe(launch.x.device)
    config = table(launch.kernel, launch.x.dtype, shape, gpu.kind)
    if launch.gathers and gpu.is_sm90 and launch.x.dtype != torch.float32:
        # The loads of the rows' numbers take two stages of their own: so there are as many buffers of the rows.
        config = replace(config, stages=config.stages + 2)
    if config.specialized and not (gpu.is_sm90 and launch.can_specialize):
        # All warps compute, so that the sums are spread over as many.
        config = replace(config, specialized=False, warps=2 * config.warps, stages=config.stages - 1)
    if gpu.has_tma and config.BM == 128:
        # Pointers need registers beside the sum, of elements that come one by one the most.
        if launch.is_unaligned:
            config = replace(config, BN=min(config.BN, 64), BK=min(config.BK, 32))
        elif launch.kernel == "matmul" and not launch.by_descriptor:
            config = replace(config, BN=min(config.BN, 128), BK=min(config.BK, 32))
        elif launch.compiled_for.get("y") == torch.float32 and not gpu.is_sm90:
            # On 10.0 results of fp32 go through registers.
            config = replace(config, BN=min(config.BN, 128))
    if launch.adds and gpu.kind != "interpreted":
        # What is added to needs registers beside the sum.
        config = replace(config, BN=min(config.BN, 128))
    return config


def table(kernel: str, dtype: torch.dtype, shape: str, kind: str) -> Config:
    """The row of the table."""
    if kind == "interpreted":
        return _INTERPRETED
    return _FP32[shape] if dtype == torch.float32 else _HALF_TABLE[kernel, shape][kind]
