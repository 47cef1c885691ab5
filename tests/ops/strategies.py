"""Problems for grouped_mm: every form of group sizes, awkward shapes and strides, poison wherever nothing may look.

Legend: R rows, K and N the matrix dims, B blocks, C rows a block, G groups a block, W weight matrices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FORMS = ("flat", "own", "shared")
STRIDES = ("contiguous", "transposed", "sliced", "stepped", "expanded")

# 64 is the height of a row tile; the others are odd, unaligned, or leave a tile partly filled.
_DIMS = (1, 2, 3, 7, 8, 16, 17, 33)
_SMALL_SIZES = (0, 0, 1, 2, 3, 5, 9)
_LARGE_SIZES = (63, 64, 65, 130)


@dataclass(frozen=True)
class Layout:
    """Sizes of the groups of each block, and rows a block.

    In the form "own" each block has its own matrices, in "shared" all the same; the last ``missing`` groups have none.
    """

    form: str
    sizes: tuple[tuple[int, ...], ...]
    num_groups: int
    capacity: int
    missing: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.sizes) * self.capacity

    @property
    def num_weights(self) -> int:
        return self.num_groups * (1 if self.form == "shared" else len(self.sizes)) - self.missing

    @property
    def experts(self) -> list[int]:
        """The matrix that each row meets, -1 for a padding row."""
        experts = []
        for b, sizes in enumerate(self.sizes):
            first = b * self.num_groups if self.form == "own" else 0
            block = [first + g for g, size in enumerate(sizes) for _ in range(size)]
            experts += block + [-1] * (self.capacity - len(block))
        return experts

    def tensor(self, dtype: torch.dtype = torch.int64) -> Tensor:
        if self.form == "flat":
            return torch.tensor(self.sizes[0], dtype=dtype)
        return torch.tensor(self.sizes, dtype=dtype).reshape(len(self.sizes), self.num_groups)


def layout(form: str, sizes: Sequence[Sequence[int]], *, slack: int = 0, missing: int = 0) -> Layout:
    """A layout whose fullest block has ``slack`` padding rows. The flat form has the first block alone."""
    sizes = tuple(tuple(block) for block in (sizes[:1] if form == "flat" else sizes))
    num_groups = len(sizes[0]) if sizes else 0
    return Layout(form, sizes, num_groups, max((sum(block) for block in sizes), default=0) + slack, missing)


@dataclass(frozen=True, repr=False)
class Problem:
    """Operands of a product and the gradient of its result. ``experts[r]`` is -1 for a padding row.

    Padding rows of ``x`` and ``grad`` and matrices of idle experts are NaN, and so is the memory between and around
    the elements of strided operands: a result that depends on any of them cannot be right.
    """

    x: Tensor
    w: Tensor
    group_sizes: Tensor
    grad: Tensor
    experts: list[int]
    exact: bool

    def __repr__(self) -> str:
        shapes = ", ".join(
            f"{name} {list(t.shape)} strides {t.stride()} offset {t.storage_offset()}"
            for name, t in (("x", self.x), ("w", self.w), ("grad", self.grad))
        )
        return f"Problem({self.x.dtype}, sizes {self.group_sizes.tolist()}, exact {self.exact}, {shapes})"


def problem(
    layout: Layout,
    K: int,
    N: int,
    dtype: torch.dtype,
    *,
    exact: bool = True,
    strides: tuple[str, str, str] = ("contiguous",) * 3,
    index_dtype: torch.dtype = torch.int64,
    seed: int = 0,
    device: str = "cpu",
) -> Problem:
    """A problem with the given layout; ``strides`` are those of x, w and the gradient.

    With ``exact`` the values are integers so small that every sum of products is exact in the type that accumulates,
    in any order: a right result has the bits of the rounded fp64 result. Otherwise they are normal.
    """
    generator = torch.Generator().manual_seed(seed)
    experts = torch.tensor(layout.experts, dtype=torch.int64)

    def values(*shape: int) -> Tensor:
        if not exact:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        largest = 2**20 if dtype == torch.float64 else 16
        return torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)

    def poisoned(t: Tensor, where: Tensor, kind: str) -> Tensor:
        if kind != "expanded":
            t[where] = torch.nan
        return with_strides(t, kind).to(device)

    idle = torch.bincount(experts + 1, minlength=layout.num_weights + 1)[1:] == 0
    return Problem(
        poisoned(values(layout.num_rows, K), experts < 0, strides[0]),
        poisoned(values(layout.num_weights, K, N), idle, strides[1]),
        layout.tensor(index_dtype).to(device),
        poisoned(values(layout.num_rows, N), experts < 0, strides[2]),
        experts.tolist(),
        exact,
    )


def with_strides(t: Tensor, kind: str) -> Tensor:
    """The values of ``t`` in memory of another kind; "expanded" repeats the first slice with stride 0."""
    match kind:
        case "contiguous":
            return t.contiguous()
        case "transposed":
            return t.mT.contiguous().mT
        case "sliced":
            whole = t.new_full((*t.shape[:-1], t.shape[-1] + 3), torch.nan)
            part = whole[..., 1:-2]
        case "stepped":
            whole = t.new_full((*t.shape[:-2], 2 * t.shape[-2], 2 * t.shape[-1]), torch.nan)
            part = whole[..., ::2, ::2]
        case "expanded":
            return t[:1].expand_as(t)
        case _:
            raise AssertionError(kind)
    part.copy_(t)
    return part


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    form = draw(st.sampled_from(FORMS))
    B = 1 if form == "flat" else draw(st.integers(1, 4))
    G = draw(st.integers(1, 5))
    kind = draw(st.sampled_from(("mixed", "mixed", "mixed", "one expert", "empty")))
    if kind == "mixed":
        block = st.lists(st.sampled_from(_SMALL_SIZES), min_size=G, max_size=G)
        sizes = draw(st.lists(block, min_size=B, max_size=B))
    else:
        sizes = [[0] * G for _ in range(B)]
    if kind == "one expert" or (kind == "mixed" and draw(st.booleans())):
        b, g = draw(st.integers(0, B - 1)), draw(st.integers(0, G - 1))
        sizes[b][g] = draw(st.sampled_from(_LARGE_SIZES))
    missing = 0
    if form == "own" and draw(st.booleans()):
        missing = draw(st.integers(0, B - 1))
        sizes = without_last(sizes, missing)
    return layout(form, sizes, slack=draw(st.sampled_from((0, 0, 1, 6))), missing=missing)


def without_last(sizes: Sequence[Sequence[int]], missing: int) -> tuple[tuple[int, ...], ...]:
    """The sizes, the last ``missing`` groups being empty."""
    G = len(sizes[0])
    end = len(sizes) * G - missing
    return tuple(tuple(n if b * G + g < end else 0 for g, n in enumerate(block)) for b, block in enumerate(sizes))


@st.composite
def problems(draw: st.DrawFn, *, exact: bool, device: str = "cpu", dtypes: Sequence[torch.dtype] = DTYPES) -> Problem:
    # An fp64 result has no oracle but where it is exact, and where nothing is summed there is no error.
    dtypes = [dtype for dtype in dtypes if exact or dtype != torch.float64]
    dims = st.sampled_from((0, *_DIMS) if exact else _DIMS)
    return problem(
        draw(layouts()),
        draw(dims),
        draw(dims),
        draw(st.sampled_from(dtypes)),
        exact=exact,
        strides=draw(st.tuples(*[st.sampled_from(STRIDES)] * 3)),
        index_dtype=draw(st.sampled_from((torch.int32, torch.int64))),
        seed=draw(st.integers(0, 2**16)),
        device=device,
    )
