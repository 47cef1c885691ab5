"""What can be proved, with which inputs, and how a report reads."""

import pytest
import torch
from torch import Tensor

import moesaic
from tests.sharding import planted
from tests.sharding.planted import AVG, MAX, MIN, ONE, S0, S1, TWO, P, R, define, define_with_keywords, random, ruled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("unchecked"),  # errors of its own, and several times as fast
]

x, w = random(12, 13), random(13, 14)
MATMUL = ruled(TWO, planted.matmul, "m k, k n -> m n", linear=["x", "w"])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.ones(3, 4), random(4, 5)), "x is constant: a wrong rule might pass. Give random values.*torch.randn"),
        ((random(3, 4), torch.zeros(4, 5)), "w is constant"),
        ((random(1, 4).expand(3, 4), random(4, 5)), "x has equal slices along dim 0"),
        ((random(3, 1).expand(3, 4), random(4, 5)), "x has equal slices along dim 1"),
        ((random(4, 4) + random(4, 4).mT, random(4, 5)), "x is symmetric in dims 0 and 1"),
        ((random(3, 4), 2.0), "w is a tensor argument, but float was given"),
        ((random(3, 4), [random(4, 5)]), "w is a list of tensors"),
        ((random(3, 4), random(4, 5), 1), "takes 2 arguments, but 3 were given"),
    ],
)
def test_inputs_that_tell_nothing(inputs, message):
    with pytest.raises(ValueError, match=message):
        moesaic.prove(MATMUL, *inputs)


def test_few_values_of_a_half_type_may_coincide():
    op = ruled(ONE, planted.relu, "m -> m", preserves={"max": ["x"], "min": ["x"]})
    assert moesaic.prove(op, torch.tensor([1.5, -2.0, 1.5, 3.0], dtype=torch.bfloat16), axes=(2,), meshes=[]).ok


def test_operators_that_cannot_be_proved():
    mutating = torch.library.custom_op(
        "moesaic_planted::mutates", lambda x: None, mutates_args=("x",), schema="(Tensor(a!) x) -> ()"
    )
    listing = define("(Tensor x) -> Tensor[]", lambda x: [x.clone()])
    noisy = ruled(ONE, torch.rand_like, "m n -> m n")
    without_fake = torch.library.custom_op(
        "moesaic_planted::without_fake", lambda x: x.clone(), mutates_args=(), schema=ONE
    )
    moesaic.sharding_rule("m n -> m n")(without_fake)
    for op, message in (
        (without_fake, "Give it a fake kernel with register_fake .There was no fake impl registered"),
        (mutating, "mutates an argument"),
        (listing, "returns .*; only tensors have placements"),
        (noisy, "gives different results for the same inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            moesaic.prove(op, x)
    with pytest.raises(TypeError, match="expected an operator"):
        moesaic.prove(torch.add, x, x)


@pytest.mark.parametrize("sizes", [{"axes": ()}, {"axes": (1, 2)}, {"meshes": [(1, 2)]}])
def test_meshes_of_one_rank_tell_nothing(sizes):
    with pytest.raises(ValueError, match="at least two ranks on each"):
        moesaic.prove(MATMUL, x, w, **sizes)


def test_meshes_have_three_axes_at_most():
    with pytest.raises(ValueError, match="meshes: at most three axes; got 2x2x2x2"):
        moesaic.prove(MATMUL, x, w, meshes=[(2, 2, 2, 2)])
    op = ruled(ONE, planted.relu, "m -> m")
    report = moesaic.prove(op, random(13), axes=(2,), meshes=[(2, 2, 2)], backward=False)
    assert report.ok
    assert {len(r.case.mesh) for r in report.admitted} == {1, 3}


def test_every_kind_of_operator():
    for op in (MATMUL, MATMUL._opoverload, MATMUL._opoverload.overloadpacket):
        report = moesaic.prove(op, x, w, axes=(2,), meshes=[], backward=False)
        assert report.ok
        assert report.complete


def test_arguments_that_are_not_tensors_and_tensors_that_are_not_given():
    def scaled(x: Tensor, bias: Tensor | None, times: int) -> Tensor:
        return x * times if bias is None else x * times + bias

    op = define("(Tensor x, Tensor? bias, int times) -> Tensor", scaled)
    moesaic.sharding_rule("m n, +n -> m n", linear=["x"], preserves={"max": [("x",)], "min": [("x",)]})(op)
    report = moesaic.prove(op, x, None, 3, also=[(x, random(13), -2)], axes=(2, 3), meshes=[])
    assert {r.case.names for r in report.admitted} == {("x",), ("x", "bias")}
    # Of one sign it keeps the largest, of the other it does not: each example is held against the rule.
    assert {r.inputs[0] for r in report.wrong} == {(MAX,), (MIN,)}
    assert all(r.case.names == ("x", "bias") for r in report.wrong)


def test_tensors_that_no_example_gives_are_noted():
    def total(x: Tensor, bias: Tensor | None = None, *, scale: Tensor | None = None) -> Tensor:
        return x.clamp(min=0) if bias is None else x.clamp(min=0) + bias

    op = define_with_keywords("(Tensor x, Tensor? bias=None, *, Tensor? scale=None) -> Tensor", total)
    moesaic.sharding_rule("m n, n, n -> m n")(op)
    options = {"axes": (2,), "meshes": [], "backward": False}
    bias, scale = (f"no example gives {name}: nothing was tried with it" for name in ("bias", "scale"))
    assert moesaic.prove(op, x, **options).untried == [bias, scale]
    assert moesaic.prove(op, x, also=[(x, random(13))], **options).untried == [scale]


def test_lines_that_no_example_reaches_are_noted():
    op = ruled(TWO, planted.matmul, "m k, k n -> m n", "b m k, b k n -> b m n", linear=["x", "w"])
    options = {"axes": (2,), "meshes": [], "backward": False}
    note = "no example uses the line 'b m k, b k n -> b m n': it was not tried"
    assert moesaic.prove(op, x, w, **options).notes == [note]
    assert moesaic.prove(op, x, w, also=[(random(2, 3, 4), random(2, 4, 3))], **options).ok


def test_a_rule_of_which_no_line_fits():
    seen = []

    def watching(x: Tensor, w: Tensor) -> Tensor:
        seen.append(x.shape)
        return x @ w

    op = ruled(TWO, watching, "m k, k n -> n m", "m, n -> m n")
    shapes = r"x \[12, 13\], w \[13, 14\] -> \[12, 14\]"
    with pytest.raises(ValueError, match=rf"no line of its rule fits the shapes {shapes}:\n  m k, k n -> n m\n  m, n"):
        moesaic.prove(op, x, w)
    assert set(seen) == {x.shape}


def test_nothing_admitted_is_not_ok():
    op = define(ONE, planted.relu)  # of which DTensor knows nothing
    report = moesaic.prove(op, x, axes=(2,), meshes=[], backward=False)
    assert not report.ok
    assert not report.wrong
    assert "NOTHING ADMITTED" in repr(report)
    assert "NOTHING ADMITTED" in str(report).splitlines()[-1]


def test_sizes_that_are_smaller_than_the_mesh_or_do_not_divide_or_do():
    seen = set()

    def watching(x: Tensor, w: Tensor) -> Tensor:
        seen.add((x.shape[0], w.shape[1]))
        return x @ w

    op = ruled(TWO, watching, "m k, k n -> m n", linear=["x", "w"])
    assert moesaic.prove(op, x, w, axes=(4,), meshes=[]).ok
    rows = {m for m, _ in seen}
    assert {12, 11, 3, 2, 1, 0} <= rows
    assert {14, 12, 3, 2, 1, 0} <= {n for _, n in seen}


def test_an_example_that_the_operator_refuses_is_noted():
    def even(x: Tensor) -> Tensor:
        torch._check(x.shape[1] % 2 == 0, lambda: "needs an even number")
        return x.clamp(min=0)

    op = ruled(ONE, even, "m n! -> m n!", preserves={"max": ["x"], "min": ["x"]})
    report = moesaic.prove(op, random(12, 14), axes=(2,), meshes=[])
    assert report.ok
    assert [n for n in report.notes if n.startswith("not tried, as the operator refuses it: ") and "even" in n]


def test_numbers_that_are_all_the_same():
    def rows(x: Tensor, ids: Tensor) -> Tensor:
        return x[ids]

    op = ruled("(Tensor x, Tensor ids) -> Tensor", rows, "m! d, r -> r d", linear=["x"])
    same, distinct = torch.tensor([3, 3, 3]), torch.tensor([0, 3, 2])
    with pytest.raises(ValueError, match="ids is constant: a wrong rule might pass. Give distinct .* in also="):
        moesaic.prove(op, x, same)
    options = {"axes": (2,), "meshes": [], "backward": False}
    assert moesaic.prove(op, x, distinct, also=[(x, same)], **options).ok
    assert moesaic.prove(op, x, same[:1], **options).ok
    shape = ruled(TWO, planted.totals_of_blocks, "(b c) k, ~b -> b k", linear=["x"])
    assert moesaic.prove(shape, x, same, **options).ok


def test_integers_and_bools_are_exact():
    op = ruled(TWO, torch.mul, "m n, m n -> m n", linear=["x", "w"])
    numbers = torch.arange(60).view(5, 12)
    report = moesaic.prove(op, numbers, numbers % 7 > 2, axes=(2, 3), meshes=[])
    # Means of whole numbers are no whole numbers, and sums of bools no bools.
    assert {r.inputs for r in report.admitted} == {((a,), (b,)) for a, b in [(R, R), (S0, S0), (S1, S1), (P, R)]}, (
        f"{report}"
    )


def test_values_that_are_not_finite():
    op = ruled(ONE, torch.log, "m n -> m n", preserves={"max": ["x"], "min": ["x"]})
    report = moesaic.prove(op, x.abs() - (x > 1.5) * x, axes=(2,), meshes=[])
    assert not [r for r in report.wrong if r.inputs in (((R,),), ((S0,),), ((S1,),))], f"{report}"


def test_how_it_reads():
    op = ruled(TWO, planted.matmul, "m k, k n -> m n", linear=["x"], preserves={"max": ["w"]})
    report = moesaic.prove(op, x, w, axes=(2, 3), meshes=[])
    name = op._opoverload._name
    assert repr(report) == f"<Report on {name}: WRONG; 6 admitted, 1 wrong, 2 missing, 0 hidden>"
    lines = str(report).splitlines()
    assert lines[:3] == [f"proof of {name}", "  rule   m k, k n -> m n", f"  ranks  2, 3; {report.num_cases} cases"]
    assert "  x       w     -> y    cases  the first" in lines
    assert f"  S(1)    S(0)  P       {report.num_cases}     [12, 13], [13, 14] on 2 ranks" in lines
    for section in ("admitted and right", "admitted and WRONG", "right and not admitted"):
        assert f"{section}: m k, k n -> m n" in lines
    wrong = lines.index("admitted and WRONG: m k, k n -> m n")
    assert lines[wrong + 2].startswith("  R  P(max)  P(max)")
    assert lines[wrong + 3].startswith("      as P(max), got ")
    assert lines[-1] == "1 WRONG, 2 missing"
    assert max(map(len, lines)) < 160


def test_progress():
    told = []
    moesaic.prove(MATMUL, x, w, axes=(2,), meshes=[], on_progress=told.append)
    assert told[0].startswith("placements on 2 ranks, example 1 of ")
    assert told[-1] == "gradients on 2 ranks"


def test_threads_are_as_they_were():
    before = torch.get_num_threads()
    moesaic.prove(MATMUL, x, w, axes=(2,), meshes=[])
    assert torch.get_num_threads() == before


def test_memory_that_is_not_written_is_not_what_was_there_before():
    unwritten = []

    def same(x: Tensor) -> Tensor:
        unwritten.append(torch.empty(4, dtype=x.dtype))
        return x.clone()

    op = ruled(ONE, same, "m n -> m n", linear=["x"], preserves={"max": ["x"], "min": ["x"]})
    assert moesaic.prove(op, x, axes=(2,), meshes=[], backward=False).complete
    assert all(t.isnan().all() for t in unwritten)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_kernel_is_spared_shards_that_do_not_go_together():
    shapes = set()

    def product(x: Tensor, w: Tensor) -> Tensor:
        shapes.add((x.shape[1], w.shape[0]))
        return x @ w

    op = ruled(TWO, product, "m k, k n -> m n", linear=["x", "w"])
    assert moesaic.prove(op, x, w, axes=(2,), meshes=[], backward=False).complete
    assert len(shapes) > 1
    assert all(a == b for a, b in shapes)


def test_of_torch_itself():
    report = moesaic.prove(torch.ops.aten.mm, x, w, axes=(2,), meshes=[])
    assert report.rule == ""
    assert report.ok, f"{report}"
    moved = [r.error for r in report.hidden if r.inputs == ((S0,), (S0,))]
    assert moved
    assert all(": S(0) to " in error for error in moved)
    assert ((AVG,), (R,)) in {r.inputs for r in report.admitted}


def test_operators_with_many_tensors():
    """Not all placements are tried of eight tensors, but always what is admitted, and what is near it."""
    schema = "(" + ", ".join(f"Tensor x{i}" for i in range(8)) + ") -> Tensor"

    def chain(*tensors):
        return torch.stack([t.double().sin() for t in tensors]).prod(0)

    examples = [random(4, 6) + i for i in range(8)]
    pattern = ", ".join(["m n"] * 8)
    right = ruled(schema, chain, f"{pattern} -> m n", linear=[])
    report = moesaic.prove(right, *examples, axes=(2,), meshes=[])
    assert report.ok, report
    assert report.complete, report
    assert "of 5764801 placements, one factor each, all that differ from these in one tensor" in str(report.notes)

    deleted = ruled(schema, chain, ", ".join(["m n!"] * 8) + " -> m n!")
    assert [r.inputs for r in moesaic.prove(deleted, *examples, axes=(2,), meshes=[]).missing] == [((S1,),) * 8]

    wrong = ruled(schema, chain, f"{pattern} -> m n", linear=["x3"])
    assert {r.inputs[3] for r in moesaic.prove(wrong, *examples, axes=(2,), meshes=[]).wrong} == {(P,), (AVG,)}
    whole = ruled(
        schema, lambda x, *others: x.exp() * (1 + sum(t.sum() for t in others)), "m! n" + ", p! q!" * 7 + " -> m! n"
    )
    missing = moesaic.prove(whole, *examples, axes=(2,), meshes=[]).missing
    assert (S0,) in [r.inputs[0] for r in missing]
