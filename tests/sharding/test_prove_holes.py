"""Wrong rules that look right at the sizes, values and dtypes of an example: the proof finds them all the same."""

import pytest
import torch
from torch import Tensor

import moesaic
from tests.sharding import planted
from tests.sharding.planted import AVG, ONE, PAIR, S0, S1, TWO, P, R, define, differentiable, inside, random, ruled

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchecked")]  # several times as fast

x = random(12, 13)
IDS = "(Tensor x, Tensor ids) -> Tensor"
ids = torch.arange(24) * 5 % 7


def wrong(op, *inputs, also=(), axes=(2, 3), backward=False):
    """What is found wrong on one axis: placements of the inputs, and why."""
    report = moesaic.prove(op, *inputs, also=also, axes=axes, meshes=[], backward=backward)
    return {tuple(p for (p,) in r.inputs): r.error for r in report.wrong}


def test_dims_of_integers_are_cut_unevenly():
    """Every axis divides 24 tokens, so a mean of means is right there; of 23 it is not."""
    op = ruled(IDS, planted.cross_entropy, "m v!, m -> avg:")
    assert wrong(op, random(24, 7), ids).keys() == {(S0, S0)}


def test_dims_of_integers_are_cut_until_a_rank_has_nothing():
    op = ruled(IDS, planted.largest_of_chosen, "m v!, m -> max:")
    assert "numel() == 0" in wrong(op, random(24, 7), ids)[S0, S0]


def test_gradients_on_shards_that_are_empty():
    kernel = ruled(TWO, planted.twice_but_not_of_nothing, "m n, ~m n -> m n", linear=["x"], redistribute=["x"])
    op = differentiable(ruled(ONE, lambda x: x * 2.0, "m n -> m n", linear=["x"]), kernel)
    found = wrong(op, x, backward=True)
    assert found.keys() == {(S0,)}
    assert "launched with an empty grid" in found[(S0,)]


def test_gradients_of_further_examples():
    """The gradient is wrong for two columns alone."""
    kernel = ruled(
        TWO,
        lambda x, w: x * (x.shape[0] if x.shape[1] == 2 else 1),
        "m n!, m n! -> m n!",
        redistribute=["x"],
    )
    op = differentiable(ruled(ONE, torch.clone, "m n! -> m n!", linear=["x"]), kernel)
    assert (S0,) in wrong(op, random(13, 2), also=[(random(13, 4),)], backward=True)
    assert (S0,) in wrong(op, random(13, 4), also=[(random(13, 2),)], backward=True)


@pytest.mark.parametrize("fill", [-1e9, -1e30, torch.finfo(torch.float32).min])
def test_what_a_mask_fills_in_hides_no_error(fill):
    op = ruled("(Tensor q, Tensor k, Tensor mask) -> Tensor", planted.masked_scores(fill), "s d!, t d!, s t -> s t")
    found = wrong(op, random(13, 6), random(14, 6), random(13, 14) > 0)
    assert found.keys() == {(S0, R, S0)}
    assert "expected -1" not in found[S0, R, S0], "of what is off, not of what is filled in"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_inside_of_an_operator_is_no_error_and_hides_none(dtype):
    right = ruled(TWO, inside(dtype), "m k, k n -> m n", linear=["x", "w"])
    report = moesaic.prove(right, x, random(13, 14), axes=(2, 3), meshes=[(2, 2)], backward=False)
    assert report.ok, f"{report}"
    assert report.complete, f"{report}"
    term = ruled(TWO, lambda x, w: inside(dtype)(x, w) + 1, "m k, k n -> m n")
    assert wrong(term, x, random(13, 14)).keys() == {(S1, S0)}


def test_what_rounds_is_not_linear_on_fractions():
    op = ruled(ONE, torch.round, "m n -> m n", linear=["x"])
    assert wrong(op, x).keys() == {(P,), (AVG,)}


def test_partial_complex_numbers():
    numbers = torch.complex(random(12, 13), random(12, 13, seed=1))
    not_linear = ruled(ONE, lambda x: x * x.abs(), "m n -> m n", linear=["x"])
    assert wrong(not_linear, numbers).keys() == {(P,), (AVG,)}
    right = ruled(TWO, planted.matmul, "m k, k n -> m n", linear=["x", "w"])
    report = moesaic.prove(right, numbers, numbers.mT * 2, axes=(2, 3), meshes=[], backward=False)
    assert report.ok, f"{report}"
    assert report.complete, f"{report}"
    spectrum = ruled(ONE, torch.fft.fft, "m n -> m n", linear=["x"])
    assert (S1,) in wrong(spectrum, numbers)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_partial_bools_and_bytes(dtype):
    values = (random(12, 13) * 3).to(torch.int64).to(dtype)
    op = ruled(ONE, lambda x: (x == 0).to(x.dtype), "m n -> m n", linear=["x"])
    assert wrong(op, values).keys() == {(P,)}
    kept = ruled(ONE, torch.clone, "m n -> m n", linear=["x"], preserves={"max": ["x"], "min": ["x"]})
    report = moesaic.prove(kept, values, axes=(2, 3), meshes=[(2, 2)], backward=False)
    assert report.ok, f"{report}"


def test_a_fake_kernel_that_says_something_else():
    def faked(function, fake):
        op = define(ONE, function)
        op.register_fake(fake)
        return moesaic.sharding_rule("m n! -> m")(op)

    for function, fake, problem in (
        (lambda x: x.sum(1), lambda x: x.new_empty(x.shape[0] + 1), r"says is float32 \[13\], it is float32 \[12\]"),
        (lambda x: x.float().sum(1), lambda x: x.new_empty(x.shape[0]), "says is float64 .*, it is float32"),
        (lambda x: x.sum(1), lambda x: x.new_empty(min(x.shape[0], 6) * 2), r"says is .* \[.*\], it is"),
    ):
        with pytest.raises(ValueError, match=f"its fake kernel is wrong for x float.*: it {problem}"):
            wrong(faked(function, fake), x)
    # Of all rows it is right, and of a rank's it is not.
    op = faked(lambda x: x.sum(1), lambda x: x.new_empty(x.shape[0] + (x.shape[0] == 6)))
    assert "the fake kernel is wrong for shards [6, 13]" in wrong(op, x)[(S0,)]


def test_results_that_could_show_no_error():
    for function in (lambda x: (x - 100).clamp(min=0), lambda x: x * float("nan"), lambda x: x * 0 + 3):
        with pytest.raises(ValueError, match="the result is .* everywhere: a wrong rule might pass"):
            wrong(ruled(ONE, function, "m n -> m n", linear=["x"]), x)
    report = moesaic.prove(
        ruled(PAIR, lambda x: (x.cumsum(1), x * 0), "m n! -> m n, m n"), x, axes=(2,), meshes=[], backward=False
    )
    assert not report.ok
    assert report.untried == ["result 1 is 0.0 everywhere: nothing was proved about it"]
    assert "NOT TRIED: result 1" in str(report)
    assert str(report).endswith("NOT ALL TRIED, nothing missing")


options = {"axes": (2,), "meshes": [], "backward": False}
ALONG = "(Tensor x, int dim) -> Tensor"


def test_a_flag_of_which_one_value_was_tried():
    def function(x, mode):
        return x.softmax(1 if mode == "rows" else 0)

    op = ruled("(Tensor x, str mode) -> Tensor", function, "m n! -> m n!")
    report = moesaic.prove(op, x, "rows", **options)
    assert not report.ok
    (untried,) = report.untried
    assert untried.startswith("every example has mode='rows': no other value was tried. Give others in also=")
    assert "sharding_rule(..., when={'mode': 'rows'})" in untried
    assert moesaic.prove(op, x, "rows", also=[(x, "columns")], **options).wrong
    whole = ruled("(Tensor x, str mode) -> Tensor", function, "m! n! -> m! n!")
    assert moesaic.prove(whole, x, "rows", **options).ok, "it cuts nothing"


def test_ints_next_to_those_of_an_example_are_tried():
    report = moesaic.prove(ruled(ALONG, planted.softmax_along, "m n! -> m n!"), x, 1, **options)
    assert {r.inputs for r in report.wrong} == {((S0,),)}, f"{report}"
    assert report.values == ["dim=1 or 0"]
    assert [note for note in report.notes if note.startswith("not tried with dim=2: ") and "out of range" in note]


def test_ints_of_which_the_operator_takes_no_others():
    def heads(x, n):
        torch._check(n == 3, lambda: "three heads")
        return x * n

    report = moesaic.prove(ruled("(Tensor x, int n) -> Tensor", heads, "m n -> m n", linear=["x"]), x, 3, **options)
    assert [text for text in report.untried if text.startswith("every example has n=3: no other value was tried")]


@pytest.mark.parametrize("values", [{"dim": [1, -1]}, {}])
def test_flags_that_are_given_by_keyword(values):
    def function(x, scale=2.0, *, dim=1):
        return x.softmax(dim) * scale

    op = planted.define_with_keywords("(Tensor x, float scale=2.0, *, int dim=1) -> Tensor", function)
    moesaic.sharding_rule("m n! -> m n!", when=values)(op)
    report = moesaic.prove(op, x, **options)
    assert report.ok == bool(values), f"{report}"
    assert report.values == ["scale=2.0 or 2.5", "dim=1 or -1" if values else "dim=1 or 0"]
    report = moesaic.prove(op, x, also=[(x, 3.0)], dim=-1, **options)
    assert report.ok == bool(values), f"{report}"
    assert report.values[0] == "scale=2.0 or 3.0"
    with pytest.raises(TypeError, match="no option 'axis', and .* no argument of this name; it has x, scale, dim"):
        moesaic.prove(op, x, axis=1, **options)


def test_tensors_that_are_given_by_keyword():
    def function(x, *, w, bias=None):
        return x @ w if bias is None else x @ w + bias

    schema = "(Tensor x, *, Tensor w, Tensor? bias=None) -> Tensor"
    for bias, linear, ok in (("+n", ["x", "w"], True), ("n", ["x", "w"], False)):
        op = planted.define_with_keywords(schema, function)
        moesaic.sharding_rule(f"m k, k n, {bias} -> m n", linear=linear)(op)
        report = moesaic.prove(op, x, w=random(13, 14), bias=random(14), axes=(2,), meshes=[])
        assert report.ok == ok, f"{report}"
        assert {r.case.names for r in report.admitted} == {("x", "w", "bias"), ("x", "w")}
    with pytest.raises(ValueError, match="no value for argument 'w'"):
        moesaic.prove(op, x, bias=random(14), **options)


@pytest.mark.parametrize("values", [1, [1, -1], {1, -1}])
def test_a_rule_that_says_for_which_flags_it_stands(values):
    report = moesaic.prove(ruled(ALONG, planted.softmax_along, "m n! -> m n!", when={"dim": values}), x, 1, **options)
    assert report.ok, f"{report}"
    assert report.complete, f"{report}"


def test_values_that_a_rule_names_and_no_example_has_are_tried():
    report = moesaic.prove(ruled(ALONG, planted.softmax_along, "m n! -> m n!", when={"dim": [1, 0]}), x, 1, **options)
    assert {r.inputs for r in report.wrong} == {((S0,),)}, f"{report}"
    rules = {"when": [{"dim": [1, -1]}, {"dim": [0, -2]}]}
    report = moesaic.prove(
        ruled(ALONG, planted.softmax_along, "m n! -> m n!", "m! n -> m! n", **rules), x, 1, **options
    )
    assert report.ok, f"{report}"
    assert {r.line for r in report.admitted} == {"m n! -> m n! when dim=1 or -1", "m! n -> m! n when dim=0 or -2"}


def scaled(x, scale=None):
    return x.cumsum(0) if scale is None else x * scale[:, None]


def test_calls_without_an_optional_tensor_are_tried():
    schema, scale = "(Tensor x, Tensor? scale=None) -> Tensor", random(12)
    report = moesaic.prove(ruled(schema, scaled, "m n, m -> m n"), x, scale, **options)
    assert {r.case.names for r in report.wrong} == {("x",)}, f"{report}"
    assert "x     scale  -> y  cases" in str(report), "a table for calls with it"
    assert "  x     -> y  cases" in str(report), "and one for calls without"
    given = ruled(schema, scaled, "m n, m -> m n", linear=["x", "scale"], when={"scale": Tensor})
    assert moesaic.prove(given, x, scale, **options).ok
    report = moesaic.prove(ruled(schema, scaled, "m n, m -> m n"), x, **options)
    assert "no example gives scale: nothing was tried with it" in report.untried


@pytest.mark.parametrize(("kind", "value"), [("bool", False), ("float", 0.0), ("bool[]", [False, False])])
def test_other_flags_are_made_up(kind, value):
    def function(x, flag):
        return x.cumsum(0) if flag and flag != value else x * 2

    op = ruled(f"(Tensor x, {kind} flag) -> Tensor", function, "m n -> m n", linear=["x"])
    assert {r.inputs for r in moesaic.prove(op, x, value, **options).wrong} == {((S0,),)}


def test_other_flags_that_the_operator_refuses():
    def function(x, flag):
        torch._check(not flag, lambda: "not on this device")
        return x * 2

    op = ruled("(Tensor x, bool flag) -> Tensor", function, "m n -> m n", linear=["x"], when={"flag": [False, True]})
    report = moesaic.prove(op, x, False, **options)
    assert report.ok, f"{report}"
    assert [note for note in report.notes if note.startswith("not tried with flag=True: ") and "not on this" in note]


def test_what_holds_until_an_expert_is_full():
    few = torch.arange(13) % 7
    op = ruled(
        "(Tensor x, Tensor ids, int capacity) -> Tensor", planted.within_capacity, "t d, t -> t d", when={"capacity": 4}
    )
    report = moesaic.prove(op, random(13, 6), few, 4, **options)
    (wrong,) = report.wrong
    assert wrong.inputs == ((S0,), (S0,))
    assert report.values == ["capacity=4", "ids from 0 to 6, 7 values"]
    assert "values: capacity=4; ids from 0 to 6, 7 values" in str(report)


def test_what_holds_within_a_window():
    op = ruled("(Tensor x, int window) -> Tensor", planted.in_window, "t d -> t d", when={"window": 12})
    assert moesaic.prove(op, random(13, 6), 12, **options).wrong, "it was tried around the window"
    op = ruled("(Tensor x, int window) -> Tensor", planted.in_window, "t d -> t d", when={"window": 1000})
    note = "window=1000 is more than any size: what changes beyond it was not tried"
    assert moesaic.prove(op, random(13, 6), 1000, **options).notes == [note]


@pytest.mark.parametrize("threshold", [1, 4, 7, 12, 13, 16, 24, 32, 100, 128, 256])
def test_kernels_that_differ_above_some_size(threshold):
    """The rule is right on either side of it, and wrong where a shard is on one side and the whole on the other."""
    op = ruled(ONE, lambda x: x.clamp(min=0) if x.shape[0] <= threshold else x * 1.0, "m n! -> m n!")
    assert wrong(op, random(13, 5), axes=(2,)).keys() == {(S0,)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("right", [torch.clone, planted.softmax])
def test_kernels_of_the_dtype_that_is_given(dtype, right):
    """Of the wider dtypes in which it is compared it is another."""
    op = ruled(ONE, lambda x: x.cumsum(0) if x.dtype == dtype else right(x), "m n! -> m n!")
    assert wrong(op, x.to(dtype)).keys() == {(S0,)}


def test_results_that_differ_where_two_dims_are_cut():
    op = ruled(ONE, lambda x: x * (2 if x.shape[0] <= 6 and 5 < x.shape[1] <= 7 else 1), "m n -> m n")
    report = moesaic.prove(op, x, axes=(2,), meshes=[(2, 2)], backward=False)
    assert (((S0, S1),), ((S0, S1),)) in [(r.inputs, r.outputs) for r in report.wrong]


def test_dims_of_one():
    op = ruled(ONE, lambda x: x * 2 if x.shape[0] == 1 else x * 1.0, "m n! -> m n!")
    assert wrong(op, x).keys() == {(S0,)}


def test_the_gradient_of_a_tensor_that_may_be_left_out():
    kernel = ruled(ONE, lambda grad: grad.sum(0) / max(1, grad.shape[0]), "m n -> n", redistribute=["x"])

    def function(x, bias=None):
        return x * 1.0 if bias is None else x + bias

    def gradient(grad, x, bias):
        return grad * 1.0, None if bias is None else kernel(grad)

    op = ruled("(Tensor x, Tensor? bias=None) -> Tensor", function, "m n, +n -> m n", linear=["x"])
    op = differentiable(op, gradient)
    given = {"axes": (2,), "meshes": []}
    for report in (moesaic.prove(op, x, random(13), **given), moesaic.prove(op, x, also=[(x, random(13))], **given)):
        assert {r.case.names for r in report.wrong} == {("x", "bias")}
        assert "the gradient of bias" in report.wrong[0].error


def test_an_operator_that_changes_an_argument_in_secret():
    op = ruled(ONE, lambda x: x.clamp_(min=0) * 1.0, "m n -> m n")
    with pytest.raises(ValueError, match="changes x, and its schema does not say so"):
        wrong(op, x.clone())
