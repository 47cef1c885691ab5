"""`sharding_rule` on anybody's operator: flags, optional arguments, several results, and what it refuses."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication

import moesaic
from moesaic.ops import grouped_mm
from moesaic.sharding import NotationError, rule_of
from tests.sharding.problems import integers
from tests.sharding.simulated import no_collectives, simulated_ranks, whole
from tests.sharding.test_refusals import follow

MATMUL = "m k, k n -> m n"
_numbers = itertools.count()


def define(schema: str, function, fake=None) -> torch.library.CustomOpDef:
    """A new operator."""
    op = torch.library.custom_op(f"moesaic_test::op{next(_numbers)}", function, mutates_args=(), schema=schema)
    op.register_fake(fake or function)
    return op


# Flags. DTensor's cache of decisions ignores what stands before the first int, unless the rule says otherwise.


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ("bool flag, int times", [(False, 7), (True, 7)]),
        ("float flag, int times", [(0.0, 7), (1.0, 7)]),
        ("str flag, int times", [("", 7), ("transposed", 7)]),
        ("bool? flag, int times", [(None, 7), (True, 7)]),
        ("int[] flag, int times", [([0, 0], 7), ([1, 1], 7)]),
        ("bool flag, float scale", [(False, 1.5), (True, 1.5)]),
        ("bool flag=False", [(), (True,)]),
        ("int times, bool flag", [(7, False), (7, True)]),
    ],
)
def test_a_decision_for_each_value_of_a_flag(schema, values):
    def matmul(x: Tensor, w: Tensor, *flags) -> Tensor:
        is_on = any(flag in (True, "transposed", [1, 1]) for flag in flags)
        return (x @ w).mT.contiguous() if is_on else x @ w

    op = define(f"(Tensor x, Tensor w, {schema}) -> Tensor", matmul)
    moesaic.sharding_rule(MATMUL, "m k, k n -> n m")(op)
    x, w = integers(4, 3, seed=1), integers(3, 5, seed=2)
    with simulated_ranks(2) as ranks:
        x_R, w_S1 = ranks.place(x, [Replicate()]), ranks.place(w, [Shard(1)])
        for flags, dim in zip(values * 2, (1, 0) * 2, strict=True):
            y = op(x_R, w_S1, *flags)
            assert y.placements == (Shard(dim),)
            assert torch.equal(whole(y), matmul(x, w, *flags))


def test_a_decision_for_each_value_of_a_keyword():
    def matmul(x: Tensor, w: Tensor, times: int, *, flag: bool = False) -> Tensor:
        return (x @ w).mT.contiguous() if flag else x @ w

    op = define("(Tensor x, Tensor w, int times, *, bool flag=False) -> Tensor", matmul)
    moesaic.sharding_rule(MATMUL, "m k, k n -> n m")(op)
    x, w = integers(4, 3, seed=1), integers(3, 5, seed=2)
    with simulated_ranks(2) as ranks:
        x_R, w_S1 = ranks.place(x, [Replicate()]), ranks.place(w, [Shard(1)])
        for keywords in ({}, {"flag": True}, {"flag": False}, {"flag": True}):
            y = op(x_R, w_S1, 1, **keywords)
            assert y.placements == (Shard(0 if keywords.get("flag") else 1),)
            assert torch.equal(whole(y), matmul(x, w, 1, **keywords))


# Exactly the given placements.


@pytest.mark.parametrize("blocks", [2, 4])
def test_on_two_axes_the_given_placements_are_taken(blocks):
    # Cutting what is replicated costs nothing, so to torch's register_sharding tokens over both axes are as cheap as
    # what is asked for here; and where there are two blocks, they would be cut.
    x, w, sizes = (
        integers(3 * blocks, 3, seed=1),
        integers(2, 3, 5, seed=2),
        torch.tensor([[2, 1], [0, 2]] * 2)[:blocks],
    )
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    expected = grouped_mm(*leaves, sizes)
    grad = integers(3 * blocks, 5, seed=3)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    tokens, everywhere = [Shard(0), Replicate()], [Replicate(), Replicate()]
    with simulated_ranks(2, 2) as ranks:
        x, w = ranks.place(x, tokens).requires_grad_(), ranks.place(w, everywhere).requires_grad_()
        with no_collectives():
            y = grouped_mm(x, w, ranks.place(sizes, tokens))
            grads = torch.autograd.grad(y, (x, w), ranks.place(grad, tokens))
        assert y.placements == tuple(tokens)
        assert [g.placements for g in grads] == [tuple(tokens), (Partial(), Replicate())]
        assert torch.equal(whole(y), expected)
        assert all(torch.equal(whole(a), b) for a, b in zip(grads, expected_grads, strict=True))


# More kinds of operators.


def test_several_results():
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(1), x.sum(0)

    op = moesaic.sharding_rule("m k -> m, k", linear=["x"])(define("(Tensor x) -> (Tensor, Tensor)", both))
    x = integers(5, 3, seed=1)
    expected = {Replicate(): (Replicate(),) * 2, Shard(0): (Shard(0), Partial()), Shard(1): (Partial(), Shard(0))}
    with simulated_ranks(2) as ranks:
        for placement, outputs in (expected | {Partial(): (Partial(),) * 2}).items():
            with no_collectives():
                results = op(ranks.place(x, [placement]))
            assert [r.placements for r in results] == [(p,) for p in outputs]
            assert all(torch.equal(whole(ours), theirs) for ours, theirs in zip(results, both(x), strict=True))


def test_an_optional_argument():
    def affine(x: Tensor, bias: Tensor | None, times: int) -> Tensor:
        return x * times + (0 if bias is None else bias)

    op = define("(Tensor x, Tensor? bias, int times) -> Tensor", affine)
    moesaic.sharding_rule("m n, n -> m n", linear=[("x", "bias")])(op)
    x, bias = integers(5, 3, seed=1), integers(3, seed=2)
    cases = [
        (Replicate(), Replicate(), Replicate()),
        (Shard(0), Replicate(), Shard(0)),
        (Shard(1), Shard(0), Shard(1)),
        (Partial(), Partial(), Partial()),
    ]
    with simulated_ranks(2) as ranks:
        for x_placement, bias_placement, expected in cases:
            placed = ranks.place(x, [x_placement])
            for b, theirs in ((ranks.place(bias, [bias_placement]), affine(x, bias, 2)), (None, affine(x, None, 2))):
                with no_collectives():
                    y = op(placed, b, 2)
                assert y.placements == (expected,)
                assert torch.equal(whole(y), theirs)
        with pytest.raises(moesaic.ShardingError, match=r"admits x \[P\], bias \[R\]") as caught:
            op(ranks.place(x, [Partial()]), ranks.place(bias, [Replicate()]), 2)
        # Not bias.redistribute([Partial()]), which DTensor does not do.
        fixed = follow(str(caught.value), {"x": ranks.place(x, [Partial()]), "bias": ranks.place(bias, [Replicate()])})
        assert torch.equal(whole(op(*fixed.values(), 2)), affine(x, bias, 2))


def test_a_bias_is_counted_once():
    def affine(x: Tensor, w: Tensor, bias: Tensor | None, times: int) -> Tensor:
        return x @ w if bias is None else x @ w + bias

    op = define("(Tensor x, Tensor w, Tensor? bias, int times) -> Tensor", affine)
    moesaic.sharding_rule("m k, k n, +n -> m n", linear=["x", "w"])(op)
    x, w, bias = integers(5, 3, seed=1), integers(3, 4, seed=2), integers(4, seed=3)
    cases = [
        # A replicated bias counts on the first rank, without communication.
        (Shard(1), Shard(0), Replicate(), Partial()),
        (Shard(1), Shard(0), Partial(), Partial()),
        (Partial(), Replicate(), Replicate(), Partial()),
        (Partial(), Replicate(), Partial(), Partial()),
        (Replicate(), Shard(1), Shard(0), Shard(1)),
        (Partial("avg"), Replicate(), Replicate(), Partial("avg")),
    ]
    with simulated_ranks(3) as ranks:
        for *placements, expected in cases:
            inputs = [ranks.place(t, [p]) for t, p in zip((x, w, bias), placements, strict=True)]
            with no_collectives():
                y = op(*inputs, 1)
            assert y.placements == (expected,)
            assert torch.equal(whole(y), affine(x, w, bias, 1))
        with pytest.raises(moesaic.ShardingError, match=r"bias \[P\]"):
            op(ranks.place(x, [Replicate()]), ranks.place(w, [Replicate()]), ranks.place(bias, [Partial()]), 1)
    with simulated_ranks(2, 2) as ranks:
        both = [Shard(1), Replicate()], [Shard(0), Shard(1)], [Replicate(), Shard(0)]
        y = op(*(ranks.place(t, p) for t, p in zip((x, w, bias), both, strict=True)), 1)
        assert y.placements == (Partial(), Shard(1))
        assert torch.equal(whole(y), affine(x, w, bias, 1))


def test_an_integer_term_stays_exact():
    op = define("(Tensor x, Tensor y) -> Tensor", lambda x, y: x.sum(1) + y)
    moesaic.sharding_rule("m k, +m -> m")(op)
    x, y = torch.arange(12).view(3, 4), torch.tensor([2**40 + 1, 2, 4])
    with simulated_ranks(3) as ranks:
        z = op(ranks.place(x, [Shard(1)]), ranks.place(y, [Replicate()]))
        assert z.dtype == z.to_local().dtype == torch.int64
        assert torch.equal(whole(z), x.sum(1) + y)


def test_a_tensor_of_which_only_the_shape_is_read():
    def like(x: Tensor, model: Tensor) -> Tensor:
        return x.unflatten(0, model.shape).clone()

    op = define("(Tensor x, Tensor model) -> Tensor", like)
    moesaic.sharding_rule("(b c), ~b c -> b c")(op)
    x, model = integers(6, seed=1), integers(2, 3, seed=2)
    with simulated_ranks(2) as ranks:
        for placement in (Replicate(), Partial(), Partial("avg"), Partial("max")):
            t = DTensor.from_local(model, ranks.mesh, [placement])
            y = op(ranks.place(x, [Replicate()]), t)
            assert y.placements == (Replicate(),)
            assert torch.equal(whole(y), x.view(2, 3))
        y = op(ranks.place(x, [Shard(0)]), ranks.place(model, [Shard(0)]))
        assert y.placements == (Shard(0),)
        assert torch.equal(whole(y), x.view(2, 3))


def test_a_largest_value():
    def largest(x: Tensor) -> Tensor:
        return x.amax(1)

    op = moesaic.sharding_rule("m k -> max: m", preserves={"max": ["x"]})(define("(Tensor x) -> Tensor", largest))
    x = integers(5, 3, seed=1)
    with simulated_ranks(3) as ranks:
        y = op(ranks.place(x, [Shard(1)]))
        assert y.placements == (Partial("max"),)
        assert torch.equal(y.full_tensor().reconcile(), x.amax(1))
        y = op(DTensor.from_local(x, ranks.mesh, [Partial("max")]))
        assert y.placements == (Partial("max"),)
        with pytest.raises(moesaic.ShardingError, match=r"x \[P\(min\)\]"):
            op(DTensor.from_local(x, ranks.mesh, [Partial("min")]))


def test_a_result_is_reduced_in_one_way():
    # DTensor cannot redistribute what is Partial of two reductions, but for sums and means, which commute.
    op = define("(Tensor x, Tensor y) -> Tensor", torch.add)
    moesaic.sharding_rule("m, +m -> m", linear=["x"])(op)
    x, y = integers(5, seed=1), integers(5, seed=2)
    with simulated_ranks(2, 2) as ranks:
        mean = ranks.place(x, [Partial(), Partial("avg")])
        with no_collectives():
            z = op(mean, ranks.place(y, [Replicate(), Replicate()]))
        assert z.placements == (Partial(), Partial("avg"))
        assert torch.equal(whole(z), x + y)
        largest = DTensor.from_local(y, ranks.mesh, [Replicate(), Partial("max")])
        with pytest.raises(moesaic.ShardingError, match=r"x \[P, R\], y \[R, P\(max\)\]"):
            op(ranks.place(x, [Partial(), Replicate()]), largest)


# Plain tensors among DTensors.


def test_a_plain_tensor_is_not_taken_for_replicated():
    op = moesaic.sharding_rule("m, m -> m")(define("(Tensor x, Tensor y) -> Tensor", torch.add))
    x = integers(4, seed=1)
    with simulated_ranks(2) as ranks:
        placed = ranks.place(x, [Replicate()])
        with pytest.raises(moesaic.ShardingError, match="y is a plain tensor, but other arguments are DTensors"):
            op(placed, x)
        with implicit_replication():
            assert torch.equal(whole(op(x, placed)), x + x)


def test_a_scalar_is_replicated():
    op = moesaic.sharding_rule("m, -> m")(define("(Tensor x, Tensor y) -> Tensor", torch.mul))
    x = integers(4, seed=1)
    with simulated_ranks(2) as ranks:
        assert torch.equal(whole(op(ranks.place(x, [Shard(0)]), torch.tensor(3.0).double())), 3 * x)


def test_two_meshes():
    op = moesaic.sharding_rule("m, m -> m")(define("(Tensor x, Tensor y) -> Tensor", torch.add))
    x = integers(4, seed=1)
    with simulated_ranks(2, 2) as ranks:
        one = DTensor.from_local(x, ranks.mesh["a"], [Replicate()])
        with pytest.raises(moesaic.ShardingError, match="its tensors are on two meshes"):
            op(one, ranks.place(x, [Replicate()] * 2))


def test_redistribution_on_demand():
    def rows(x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    strict, free = (define("(Tensor x, Tensor w) -> Tensor", rows) for _ in range(2))
    moesaic.sharding_rule(MATMUL, linear=["x", "w"])(strict)
    moesaic.sharding_rule(MATMUL, linear=["x", "w"], redistribute=True)(free)
    x, w = integers(4, 3, seed=1), integers(3, 5, seed=2)
    kinds = [Replicate(), Shard(0), Shard(1), Partial()]
    admitted = {axis.inputs: axis.outputs[0] for axis in rule_of(free).placements()}
    with simulated_ranks(2) as ranks:
        for placements in itertools.product(kinds, repeat=2):
            x_d, w_d = (ranks.place(t, [p]) for t, p in zip((x, w), placements, strict=True))
            y = free(x_d, w_d)
            assert torch.equal(whole(y), x @ w)
            if placements in admitted:
                with no_collectives():
                    assert free(x_d, w_d).placements == (admitted[placements],)
            else:
                with pytest.raises(moesaic.ShardingError):
                    strict(x_d, w_d)


def test_redistribution_never_cuts_inside_a_block():
    def totals(x: Tensor, sizes: Tensor) -> Tensor:
        return x.unflatten(0, (len(sizes), -1)).sum(1)

    op = define("(Tensor x, Tensor sizes) -> Tensor", totals)
    moesaic.sharding_rule("(b c) k, b -> b k", redistribute=True)(op)
    x, sizes = integers(6, 4, seed=1), torch.zeros(3)
    with simulated_ranks(2) as ranks:
        for placement in (Shard(0), Shard(1), Replicate(), Partial()):
            y = op(ranks.place(x, [placement]), ranks.place(sizes, [Shard(0)]))
            assert y.placements != (Shard(0),)
            assert torch.equal(whole(y), totals(x, sizes))


def test_shapes_that_fit_no_line():
    def same(x: Tensor) -> Tensor:
        return x.clone()

    op = define("(Tensor x) -> Tensor", same)
    moesaic.sharding_rule("a b -> a b", "a b c -> a b c")(op)
    with simulated_ranks(2) as ranks, pytest.raises(moesaic.ShardingError) as caught:
        op(ranks.place(torch.zeros(3), [Replicate()]))
    message = str(caught.value)
    assert "no line of its rule fits the shapes x [3] -> [3]:\n  a b -> a b\n  a b c -> a b c" in message


# What can be given a rule, and what it is told.


def test_every_kind_of_operator_is_returned_as_it_is():
    def double(x: Tensor) -> Tensor:
        return x * 2

    op = define("(Tensor x) -> Tensor", double)
    overload = op._opoverload
    for form in (op, overload, overload.overloadpacket):
        assert moesaic.sharding_rule("m -> m", linear=["x"])(form) is form
        assert str(rule_of(form).lines[0]) == "m -> m"
    with simulated_ranks(2) as ranks:
        y = op(ranks.place(torch.arange(3.0), [Shard(0)]))
        assert isinstance(y, DTensor)
        assert torch.equal(whole(y), torch.tensor([0.0, 2.0, 4.0]))


def test_not_an_operator(unchecked):
    with pytest.raises(TypeError, match="expected an operator: a custom_op, .* not function"):
        moesaic.sharding_rule("m -> m")(lambda x: x)


def test_an_operator_without_a_rule():
    with pytest.raises(KeyError):
        rule_of(torch.ops.aten.mm)


def test_an_operator_that_mutates():
    op = torch.library.custom_op(
        "moesaic_test::mutates", lambda x: None, mutates_args=("x",), schema="(Tensor(a!) x) -> ()"
    )
    with pytest.raises(ValueError, match="mutates an argument.*return a new tensor"):
        moesaic.sharding_rule("m -> ")(op)


@pytest.mark.parametrize("kind", ["Tensor[]", "Tensor?[]", "Tensor[]?"])
def test_a_list_of_tensors(kind):
    op = define(f"(Tensor x, {kind} others) -> Tensor", lambda x, others: x.clone())
    with pytest.raises(ValueError, match="argument 'others' is a list of tensors"):
        moesaic.sharding_rule("m, m -> m")(op)


@pytest.mark.parametrize("result", ["int", "Tensor[]", "(Tensor, float)"])
def test_results_that_are_not_tensors(result):
    op = define(f"(Tensor x) -> {result}", lambda x: x)
    with pytest.raises(ValueError, match="returns .*; a sharding rule needs tensors"):
        moesaic.sharding_rule("m -> m")(op)


@pytest.mark.parametrize(
    ("lines", "options", "error", "message"),
    [
        (["m k -> m"], {}, ValueError, "has 1 inputs, the operator has 2 tensor arguments: x, w"),
        (["m k, k n -> m n, m"], {}, ValueError, "has 2 outputs, .* returns 1"),
        ([MATMUL], {"linear": ["weight"]}, ValueError, "'weight' is not a tensor argument of the operator: x, w"),
        ([MATMUL], {"linear": ["times"]}, ValueError, "'times' is not a tensor argument"),
        ([MATMUL], {"redistribute": ["grad"]}, ValueError, "'grad' is not a tensor argument"),
        (["m k, k n m n"], {}, NotationError, "a rule needs '->'"),
        ([], {}, ValueError, "at least one line"),
    ],
)
def test_rules_that_do_not_fit(lines, options, error, message):
    op = define("(Tensor x, Tensor w, int times) -> Tensor", lambda x, w, times: x @ w)
    with pytest.raises(error, match=message):
        moesaic.sharding_rule(*lines, **options)(op)
    with pytest.raises(KeyError):
        rule_of(op)
