"""Sizes of a rule's factors, which line they choose, and blocks that are cut between blocks only."""

import itertools
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.sharding import parse, rule_of
from moesaic.sharding.notation import Notation
from moesaic.sharding.rule import make_rule
from moesaic.sharding.sizes import divides, factor_sizes

ops = torch.ops.moesaic
FLAT, OWN, SHARED = range(3)


@pytest.mark.parametrize(
    ("text", "shapes", "sizes"),
    [
        ("m k, k n -> m n", [(2, 3), (3, 4), (2, 4)], {"m": 2, "k": 3, "n": 4}),
        ("m k, k n -> m n", [(0, 3), (3, 0), (0, 0)], {"m": 0, "k": 3, "n": 0}),
        ("m k, k n -> m n", [(2, 3), (5, 4), (2, 4)], None),
        ("m k, k n -> m n", [(2, 3), (3, 4), (2, 5)], None),
        ("m k, k n -> m n", [(2, 3, 1), (3, 4), (2, 4)], None),
        ("m k, k n -> m n", [(2, 3), (3, 4), (2,)], None),
        ("m, -> m", [(2,), (), (2,)], {"m": 2}),
        ("m, -> m", [(2,), (1,), (2,)], None),
        ("m 1, 1 -> m", [(2, 1), (1,), (2,)], {"m": 2}),
        ("m 1, 1 -> m", [(2, 3), (1,), (2,)], None),
        ("m 1, 1 -> m", [(2, 3), (3,), (2,)], None),
        ("m 1 -> m", [(2, 0), (2,)], None),
        # A composite dim is solved for the one factor that no other dim tells.
        ("(b c) k, b g -> (b c)", [(6, 2), (3, 5), (6,)], {"b": 3, "g": 5, "k": 2, "c": 2}),
        ("(b c) k, b g -> (b c)", [(7, 2), (3, 5), (7,)], None),
        ("(b c) k, b g -> (b c)", [(6, 2), (3, 5), (9,)], None),
        ("(b c) -> b c", [(6,), (3, 2)], {"b": 3, "c": 2}),
        ("(b c) -> b c", [(6,), (3, 3)], None),
        ("(a b c) -> a (b c)", [(24,), (2, 12)], None),
        ("(a b c), a, c -> a (b c)", [(24,), (2,), (4,), (2, 12)], {"a": 2, "b": 3, "c": 4}),
        # One composite after another: b, then c, then d, whatever the order they are written in.
        ("(c d), (b c), b -> b", [(10,), (6,), (3,), (3,)], {"b": 3, "c": 2, "d": 5}),
        ("(c d), (b c), b -> b", [(10,), (6,), (4,), (4,)], None),
        # Nothing tells b from c.
        ("(b c) -> (b c)", [(6,), (6,)], None),
        ("(b c) k, (c b) -> k", [(6, 2), (6,), (2,)], None),
        # Blocks that end early: as many in each as cutting into that many parts gives.
        ("(b c), (b g)?, b g -> (b c)", [(6,), (5,), (2, 3), (6,)], {"b": 2, "c": 3, "g": 3, "(b g)?": 5}),
        ("(b c), (b g)?, b g -> (b c)", [(6,), (6,), (2, 3), (6,)], {"b": 2, "c": 3, "g": 3, "(b g)?": 6}),
        ("(b c), (b g)?, b g -> (b c)", [(8,), (5,), (4, 2), (8,)], {"b": 4, "c": 2, "g": 2, "(b g)?": 5}),
        ("(b c), (b g)?, b g -> (b c)", [(6,), (3,), (2, 3), (6,)], None),
        ("(b c), (b g)?, b g -> (b c)", [(6,), (7,), (2, 3), (6,)], None),
        ("(b c), (b g)?, b g -> (b c)", [(6,), (1,), (2, 1), (6,)], None),
        ("(b c), (b g)?, b g -> (b c)", [(6,), (0,), (2, 0), (6,)], {"b": 2, "c": 3, "g": 0, "(b g)?": 0}),
        ("(b g)? -> b", [(6,), (2,)], None),
        # Empty blocks, and no blocks.
        ("(b c) k, b g -> (b c)", [(0, 2), (3, 5), (0,)], {"b": 3, "g": 5, "k": 2, "c": 0}),
        ("(b c) k, b g -> (b c)", [(0, 2), (0, 5), (0,)], {"b": 0, "g": 5, "k": 2, "c": 0}),
        ("(b c) k, b g -> (b c)", [(4, 2), (0, 5), (4,)], None),
    ],
)
def test_factor_sizes(text, shapes, sizes):
    line = parse(text)
    inputs = shapes[: len(line.inputs)]
    assert factor_sizes(line, inputs, shapes[len(line.inputs) :]) == sizes


# Which line speaks for a call of grouped_mm, by its shapes [R, K], [W, K, N], sizes -> [R, N].
@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(7, 4), (3, 4, 5), (3,), (7, 5)], FLAT),
        ([(8, 4), (6, 4, 5), (2, 3), (8, 5)], OWN),
        ([(8, 4), (3, 4, 5), (2, 3), (8, 5)], SHARED),
        ([(8, 4), (5, 4, 5), (2, 3), (8, 5)], OWN),
        # One block: its own experts are all the experts.
        ([(8, 4), (3, 4, 5), (1, 3), (8, 5)], OWN),
        # One expert that several blocks share.
        ([(8, 4), (1, 4, 5), (2, 1), (8, 5)], SHARED),
        ([(0, 4), (3, 4, 5), (0, 3), (0, 5)], SHARED),
        ([(0, 4), (0, 4, 5), (0, 3), (0, 5)], OWN),
        ([(8, 4), (4, 4, 5), (2, 3), (8, 5)], None),
        ([(9, 4), (6, 4, 5), (2, 3), (9, 5)], None),
        ([(7, 4), (3, 6, 5), (3,), (7, 5)], None),
        ([(7, 4), (2, 4, 5), (3,), (7, 5)], None),
    ],
)
def test_shapes_choose_the_line(shapes, expected):
    lines = rule_of(ops.grouped_mm).lines
    fits = [i for i, line in enumerate(lines) if factor_sizes(line, shapes[:3], shapes[3:]) is not None]
    assert next(iter(fits), None) == expected


def shapes_of(line: Notation, sizes: dict[str, int]) -> list[list[int]]:
    return [[prod(sizes[f] for f in dim.factors) for dim in pattern.dims] for pattern in line.inputs + line.outputs]


@given(st.fixed_dictionaries({factor: st.integers(0, 4) for factor in "abcd"}), st.data())
def test_sizes_and_shapes(sizes, data):
    """Shapes are given sizes exactly if some sizes have these shapes."""
    line = parse("(a b) c, c d, a -> (a b) (c d), d 1")
    shapes = shapes_of(line, sizes)
    if data.draw(st.booleans()):
        tensor = data.draw(st.sampled_from(shapes))
        tensor[data.draw(st.integers(0, len(tensor) - 1))] += data.draw(st.integers(1, 3))
    possible = (dict(zip("abcd", values, strict=True)) for values in itertools.product(range(8), repeat=4))
    possible = [sizes for sizes in possible if sizes["a"] == shapes[2][0] and shapes_of(line, sizes) == shapes]
    found = factor_sizes(line, shapes[:3], shapes[3:])
    # Without blocks they can be of any size; it counts as none.
    assert (found in possible) if possible else (found is None)


# Blocks are cut between blocks.


@pytest.mark.parametrize(
    ("names", "axes", "blocks", "expected"),
    [
        (["b"], [2], 4, True),
        (["b"], [4], 4, True),
        (["b"], [4], 6, False),
        (["b"], [4], 2, False),
        (["b"], [3], 0, True),
        (["b", "b"], [2, 2], 4, True),
        (["b", "b"], [2, 2], 2, False),
        (["b", "b"], [2, 3], 12, True),
        (["b", "b"], [2, 4], 12, False),
        (["b", "replicate"], [2, 2], 2, True),
        (["k", "b"], [4, 2], 2, True),
        # The matrix dims may be cut unevenly.
        (["k", "n"], [4, 4], 1, True),
        (["linear in x", "replicate"], [4, 4], 1, True),
    ],
)
def test_divides(names, axes, blocks, expected):
    rule = rule_of(ops.grouped_mm)
    line = rule.lines[OWN]
    by_name = {choice.name: choice for choice in rule.placements(line)}
    sizes = {"b": blocks, "c": 3, "g": 2, "(b g)?": 2 * blocks, "k": 5, "n": 7}
    assert divides(line, sizes, [by_name[name] for name in names], axes) is expected


@pytest.mark.parametrize(
    ("size", "blocks", "axes", "expected"),
    [
        (6, 2, [2], True),
        (5, 2, [2], True),  # 3 and 2
        (5, 4, [4], True),  # 2, 2, 1 and none, in blocks of 2
        (5, 4, [2], False),  # 3 and 2, but the blocks of 2 want 4 and 1
        (7, 4, [2], True),  # 4 and 3
        (5, 4, [2, 2], False),
        (7, 4, [2, 2], True),
        (8, 4, [2, 2], True),
        (5, 4, [1], True),
        (5, 4, [], True),
    ],
)
def test_blocks_that_end_early_are_cut_between_blocks(size, blocks, axes, expected):
    rule = make_rule(["(b g)? k, b g -> b k"], ["w", "sizes"])
    (line,) = rule.lines
    sizes = factor_sizes(line, [(size, 3), (blocks, -(-size // blocks))], [(blocks, 3)])
    by_name = {choice.name: choice for choice in rule.placements()}
    assert divides(line, sizes, [by_name["b"]] * len(axes), axes) is expected
