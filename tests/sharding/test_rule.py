"""From a rule to placements: the tables of our own operators, sizes of factors, and rules that do not fit."""

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

from moesaic.sharding import AxisRule, NotationError, rule_of
from moesaic.sharding.admission import choices_for
from moesaic.sharding.rule import make_rule, short

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
    # It lies as the weight does, the fourth input.
    ("grouped_mm_weight_grad", FLAT): {
        "replicate": "R R R R -> R",
        "k": "S(1) R R S(1) -> S(1)",
        "n": "R S(1) R S(2) -> S(2)",
        "linear in x": "P R R R -> P",
        "linear in grad": "R P R R -> P",
    },
    ("grouped_mm_weight_grad", OWN): {
        "replicate": "R R R R -> R",
        "b": "S(0) S(0) S(0) S(0) -> S(0)",
        "k": "S(1) R R S(1) -> S(1)",
        "n": "R S(1) R S(2) -> S(2)",
        "linear in x": "P R R R -> P",
        "linear in grad": "R P R R -> P",
    },
    # Tokens apart, experts shared: each rank has its tokens' part of the gradient.
    ("grouped_mm_weight_grad", SHARED): {
        "replicate": "R R R R -> R",
        "b": "S(0) S(0) S(0) R -> P",
        "k": "S(1) R R S(1) -> S(1)",
        "n": "R S(1) R S(2) -> S(2)",
        "linear in x": "P R R R -> P",
        "linear in grad": "R P R R -> P",
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
    # x, ids, weights, experts, w1, w3, w2, b1, b3, b2 -> z, h1, h3.
    ("experts_mlp", 0): {
        "replicate": "R R R R R R R R R R -> R R R",
        "b": "S(0) S(0) S(0) S(0) S(0) S(0) S(0) S(0) S(0) S(0) -> S(0) S(0) S(0)",
        "n": "S(1) S(1) S(1) R R R R R R R -> S(1) S(1) S(1)",
        "k": "R S(2) S(2) R R R R R R R -> P S(2) S(2)",
        "f": "R R R R S(2) S(2) S(1) S(1) S(1) P -> P S(3) S(3)",
    },
    ("experts_mlp_inference", 0): {
        "replicate": "R R R R R R R R R R -> R",
        "b": "S(0) S(0) S(0) S(0) S(0) S(0) S(0) S(0) S(0) S(0) -> S(0)",
        "n": "S(1) S(1) S(1) R R R R R R R -> S(1)",
        "k": "R S(2) S(2) R R R R R R R -> P",
        "f": "R R R R S(2) S(2) S(1) S(1) S(1) P -> P",
        "linear in weights": "R R P R R R R R R R -> P",
        "linear in w2 + b2": "R R R R R R P R R P -> P",
        "mean in w2": "R R R R R R P(avg) R R R -> P(avg)",
        "mean in b2": "R R R R R R R R R P(avg) -> P(avg)",
    },
    # grad, x, ids, weights, experts, w1, w3, w2, b1, b3, b2, h1, h3 -> those of x, weights, w1, w3, w2, b1, b3, b2.
    ("experts_mlp_backward", 0): {
        "replicate": "R R R R R R R R R R R R R -> R R R R R R R R",
        "b": "S(0) S(0) S(0) S(0) S(0) S(0) S(0) S(0) S(0) S(0) S(0) S(0) S(0) "
        "-> S(0) S(0) S(0) S(0) S(0) S(0) S(0) S(0)",
        "n": "S(1) S(1) S(1) S(1) R R R R R R R S(1) S(1) -> S(1) S(1) P P P P P P",
        "k": "R R S(2) S(2) R R R R R R R S(2) S(2) -> P S(2) P P P P P P",
        "f": "R R R R R S(2) S(2) S(1) S(1) S(1) P S(3) S(3) -> P P S(2) S(2) S(1) S(1) S(1) R",
        "linear in grad": "P R R R R R R R R R R R R -> P P P P P P P P",
    },
    # As experts_mlp, and then w1_a, w1_b, w3_a, w3_b, w2_a, w2_b, keys, columns.
    ("experts_lora", 0): {
        "replicate": " ".join(["R"] * 18) + " -> R R R",
        "b": " ".join(["S(0)"] * 17) + " R -> S(0) S(0) S(0)",
        "n": "S(1) S(1) S(1) R R R R R R R R R R R R R S(1) R -> S(1) S(1) S(1)",
        "k": "R S(2) S(2) R R R R R R R R R R R R R S(2) R -> P S(2) S(2)",
        "f": "R R R R S(2) S(2) S(1) S(1) S(1) P R S(2) R S(2) S(1) R R S(0) -> P S(3) S(3)",
    },
    ("experts_lora_inference", 0): {
        "replicate": " ".join(["R"] * 18) + " -> R",
        "b": " ".join(["S(0)"] * 17) + " R -> S(0)",
        "n": "S(1) S(1) S(1) R R R R R R R R R R R R R S(1) R -> S(1)",
        "k": "R S(2) S(2) R R R R R R R R R R R R R S(2) R -> P",
        "f": "R R R R S(2) S(2) S(1) S(1) S(1) P R S(2) R S(2) S(1) R R S(0) -> P",
        "linear in weights": "R R P R R R R R R R R R R R R R R R -> P",
    },
    # grad, the operands, h1, h3 -> gradients of x, weights and the six factors: those that f does not cut are Partial.
    ("experts_lora_backward", 0): {
        "replicate": " ".join(["R"] * 21) + " -> R R R R R R R R",
        "b": " ".join([*["S(0)"] * 18, "R", "S(0)", "S(0)"]) + " -> S(0) S(0) S(0) S(0) S(0) S(0) S(0) S(0)",
        "n": "S(1) S(1) S(1) S(1) R R R R R R R R R R R R R S(1) R S(1) S(1) -> S(1) S(1) P P P P P P",
        "k": "R R S(2) S(2) R R R R R R R R R R R R R S(2) R S(2) S(2) -> P S(2) P P P P P P",
        "f": "R R R R R S(2) S(2) S(1) S(1) S(1) P R S(2) R S(2) S(1) R R S(0) S(3) S(3) -> P P P S(2) P S(2) S(1) P",
        "linear in grad": " ".join(["P", *["R"] * 20]) + " -> P P P P P P P P",
    },
}
# A list of copies comes last among their inputs. Where a call gives one, it may be cut, and tokens and copies may not.
# Of the pre-activations, which then have one dim less, `c` cuts the lines.
LISTED = {
    "experts_mlp": f"{'R ' * 10}S(1) -> P S(1) S(1)",
    "experts_mlp_inference": f"{'R ' * 10}S(1) -> P",
    "experts_mlp_backward": f"{'R ' * 11}S(1) S(1) S(1) -> P P P P P P P P",
    "experts_lora": f"{'R ' * 18}S(1) -> P S(1) S(1)",
    "experts_lora_inference": f"{'R ' * 18}S(1) -> P",
    "experts_lora_backward": f"{'R ' * 19}S(1) S(1) S(1) -> P P P P P P P P",
}
for _op, _row in LISTED.items():
    _table = {
        choice: text.replace(" ->", " S(0) ->" if choice == "b" else " R ->") for choice, text in TABLES[_op, 0].items()
    }
    TABLES[_op, 0] = _table
    TABLES[_op, 1] = {name: text.replace("S(3)", "S(2)") for name, text in _table.items() if name not in ("n", "k")}
    TABLES[_op, 1]["c"] = _row
# Two add to buffers in place, and DTensor might add to a redistributed copy; one is of counts that are a rank's own.
WITHOUT_RULE = {"grouped_mm_accumulate_weight_grad", "experts_mlp_backward_into", "count_once", "steer", "traffic"}


def with_means(table: dict[str, str]) -> dict[str, str]:
    """What is linear passes means through as well."""
    linear = {name: text for name, text in table.items() if name.startswith("linear")}
    return table | {name.replace("linear", "mean"): text.replace("P", "P(avg)") for name, text in linear.items()}


def row(choice: AxisRule) -> str:
    return f"{' '.join(map(short, choice.inputs))} -> {' '.join(map(short, choice.outputs))}"


@pytest.mark.parametrize(("op", "line"), TABLES, ids=lambda value: str(value))
def test_placements_of_our_operators(op, line):
    rule = rule_of(getattr(ops, op))
    choices = rule.placements(rule.lines[line])
    assert {choice.name: row(choice) for choice in choices} == with_means(TABLES[op, line])
    assert len(choices) == len(with_means(TABLES[op, line]))
    factors = {choice.name: choice.factor for choice in choices}
    assert all(f == (None if name == "replicate" or " in " in name else name) for name, f in factors.items())


def test_every_operator_has_a_table():
    names = {name.removeprefix("moesaic::") for name in torch._C._dispatch_get_all_op_names() if "moesaic::" in name}
    # These have a line for each format of a weight. They are proved in test_prove_quantized.py.
    names = {name for name in names if not name.startswith("quantized_")}
    lines = {(name, i) for name in names - WITHOUT_RULE for i in range(len(rule_of(getattr(ops, name)).lines))}
    assert lines == set(TABLES)


def test_a_term_of_one_sum_and_a_result_that_does_not_depend_on_it():
    rule = make_rule(["m k l, +k: n -> m n, same k: n"], ["x", "bias"], linear=["x", ("x", "bias")])
    found = {choice.name: row(choice) for choice in rule.placements()}
    assert found == {
        "replicate": "R R -> R R",
        "m": "S(0) R -> S(0) P",
        "k": "S(1) P -> P R",
        "l": "S(2) R -> P P",
        "n": "R S(0) -> S(1) S(0)",
        "linear in x": "P R -> P P",
        "linear in x + bias": "P P -> P P",
        "mean in x": "P(avg) R -> P(avg) P(avg)",
        "mean in bias": "R P(avg) -> P(avg) P(avg)",
        "mean in x + bias": "P(avg) P(avg) -> P(avg) P(avg)",
    }


def test_table_as_text():
    rule = rule_of(ops.grouped_mm)
    assert str(rule.placements(rule.lines[SHARED])) == "\n".join(
        [
            "(b c) k, g! k n, b g! -> (b c) n",
            "on one axis  x       w       group_sizes  out0",
            "replicate    R       R       R            R",
            "b            S(0)    R       S(0)         S(0)",
            "k            S(1)    S(1)    R            P",
            "n            R       S(2)    R            S(1)",
            "linear in x  P       R       R            P",
            "linear in w  R       P       R            P",
            "mean in x    P(avg)  R       R            P(avg)",
            "mean in w    R       P(avg)  R            P(avg)",
        ]
    )
    assert rule.placements() == rule.placements(rule.lines[FLAT])
    assert str(rule.placements()).splitlines()[0] == "r! k, e! k n, e! -> r! n"


def test_table_of_several_outputs():
    assert str(make_rule(["m k -> m, k"], ["x"], linear=["x"]).placements()) == "\n".join(
        [
            "m k -> m, k",
            "on one axis  x       out0    out1",
            "replicate    R       R       R",
            "m            S(0)    S(0)    P",
            "k            S(1)    P       S(0)",
            "linear in x  P       P       P",
            "mean in x    P(avg)  P(avg)  P(avg)",
        ]
    )


def rows(rule):
    return {c.name: row(c) for c in rule.placements()}


def test_jointly_linear():
    # A mean of sums: of both, or of one while the other stays.
    assert rows(make_rule(["m, m -> m"], ["x", "y"], linear=[("x", "y")])) == {
        "replicate": "R R -> R",
        "m": "S(0) S(0) -> S(0)",
        "linear in x + y": "P P -> P",
        "mean in x": "P(avg) R -> P(avg)",
        "mean in y": "R P(avg) -> P(avg)",
        "mean in x + y": "P(avg) P(avg) -> P(avg)",
    }


def test_a_term_that_is_added_counts_once():
    rule = make_rule(["m k, k n, +n -> m n"], ["x", "w", "bias"], linear=["x"])
    assert rows(rule) == {
        "replicate": "R R R -> R",
        "m": "S(0) R R -> S(0)",
        "k": "S(1) S(0) P -> P",
        "n": "R S(1) S(0) -> S(1)",
        "linear in x + bias": "P R P -> P",
        "mean in x": "P(avg) R R -> P(avg)",
        "mean in bias": "R R P(avg) -> P(avg)",
        "mean in x + bias": "P(avg) R P(avg) -> P(avg)",
        "max in bias": "R R P(max) -> P(max)",
        "min in bias": "R R P(min) -> P(min)",
    }
    assert str(rule) == "m k, k n, +n -> m n"


def test_other_reductions():
    rule = make_rule(["m k -> max: m, min: m, m"], ["x"], preserves={"max": ["x"]})
    assert rows(rule) == {
        "replicate": "R -> R R R",
        "m": "S(0) -> S(0) S(0) S(0)",
        "k": "S(1) -> P(max) P(min) P",
        "max in x": "P(max) -> P(max) P(max) P(max)",
    }
    # What is added to a largest value is added on every rank alike.
    assert rows(make_rule(["m k, +m -> max: m"], ["x", "y"]))["k"] == "S(1) R -> P(max)"


def test_short_names():
    placements = [Replicate(), Shard(0), Shard(-1), Partial(), Partial("avg"), Partial("max")]
    assert [short(p) for p in placements] == ["R", "S(0)", "S(-1)", "P", "P(avg)", "P(max)"]


# Optional arguments that were not given.


def names_and_rows(rule, present):
    return {c.name: row(c) for c in choices_for(rule, rule.lines[0], present)}


def test_choices_without_an_optional_argument():
    rule = rule_of(ops.combine)
    assert names_and_rows(rule, (True, True, True, True)) == with_means(TABLES["combine", 0])
    # Linear in an argument that is not there is no choice at all: it would make a replicated result Partial.
    assert names_and_rows(rule, (True, True, True, False)) == {
        "replicate": "R R R -> R",
        "d": "S(1) R R -> S(1)",
        "linear in y": "P R R -> P",
        "mean in y": "P(avg) R R -> P(avg)",
    }


def test_choices_of_a_joint_optional_argument():
    rule = make_rule(["m n, n -> m n"], ["x", "bias"], linear=[("x", "bias")])
    assert names_and_rows(rule, (True, True))["linear in x + bias"] == "P P -> P"
    alone = names_and_rows(rule, (True, False))
    assert alone["linear in x + bias"] == "P -> P"
    assert "mean in bias" not in alone
    # No choice rests on x but those that x has a part in.
    assert names_and_rows(rule, (False, True)) == {
        "replicate": "R -> R",
        "n": "S(0) -> S(1)",
        "linear in x + bias": "P -> P",
        "mean in bias": "P(avg) -> P(avg)",
        "mean in x + bias": "P(avg) -> P(avg)",
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
        (["m, m -> m"], {"preserves": {"max": ["bias"]}}, "'bias' is not a tensor argument of the operator: x, w"),
        (["m, m -> m"], {"preserves": {"sum": ["x"]}}, "preserves: 'sum' .* say linear="),
        (["m, m -> m"], {"preserves": {"mean": ["x"]}}, "preserves: 'mean' .* choose one of avg, max, min"),
        (["m, m -> m"], {"linear": "x"}, r"linear: expected a list of names, got the string 'x'; write \['x'\]"),
        (["m, m -> m"], {"redistribute": ["grad"]}, "'grad' is not a tensor argument of the operator: x, w"),
    ],
)
def test_rules_that_do_not_fit(lines, options, message):
    with pytest.raises(ValueError, match=message):
        make_rule(lines, ["x", "w"], **options)


def test_a_line_that_does_not_parse():
    with pytest.raises(NotationError, match="m m -> m"):
        make_rule(["m, m -> m", "m, m m -> m"], ["x", "w"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(b c) k, k -> (b c)", "no dim tells the size of 'b' and 'c', of (b c)\n  (b c) k, k -> (b c)\n  ^"),
        ("k, (b g)? k -> k", "no dim tells the size of 'b' and 'g', of (b g)?\n  k, (b g)? k -> k\n     ^"),
    ],
)
def test_sizes_that_nothing_tells(text, message):
    with pytest.raises(NotationError) as caught:
        make_rule([text], ["x", "w"])
    assert str(caught.value) == message
    make_rule(["(b c) k, b -> (b c)"], ["x", "w"])
