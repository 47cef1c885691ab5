"""The notation of sharding rules: what it says, its round trip, and errors that point at the character."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.sharding import NotationError, parse
from moesaic.sharding.notation import Dim, Pattern


def test_a_matrix_product():
    line = parse("m k, k n -> m n")
    assert line.inputs == (Pattern((Dim(("m",)), Dim(("k",)))), Pattern((Dim(("k",)), Dim(("n",)))))
    assert line.outputs == (Pattern((Dim(("m",)), Dim(("n",)))),)
    assert line.factors == line.shardable == ("m", "k", "n")
    assert line.whole == line.blocks == frozenset()


def test_blocks():
    line = parse("(b c) k, (b g) k n, b g -> (b c) n")
    assert [str(dim) for dim in line.inputs[0].dims] == ["(b c)", "k"]
    assert line.blocks == {"b"}
    assert line.whole == {"c", "g"}
    assert line.factors == ("b", "c", "k", "g", "n")
    assert line.shardable == ("b", "k", "n")
    # A shard cuts between blocks; what is inside a block leads no dim, and g leads only the dim it has alone.
    assert [pattern.dim_led_by("b") for pattern in line.inputs] == [0, 0, 0]
    assert [pattern.dim_led_by("c") for pattern in line.inputs] == [None, None, None]
    assert [pattern.dim_led_by("g") for pattern in line.inputs] == [None, None, 1]
    assert [pattern.dim_led_by("n") for pattern in line.inputs] == [None, 2, None]
    assert line.outputs[0].dim_led_by("n") == 1


def test_blocks_of_blocks():
    line = parse("(a b c) -> (a b) c")
    assert line.inputs[0].dims == (Dim(("a", "b", "c")),)
    assert line.blocks == {"a"}
    assert line.whole == {"b", "c"}


@pytest.mark.parametrize("text", ["r! k, r -> r k", "r k, r! -> r k", "r k, r -> r! k", "r! k, r! -> r! k"])
def test_whole_is_written_once_anywhere(text):
    line = parse(text)
    assert line.whole == {"r"}
    assert line.shardable == ("k",)
    assert line.inputs[0].dims == (Dim(("r",)), Dim(("k",)))


def test_whole_inside_a_block():
    assert parse("(b! c) k -> b! c k").whole == {"b", "c"}


def test_an_output_dim_of_its_own_is_whole():
    assert parse("t -> t e!").shardable == ("t",)


def test_dims_of_size_one_have_no_factor():
    line = parse("m 1, 1 1 -> 1 m")
    assert line.inputs[0].dims == (Dim(("m",)), Dim(()))
    assert line.inputs[1].dims == (Dim(()), Dim(()))
    assert line.factors == ("m",)
    assert Dim(()).leading is None
    assert str(Dim(())) == "1"


def test_tensors_without_dims_are_nothing():
    line = parse("m, -> m")
    assert line.inputs == (Pattern((Dim(("m",)),)), Pattern(()))
    assert parse("m -> ").outputs == parse("m ->").outputs == (Pattern(()),)
    assert parse("->").inputs == (Pattern(()),)
    assert parse(", , -> ,").inputs == (Pattern(()),) * 3
    assert parse(", , -> ,").outputs == (Pattern(()),) * 2


def test_several_outputs():
    line = parse("t! k! -> r!, t! k!, e!")
    assert len(line.inputs) == 1
    assert [len(pattern.dims) for pattern in line.outputs] == [1, 2, 1]
    assert line.shardable == ()
    assert parse("m k -> m, k").shardable == ("m", "k")


def test_names_are_words():
    line = parse("Rows d_model, d_model f2 -> Rows f2")
    assert line.factors == ("Rows", "d_model", "f2")


def test_marks():
    line = parse("m k, ~k n, + n, +-> max: m n, min:n, m, sum :")
    assert [p.additive for p in line.inputs] == [False, False, True, True]
    assert [p.shape_only for p in line.inputs] == [False, True, False, False]
    assert [p.reduction for p in line.outputs] == ["max", "min", "sum", "sum"]
    assert line.inputs[1].dims == (Dim(("k",)), Dim(("n",)))
    assert line.inputs[3].dims == line.outputs[3].dims == ()


def test_terms_of_some_sums_and_what_does_not_depend_on_a_factor():
    line = parse("m k l, +k: n, + n, l -> m n, same k: m, same k l : m n")
    assert [p.additive for p in line.inputs] == [False, True, True, False]
    assert [p.added_to for p in line.inputs] == [None, {"k"}, None, None]
    assert [p.same for p in line.outputs] == [set(), {"k"}, {"k", "l"}]
    assert line.shardable == ("m", "k", "l", "n")


def test_blocks_that_end_early():
    line = parse("(b c), (b g)? k, b g -> (b c) k")
    assert [dim.short for dim in line.inputs[1].dims] == [True, False]
    assert str(line.inputs[1].dims[0]) == "(b g)?"
    assert line.inputs[0].dims[0].short is False
    assert line.blocks == {"b"}


def test_blanks_do_not_matter():
    tight, loose = parse("(b c)k,b g!->(b c)k"), parse("  ( b   c )  k , b\tg!  ->  ( b c ) k ")
    assert (tight.inputs, tight.outputs, tight.whole) == (loose.inputs, loose.outputs, loose.whole)


# Rule, what the message says, and a caret under the character it speaks of.
EXPECTED = "expected a factor, '(' or ',', not "
ERRORS = [
    ("m k, k n", "a rule needs '->' between inputs and outputs", "        ^"),
    ("", "a rule needs '->'", "^"),
    ("m k, +n -> +m n", "'+' marks an input, not an output", "           ^"),
    ("m k -> ~ m", "'~' marks an input, not an output", "       ^"),
    ("m +k -> m", EXPECTED + "'+'", "  ^"),
    ("m? -> m", EXPECTED + "'?'", " ^"),
    ("max: m -> m", "a reduction stands before an output, not an input", "   ^"),
    ("m k -> amax: m", "expected one of sum, avg, max, min, or same and factors, before ':'", "       ^"),
    ("m k -> m, : k", "expected one of sum, avg, max, min, or same and factors, before ':'", "          ^"),
    ("m k -> same: m", "expected one of sum, avg, max, min, or same and factors, before ':'", "       ^"),
    ("m k -> max k: m", "expected one of sum, avg, max, min, or same and factors, before ':'", "       ^"),
    ("m k -> same m: m", "factor 'm' is a dim of this tensor, so it depends on it", "            ^"),
    ("m k, +j: m -> m", "factor 'j' is on no input", "      ^"),
    ("m k -> max: min: m", EXPECTED + "':'", "               ^"),
    ("m -> k -> m", "a rule has one '->'", "       ^"),
    ("m k -> m j", "factor 'j' is on an output but on no input; a dim of its own stays whole: 'j!'", "         ^"),
    ("m -> k j m, l", "factor 'k' is on an output but on no input", "     ^"),
    ("m m -> m", "factor 'm' stands twice in one tensor", "  ^"),
    ("k, (m k m) -> k", "factor 'm' stands twice in one tensor", "        ^"),
    ("m (m k) -> k", "factor 'm' stands twice in one tensor", "   ^"),
    ("(a (b c)) -> a", "'(' inside '('", "   ^"),
    ("a) -> a", "')' without '('", " ^"),
    ("a (b) -> a", "'(...)' needs at least two factors", "  ^"),
    ("a () -> a", "'(...)' needs at least two factors", "  ^"),
    ("a (b c -> a", "'(' is never closed", "  ^"),
    ("a, (b, c) -> a", "'(' is never closed", "   ^"),
    ("a -> (a b", "'(' is never closed", "     ^"),
    ("a ! -> a", EXPECTED + "'!'", "  ^"),
    ("a!! -> a", EXPECTED + "'!'", "  ^"),
    ("(a b)! -> a b", EXPECTED + "'!'", "     ^"),
    ("a * -> a", EXPECTED + "'*'", "  ^"),
    ("a .. -> a", EXPECTED + "'.'", "  ^"),
    ("a - b -> a", EXPECTED + "'-'", "  ^"),
    ("a 2 -> a", EXPECTED + "'2'", "  ^"),
    ("a 2b -> a", EXPECTED + "'2'", "  ^"),
    # Neither two dims of size one, nor one and a factor.
    ("a 11 -> a", EXPECTED + "'1'", "  ^"),
    ("a 1b -> a", EXPECTED + "'1'", "  ^"),
    ("a (b 1) -> a", EXPECTED + "'1'", "     ^"),
    ("a 1! -> a", EXPECTED + "'!'", "   ^"),
]


@pytest.mark.parametrize(("text", "problem", "caret"), ERRORS, ids=[text or "empty" for text, *_ in ERRORS])
def test_errors_point_at_the_character(text, problem, caret):
    with pytest.raises(NotationError) as caught:
        parse(text)
    message, rule, pointer = str(caught.value).split("\n")
    assert message.startswith(problem)
    assert rule == f"  {text}"
    assert pointer == f"  {caret}"
    assert (caught.value.text, caught.value.position) == (text, len(caret) - 1)
    assert isinstance(caught.value, ValueError)


NAMES = st.sampled_from(["a", "b", "c", "d", "e0", "rows", "d_model", "K"])
BLANKS = st.sampled_from(["", " ", "  ", "\t"])
# Factors of each dim, dims of each tensor: plain tuples, as a strategy may not enter functions checked at run time.
Dims = tuple[tuple[str, ...], ...]


@st.composite
def dims_of(draw: st.DrawFn, names: list[str]) -> Dims:
    """Dims of distinct factors, some of them grouped into blocks, some of size one."""
    left = draw(st.permutations(names))
    dims = []
    while left and draw(st.booleans()):
        size = draw(st.integers(0, min(3, len(left))))
        dims.append(tuple(left[:size]))
        left = left[size:]
    return tuple(dims)


@st.composite
def rules(draw: st.DrawFn) -> tuple[list[Dims], list[Dims], set[str]]:
    """Inputs, outputs made of their factors, and the factors to be marked."""
    names = draw(st.lists(NAMES, unique=True, max_size=6))
    inputs = draw(st.lists(dims_of(names), min_size=1, max_size=3))
    here = sorted({factor for dims in inputs for dim in dims for factor in dim})
    outputs = draw(st.lists(dims_of(here), min_size=1, max_size=3))
    return inputs, outputs, draw(st.sets(st.sampled_from(here))) if here else set()


@given(rules(), st.data())
def test_round_trip(rule, data):
    *sides, marked = rule
    dims = [dim for side in sides for tensor in side for dim in tensor]
    unwritten = set(marked)

    def write_factor(name: str) -> str:
        # Marked at its first appearance, and at any other or not.
        first = name in unwritten
        unwritten.discard(name)
        return name + "!" * (first or (name in marked and data.draw(st.booleans())))

    def write_dim(dim: tuple[str, ...]) -> str:
        words = " ".join(map(write_factor, dim))
        return f"({words})" if len(dim) > 1 else words or "1"

    def write(tensor: Dims) -> str:
        return data.draw(BLANKS) + " ".join(map(write_dim, tensor)) + data.draw(BLANKS)

    text = "->".join(",".join(map(write, side)) for side in sides)
    line = parse(text)
    structure = [
        [tuple(dim.factors for dim in pattern.dims) for pattern in side] for side in (line.inputs, line.outputs)
    ]
    assert structure == sides
    assert line.whole == marked | {factor for dim in dims for factor in dim[1:]}
    assert line.blocks == {dim[0] for dim in dims if len(dim) > 1}
    assert line.factors == tuple(dict.fromkeys(factor for dim in dims for factor in dim))
    assert line.shardable == tuple(factor for factor in line.factors if factor not in line.whole)
    assert str(line) == line.text == text


@given(st.text(alphabet="ab1! (),->_.", max_size=20))
def test_any_text_parses_or_is_explained(text):
    try:
        shown, position = str(parse(text)), 0
    except NotationError as error:
        shown, position = error.text, error.position
    assert shown == text
    assert 0 <= position <= len(text)
