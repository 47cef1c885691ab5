"""From a rule to placements: the tables of our own operators, sizes of factors, and rules that do not fit."""

import itertools
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate, Shard

from moesaic.sharding import AxisRule, NotationError, parse, rule_of
from moesaic.sharding.admission import choices_for
from moesaic.sharding.notation import Notation
from moesaic.sharding.rule import divides, factor_sizes, make_rule, short

ops = torch.ops.moesaic
FLAT, OWN, SHARED = range(3)

# Name of the choice: placements of the inputs and of the output. What docs/design.md says of grouped_mm, for each way
# that blocks may have experts; the backward operators follow from the same products.
TABLES = {
    ("grouped_mm", FLAT): {
        "replicate": "R R R -> R",
        "k": "S(1) S(1) R -> P",
        "n": "R S(2) R -> S(1)",
        "linear in x": "P R R -> P",
        "linear in w": "R P R -> P",
    },
    ("grouped_mm", OWN): {
        "replicate": "R R R -> R",
        "b": "S(0) S(0) S(0) -> S(0)",
        "k": "S(1) S(1) R -> P",
        "n": "R S(2) R -> S(1)",
        "linear in x": "P R R -> P",
        "linear in w": "R P R -> P",
    },
    ("grouped_mm", SHARED): {
        "replicate": "R R R -> R",
        "b": "S(0) R S(0) -> S(0)",
        "k": "S(1) S(1) R -> P",
        "n": "R S(2) R -> S(1)",
        "linear in x": "P R R -> P",
        "linear in w": "R P R -> P",
    },
    ("grouped_mm_input_grad", FLAT): {
        "replicate": "R R R -> R",
        "k": "R S(1) R -> S(1)",
        "n": "S(1) S(2) R -> P",
        "linear in grad": "P R R -> P",
        "linear in w": "R P R -> P",
    },
    ("grouped_mm_input_grad", OWN): {
        "replicate": "R R R -> R",
        "b": "S(0) S(0) S(0) -> S(0)",
        "k": "R S(1) R -> S(1)",
        "n": "S(1) S(2) R -> P",
        "linear in grad": "P R R -> P",
        "linear in w": "R P R -> P",
    },
    ("grouped_mm_input_grad", SHARED): {
        "replicate": "R R R -> R",
        "b": "S(0) R S(0) -> S(0)",
        "k": "R S(1) R -> S(1)",
        "n": "S(1) S(2) R -> P",
        "linear in grad": "P R R -> P",
        "linear in w": "R P R -> P",
    },
    ("grouped_mm_weight_grad", FLAT): {
        "replicate": "R R R -> R",
        "k": "S(1) R R -> S(1)",
        "n": "R S(1) R -> S(2)",
        "linear in x": "P R R -> P",
        "linear in grad": "R P R -> P",
    },
    ("grouped_mm_weight_grad", OWN): {
        "replicate": "R R R -> R",
        "b": "S(0) S(0) S(0) -> S(0)",
        "k": "S(1) R R -> S(1)",
        "n": "R S(1) R -> S(2)",
        "linear in x": "P R R -> P",
        "linear in grad": "R P R -> P",
    },
    # Tokens apart, experts shared: each rank has its tokens' part of the gradient.
    ("grouped_mm_weight_grad", SHARED): {
        "replicate": "R R R -> R",
        "b": "S(0) S(0) S(0) -> P",
        "k": "S(1) R R -> S(1)",
        "n": "R S(1) R -> S(2)",
        "linear in x": "P R R -> P",
        "linear in grad": "R P R -> P",
    },
    ("sort_by_expert", 0): {"replicate": "R -> R R R"},
    ("permute", 0): {
        "replicate": "R R R R -> R",
        "d": "S(1) R R R -> S(1)",
        "linear in x": "P R R R -> P",
        "linear in weights": "R R R P -> P",
    },
    ("combine", 0): {
        "replicate": "R R R R -> R",
        "d": "S(1) R R R -> S(1)",
        "linear in y": "P R R R -> P",
        "linear in weights": "R R R P -> P",
    },
    ("combine_weight_grad", 0): {
        "replicate": "R R R R -> R",
        "d": "S(1) S(1) R R -> P",
        "linear in y": "P R R R -> P",
        "linear in x": "R P R R -> P",
    },
}


def row(choice: AxisRule) -> str:
    return f"{' '.join(map(short, choice.inputs))} -> {' '.join(map(short, choice.outputs))}"


@pytest.mark.parametrize(("op", "line"), TABLES, ids=lambda value: str(value))
def test_placements_of_our_operators(op, line):
    rule = rule_of(getattr(ops, op))
    choices = rule.placements(rule.lines[line])
    assert {choice.name: row(choice) for choice in choices} == TABLES[op, line]
    assert len(choices) == len(TABLES[op, line])
    factors = {choice.name: choice.factor for choice in choices}
    assert all(f == (None if name == "replicate" or "linear" in name else name) for name, f in factors.items())


def test_every_operator_has_a_table():
    names = {name.removeprefix("moesaic::") for name in torch._C._dispatch_get_all_op_names() if "moesaic::" in name}
    lines = {(name, i) for name in names for i in range(len(rule_of(getattr(ops, name)).lines))}
    assert lines == set(TABLES)


def test_table_as_text():
    rule = rule_of(ops.grouped_mm)
    assert rule.table(rule.lines[SHARED]) == "\n".join(
        [
            "(b c) k, g! k n, b g! -> (b c) n",
            "on one axis  x     w     group_sizes  out0",
            "replicate    R     R     R            R",
            "b            S(0)  R     S(0)         S(0)",
            "k            S(1)  S(1)  R            P",
            "n            R     S(2)  R            S(1)",
            "linear in x  P     R     R            P",
            "linear in w  R     P     R            P",
        ]
    )
    assert rule.table() == rule.table(rule.lines[FLAT])
    assert rule.table().splitlines()[0] == "r! k, e! k n, e! -> r! n"


def test_table_of_several_outputs():
    assert make_rule(["m k -> m, k"], ["x"], linear=["x"]).table() == "\n".join(
        [
            "m k -> m, k",
            "on one axis  x     out0  out1",
            "replicate    R     R     R",
            "m            S(0)  S(0)  P",
            "k            S(1)  P     S(0)",
            "linear in x  P     P     P",
        ]
    )


def test_jointly_linear():
    rule = make_rule(["m, m -> m"], ["x", "y"], linear=[("x", "y"), "y"])
    assert [row(c) for c in rule.placements()] == ["R R -> R", "S(0) S(0) -> S(0)", "P P -> P", "R P -> P"]
    assert rule.placements()[2].name == "linear in x + y"


def test_short_names():
    placements = [Replicate(), Shard(0), Shard(-1), Partial(), Partial("avg"), Partial("max")]
    assert [short(p) for p in placements] == ["R", "S(0)", "S(-1)", "P", "P(avg)", "P(max)"]


# Sizes of factors.


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
        # One block: its own experts are all the experts.
        ([(8, 4), (3, 4, 5), (1, 3), (8, 5)], OWN),
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
    sizes = {"b": blocks, "c": 3, "g": 2, "k": 5, "n": 7}
    assert divides(line, sizes, [by_name[name] for name in names], axes) is expected


# Optional arguments that were not given.


def names_and_rows(rule, present):
    return {c.name: row(c) for c in choices_for(rule, rule.lines[0], present)}


def test_choices_without_an_optional_argument():
    rule = rule_of(ops.combine)
    assert names_and_rows(rule, (True, True, True, True)) == TABLES["combine", 0]
    # Linear in an argument that is not there is no choice at all: it would make a replicated result Partial.
    assert names_and_rows(rule, (True, True, True, False)) == {
        "replicate": "R R R -> R",
        "d": "S(1) R R -> S(1)",
        "linear in y": "P R R -> P",
    }


def test_choices_of_a_joint_optional_argument():
    rule = make_rule(["m n, n -> m n"], ["x", "bias"], linear=[("x", "bias")])
    assert names_and_rows(rule, (True, True))["linear in x + bias"] == "P P -> P"
    assert names_and_rows(rule, (True, False)) == {
        "replicate": "R -> R",
        "m": "S(0) -> S(0)",
        "n": "S(1) -> S(1)",
        "linear in x + bias": "P -> P",
    }
    # No choice rests on x but those that x has a part in.
    assert names_and_rows(rule, (False, True)) == {
        "replicate": "R -> R",
        "n": "S(0) -> S(1)",
        "linear in x + bias": "P -> P",
    }


# Rules that do not fit.


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([], {}, "a sharding rule needs at least one line"),
        (
            ["m k -> m"],
            {},
            "rule 'm k -> m' has 1 inputs, the operator has 2 tensor arguments: x, w",
        ),
        (["m k, k n -> m n", "m, n, k -> m"], {}, "rule 'm, n, k -> m' has 3 inputs"),
        (
            ["m k, k n -> m n", "m, k -> m, k"],
            {},
            "rule 'm, k -> m, k' has another number of outputs than 'm k, k n -> m n'",
        ),
        (["m, m -> m"], {"linear": ["weight"]}, "'weight' is not a tensor argument of the operator: x, w"),
        (["m, m -> m"], {"linear": ["x", ("x", "bias")]}, "'bias' is not a tensor argument of the operator: x, w"),
        (["m, m -> m"], {"sliced": ["grad"]}, "'grad' is not a tensor argument of the operator: x, w"),
    ],
)
def test_rules_that_do_not_fit(lines, options, message):
    with pytest.raises(ValueError, match=message):
        make_rule(lines, ["x", "w"], **options)


def test_a_line_that_does_not_parse():
    with pytest.raises(NotationError, match="m m -> m"):
        make_rule(["m, m -> m", "m, m m -> m"], ["x", "w"])
