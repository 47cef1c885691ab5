"""The attention of a part of the queries, with keys and values of all ranks, against attention of whole sequences."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MixtralConfig
from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
from transformers.models.mixtral.modeling_mixtral import MixtralAttention

from moesaic import ranks
from moesaic.integrations.transformers import context
from moesaic.parallel.context import _PART, Part

MASKS = {
    "causal": create_causal_mask,
    "sliding": create_sliding_window_causal_mask,
    "chunked": create_chunked_causal_mask,
}


class Case(NamedTuple):
    """What attention may meet."""

    length: int
    kind: str
    inner: str
    documents: list[int]
    padding: tuple[int, int] | None
    groups: int
    widths: tuple[int, int]
    window: int
    seed: int
    autocast: bool


cases = st.builds(
    Case,
    length=st.integers(1, 17),
    kind=st.sampled_from(sorted(MASKS)),
    inner=st.sampled_from(["sdpa", "eager", "sinks"]),
    documents=st.lists(st.integers(1, 6), max_size=4),
    padding=st.none() | st.tuples(st.integers(0, 5), st.integers(0, 5)),
    groups=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    window=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    autocast=st.sampled_from([False, False, True]),
)


# For which no mask is made.
PLAIN = [
    Case(17, "causal", "sdpa", [], None, groups=2, widths=widths, window=1, seed=0, autocast=autocast)
    for widths in [(4, 4), (3, 2)]
    for autocast in (False, True)
]


def attention_of(case: Case, sinks: Tensor) -> Any:
    """What an attention tells the functions that compute it."""
    made_by = GptOssAttention if case.inner == "sinks" else MixtralAttention
    module = type("Attention", (SimpleNamespace,), {"forward": made_by.forward})
    return module(num_key_value_groups=case.groups, is_causal=True, training=True, sinks=sinks)


def positions_of(case: Case) -> Tensor:
    """Of documents, one after the other; the last is as long as it has to be."""
    position, starts = torch.arange(case.length), torch.zeros(case.length, dtype=torch.long)
    end = 0
    for size in case.documents:
        end += size
        starts[min(end, case.length) :] = end
    return (position - starts).unsqueeze(0)


def check(case: Case) -> None:
    torch.manual_seed(case.seed)
    part = Part(case.length, dist.group.WORLD)
    B, H, (width, of_values) = 2, 2, case.widths
    shapes = ([B, H * case.groups, case.length, width], [B, H, case.length, width], [B, H, case.length, of_values])
    query, key, value = (torch.randn(shape) for shape in shapes)
    grad = torch.randn(B, case.length, H * case.groups, of_values)
    sinks = torch.randn(H * case.groups)
    padding = None
    if case.padding is not None:
        position = torch.arange(case.length)
        padding = ((position >= case.padding[0]) & (position < case.length - case.padding[1])).long().expand(B, -1)
    inner = "eager" if case.inner == "sinks" else case.inner

    def attend(name: str, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        config = MixtralConfig(sliding_window=case.window, attention_chunk_size=case.window, attn_implementation=name)
        leaves = [t.clone().requires_grad_() for t in (*tensors, sinks)]
        embeds = torch.zeros(B, tensors[0].shape[2], 1)
        mask = MASKS[case.kind](config, embeds, padding, None, positions_of(case))
        module = attention_of(case, leaves[3])
        compute: Any = ALL_ATTENTION_FUNCTIONS.get(name) or context._eager(module)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            # Norms of heads leave queries and keys in fp32.
            values = leaves[2].bfloat16() if case.autocast else leaves[2]
            out = compute(module, *leaves[:2], values, mask, scaling=0.5, dropout=0.0)[0]
        return out, leaves

    whole, expected = attend(inner, [query, key, value])
    # Not that of padding: what nobody sees is not told.
    seen = grad if padding is None else grad * padding.view(B, -1, 1, 1)
    (whole * seen).sum().backward()
    token = _PART.set(part)
    try:
        mine = [part.of(t, 2) for t in (query, key, value)]
        if part.is_empty:
            mine = [
                torch.cat([t, torch.zeros_like(whole[:, :, :1])], 2)
                for t, whole in zip(mine, (query, key, value), strict=True)
            ]
        out, leaves = attend(context._NAMES[inner], mine)
    finally:
        _PART.reset(token)
    if part.is_empty:
        out = out[:, :0]
    pairs = {"results": (out, part.of(whole, 1))}
    (out * part.of(seen, 1)).sum().backward()
    for name, leaf, true in zip(("query", "key", "value"), leaves, expected, strict=False):
        found = leaf.grad[:, :, :0] if part.is_empty else leaf.grad
        pairs[f"gradient of {name}"] = found, part.of(true.grad, 2)
    if case.inner == "sinks":
        dist.all_reduce(leaves[3].grad)
        pairs["gradient of sinks"] = leaves[3].grad, expected[3].grad
    tolerance = 0.05 if case.autocast else 1e-5
    wrong = [
        name for name, (found, true) in pairs.items() if not torch.allclose(found, true, rtol=tolerance, atol=tolerance)
    ]
    # All ranks go on with the same case.
    everyone = ranks.gather(wrong)
    assert not any(everyone), everyone


def check_cases(examples: int) -> None:
    context._register()
    # The same cases on all ranks, and so no search for a smaller one.
    phases = [Phase.explicit, Phase.generate]
    same = settings(max_examples=examples, phases=phases, derandomize=True, database=None, deadline=None)
    run = same(given(cases)(check))
    for case in PLAIN:
        run = example(case)(run)
    run()


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "examples"), [(2, 60), (4, 30)])
def test_a_part_of_the_queries_sees_what_they_see_in_the_whole(same_ranks, world_size, examples):
    same_ranks(check_cases, world_size, examples)


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, 3, 5])
def test_more_of_them(same_ranks, world_size):
    same_ranks(check_cases, world_size, 400)
