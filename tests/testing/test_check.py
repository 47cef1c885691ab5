"""A check as a whole: what is equal, what cannot be run, what is no fault, and the command."""

import functools
import itertools
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moesaic.cli import main
from moesaic.testing import CheckError, Layout, Pools, check_gradients
from moesaic.testing.worker import default_loss
from tests.testing import bare

pytestmark = pytest.mark.slow

TWO = [{"tp": 2, "ep": 2}]


@pytest.fixture(scope="module")
def pools():
    pools = Pools()
    yield pools
    pools.stop()


def test_right_layouts_are_equal(pools):
    layouts = [{"dp": 2}, {"tp": 2}, {"tp": 2, "ep": 2}, {"dp": 2, "tp": 2}, {"dp": 2, "tp": 2, "ep": 2}]
    report = check_gradients(bare.check(layouts=layouts, steps=2), pools)
    assert report.ok, report
    # Output, 10 gradients, the gradients of 2 inputs, loss and norm in each step; 10 weights before and after.
    assert {r.compared for r in report.layouts} == {10 + 2 * 15 + 10}


def test_an_axis_that_is_right_elsewhere_is_not_blamed(pools):
    check = bare.check("loss times dp", layouts=[{"dp": 2, "tp": 2}, {"tp": 2, "ep": 2}])
    both = check_gradients(check, pools).findings
    assert [f.axes for f in both] == [("dp",)]


def _detached_router(model, layout):
    model = bare.Hand()(model, layout)
    model.moe.router.weight.requires_grad_(False)
    return model


def _halved_experts(model, layout):
    model = bare.Hand()(model, layout)
    model.moe.experts.register_forward_hook(lambda m, a, out: out.sin())
    return model


@pytest.mark.parametrize(
    ("parallelize", "kind", "said"),
    [
        (_detached_router, "missing", "gradient of moe.router.weight: there is none: no rank has it"),
        (_halved_experts, "layer", "output of moe.experts"),
    ],
)
def test_other_faults(pools, parallelize, kind, said):
    report = check_gradients(bare.check(parallelize=parallelize, clip=None, layouts=[{"dp": 2}]), pools)
    assert report.ran, report
    assert report.findings[0].kind == kind, report
    assert said in str(report)


class _Inner(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def _wrap(model, layout):
    model = bare.Hand()(model, layout)
    with torch.no_grad():
        model.embed.bias.zero_()
    model.embed = _Inner(model.embed)
    return model


def _build_with_zeros():
    model = bare.build()
    nn.init.zeros_(model.embed.bias)
    return model


def _unwrapped(name, rank, layout):
    return (name.replace("inner.", ""), ()) if "inner." in name else None


def _nowhere(name, rank, layout):
    return "nothing", ()


def test_parameters_of_other_names(pools):
    check = functools.partial(bare.check, build=_build_with_zeros, parallelize=_wrap, clip=None, layouts=[{"dp": 2}])
    assert check_gradients(check(where=_unwrapped), pools).ok
    # The weight is found by its values. Zeros could be anybody's.
    assert "parameter embed.inner.bias [8] of rank 0 is no part of one" in str(check_gradients(check(), pools))
    assert "'nothing' for embed.inner.weight" in str(check_gradients(check(where=_nowhere), pools))


def _uneven(rank, layout):
    """Rank 0 has more tokens than the others."""
    whole = bare.inputs(0, Layout())
    rows = slice(0, 11) if rank == 0 else slice(11, None)
    return whole if layout.world == 1 else {name: t[rows] for name, t in whole.items()}


def _mean_loss(model, batch):
    return (model(batch["x"]) - batch["target"]).square().mean()


def _averaged(model, batch, layout):
    value = _mean_loss(model, batch)
    value.backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()
    return value


def _ddp(model, layout):
    return DistributedDataParallel(model)


def test_ddp_is_equal(pools):
    report = check_gradients(
        bare.check(parallelize=_ddp, loss=_mean_loss, backward=None, clip=None, layouts=[{"dp": 2}]), pools
    )
    assert report.ok, report
    assert "the ranks report the mean over their tokens" in str(report)


def test_means_over_uneven_numbers_of_tokens_are_named(pools):
    check = bare.check(inputs=_uneven, loss=_mean_loss, backward=_averaged, layouts=[{"dp": 2}])
    report = check_gradients(check, pools)
    assert report.findings[0].kind == "tokens", report
    # A half each, in place of 11 and 5 of 16.
    assert "every parameter (10): weighs the tokens of ranks 0, 1 by 0.7273, 1.6 of what" in str(report)


class _Noisy(bare.Model):
    calls = itertools.count()

    def forward(self, x):
        return super().forward(x) * (1 + next(self.calls) * 1e-3)


def test_a_model_that_does_not_repeat_itself_is_said_to(pools):
    report = check_gradients(bare.check(build=_Noisy, layouts=[{"dp": 2}]), pools)
    assert report.findings[0].kind == "noisy"
    assert "changed when the one process ran twice: loss" in str(report)


def _build_with_ties():
    model = bare.build()
    with torch.no_grad():
        model.moe.router.weight[1:] = model.moe.router.weight[1]
    return model


class _Nudged(nn.Module):
    """Scores that are larger by an ulp for the last expert."""

    def __init__(self, router):
        super().__init__()
        self.weight = router.weight

    def forward(self, x):
        probabilities = (x @ self.weight.T).softmax(-1)
        nudge = torch.tensor([0.0, 0.0, 0.0, 6e-8])
        values, ids = torch.topk(probabilities + nudge, 2)
        return probabilities, values, ids


def _nudge(model, layout):
    model = bare.Hand()(model, layout)
    model.moe.router = _Nudged(model.moe.router)
    return model


def test_ties_of_the_routing_are_no_fault(pools):
    report = check_gradients(bare.check(build=_build_with_ties, parallelize=_nudge, layouts=[{"dp": 2}]), pools)
    assert report.ok, report
    assert "fell between scores that are equal up to rounding" in str(report)


def _wait_for_rank_1(model, batch, layout):
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(1))
    else:
        time.sleep(3600)


def test_a_hang_says_where_each_rank_was():
    report = check_gradients(bare.check(backward=_wait_for_rank_1, layouts=[{"dp": 2}], timeout_s=6.0))
    assert not report.ran
    text = str(report)
    assert "waiting in all_reduce, called from test_check.py" in text
    assert "not in a collective, called from test_check.py" in text


def _raise(model, layout):
    raise RuntimeError("planted")


def _no_loss(model, batch):
    return default_loss(model, {"x": batch["x"]})


def test_what_cannot_be_run_is_said(pools):
    report = check_gradients(bare.check(parallelize=_raise), pools)
    assert not report.ran
    assert "RuntimeError: planted" in str(report)
    for changes, message in [
        ({"loss": _no_loss}, "the output of the model, Tensor, has no .loss"),
        (
            {"loss": lambda model, batch: None},
            "loss: ranks import it by name, and cannot .* define it at the top of a module",
        ),
        ({"layouts": []}, "layouts: there is none"),
        ({"steps": 0}, "steps: must be at least 1, got 0"),
    ]:
        with pytest.raises(CheckError, match=message):
            check_gradients(bare.check(**changes), pools)


class _Model(nn.Module):
    config = SimpleNamespace(router_aux_loss_coef=0.5)

    def forward(self, x):
        return {"loss": x + 0.5 * x**2, "aux_loss": x**2}


def test_a_balance_loss_of_transformers_is_a_term_of_its_own():
    x = torch.tensor(2.0, requires_grad=True)
    assert default_loss(_Model(), {"x": x}) == {"main": 2.0, "balance": 2.0}
    assert default_loss(_Model(), {"x": x.detach()}) == 4.0


def test_the_fixture(equal_gradients):
    run = functools.partial(equal_gradients, bare.build, bare.inputs, loss=bare.loss, backward=bare.backward)
    assert run(bare.Hand(), TWO).ok
    with pytest.raises(AssertionError, match="each rank's own part of the term 'main'"):
        run(bare.Hand("router"), TWO)
    with pytest.raises(CheckError, match="planted"):
        run(_raise, TWO)


def test_the_command(capsys):
    assert main(["check", "tests.testing.bare:check", "--layouts", "tp=2,ep=2 ; dp=2", "--steps", "2"]) == 0
    assert "tp=2,ep=2 (2 ranks" in capsys.readouterr().out
    assert main(["check", "tests.testing.bare:wrong_check"]) == 1
    assert "is 0.5 times (1 / " in capsys.readouterr().out
    for arguments, message in [
        (["tests.testing.bare"], "expected module:function"),
        (["tests.testing.bare:nothing"], "has no 'nothing'"),
        (["tests.testing.bare:build"], "expected a moesaic.testing.Check or a function that returns one"),
        (["tests.testing.bare:check", "--layouts", "tp"], "expected axis=size"),
    ]:
        assert main(["check", *arguments]) == 2
        assert message in capsys.readouterr().err
