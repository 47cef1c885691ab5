"""`moesaic prove module:op`, in a module such as a user has."""

import sys
import textwrap

import pytest

from moesaic.cli import main

pytestmark = pytest.mark.usefixtures("unchecked")

MODULE = """
    import torch
    from torch import Tensor
    import moesaic

    def define(name, rule, function, **options):
        op = torch.library.custom_op(f"mine{number}::{{name}}", function, mutates_args=())
        op.register_fake(function)
        return moesaic.sharding_rule(rule, **options)(op) if rule else op

    def _matmul(x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    def _rows(x: Tensor, ids: Tensor) -> Tensor:
        return x.index_select(0, ids)

    def _modes(x: Tensor, mode: str) -> Tensor:
        return x * 2 if mode == "twice" else x.cumsum(0)

    def modes_inputs():
        return torch.randn(7, 5), "twice"

    def _scaled(x: Tensor, times: int) -> Tensor:
        return x * times

    right = define("right", "m k, k n -> m n", _matmul, linear=["x", "w"])
    short = define("short", "m! k, k n -> m! n", _matmul, linear=["x", "w"])
    wrong = define("wrong", "m k, k n -> max: m n", _matmul, linear=["x", "w"])
    rows = define("rows", "m! d, r -> r d", _rows, linear=["x"], preserves={{"max": ["x"], "min": ["x"]}})
    scaled = define("scaled", "m n -> m n", _scaled, linear=["x"])
    modes = define("modes", "m n -> m n", _modes, linear=["x"])
    twice = define("twice", "m n -> m n", _scaled, linear=["x"], when={{"times": [2, 3]}})
    without = define("without", "", _matmul)
    lines = moesaic.sharding_rule("m k, k n -> m n", "b! m k, b! k n -> b! m n", "m k, k -> m", linear=["x", "w"])
    lines = lines(define("lines", "", _matmul))

    def _strict(x: Tensor, w: Tensor) -> Tensor:
        torch._check(x.ndim == 2, lambda: "matrices only")
        return x @ w

    strict = moesaic.sharding_rule("b m k, b k n -> b m n", "m k, k n -> m n")(define("strict", "", _strict))
    faked = torch.library.custom_op(f"mine{number}::faked", _matmul, mutates_args=())
    faked = moesaic.sharding_rule("m k, k n -> m n")(faked)
    number = 3

    class group:
        right = right

    def row_inputs():
        return torch.randn(7, 5), torch.tensor([3, 0, 6, 6])

    def more_row_inputs():
        return [row_inputs(), (torch.randn(3, 4), torch.tensor([2, 0, 1]))]

    def scaled_inputs():
        return torch.randn(7, 5), 3

    def more_scaled_inputs():
        return [scaled_inputs(), (torch.randn(3, 4), 4)]

    def constant_inputs():
        return torch.ones(7, 5), torch.ones(5, 3)

    def failing():
        raise KeyError("no data\\nat all")

    def no_tuple():
        return torch.randn(7, 5)
"""
_count = iter(range(1000))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module in the current folder."""
    name = f"mine{next(_count)}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE).format(number=name[4:]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (":right", 0, "nothing wrong, nothing missing"),
        (":group.right", 0, "nothing wrong, nothing missing"),
        ("::right", 0, "nothing wrong, nothing missing"),
        ("::right.default --module {}", 0, "nothing wrong, nothing missing"),
        (":short", 0, "nothing wrong, 1 missing"),
        (":short --complete", 1, "right and not admitted: m! k, k n -> m! n"),
        (":wrong --no-backward", 1, "admitted and WRONG: m k, k n -> max: m n"),
        (":rows --inputs {}:row_inputs", 0, "nothing wrong"),
        (":rows --inputs {}:more_row_inputs", 0, "nothing wrong"),
        (":strict", 0, "line 'b m k, b k n -> b m n': mine"),
        (":scaled --inputs {}:scaled_inputs", 0, "values: times=3 or 2 or 4 or 6 or 1"),
        (":modes --inputs {}:modes_inputs", 1, "NOT TRIED: every example has mode='twice'"),
        (":scaled --inputs {}:more_scaled_inputs", 0, "[7, 5] on 2 ranks"),
        (":twice", 0, "rule   when times=2 or 3"),
    ],
)
def test_exit_status_and_report(module, capsys, arguments, status, said):
    arguments = (module + arguments).format(module).split()
    assert main(["prove", *arguments, "--axes", "2", "3", "--meshes"]) == status
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("nowhere:op", "there is no module 'nowhere' here or among the installed ones"),
        ("{0}.inner:op", "there is no module '{0}.inner' here"),
        ("{0}", "'{0}': expected module:operator, such as mylib.ops:name"),
        ("nowhere::op", "there is no module 'nowhere' here or among the installed ones"),
        ("{0}::left", "{0}::left: the module '{0}' registers no such operator; say which does with --module"),
        ("aten::slice", "aten::slice: say which overload: aten::slice.Tensor"),
        ("{0}:left", "{0}:left: {0} has no 'left'"),
        ("{0}:number", "{0}:number: expected an operator: a custom_op"),
        ("{0}:without", "without has no sharding rule to make up inputs from: give --inputs module:function"),
        ("{0}:scaled", "scaled: no value for argument 'times': give --inputs"),
        ("{0}:rows", "refuses inputs made up from its rule, floating tensors [13, 14], [15]: "),
        ("{0}:rows --inputs {0}:number", "--inputs {0}:number: expected a function that returns inputs, not int"),
        ("{0}:right --inputs {0}:no_tuple", "it has to return a tuple of inputs, or a list of such tuples"),
        ("{0}:right --inputs {0}:constant_inputs", "x is constant: a wrong rule might pass"),
        ("{0}:without --inputs {0}:row_inputs", "without refuses the inputs: size mismatch"),
        ("{0}:right --axes 1", "at least two ranks on each"),
        ("{0}:right --meshes 2,3", "--meshes 2,3: expected sizes of the axes, such as 2x3"),
        ("{0}:right --inputs nothing", "'nothing': expected module:function, such as mylib.ops:name"),
    ],
)
def test_calls_that_cannot_work(module, capsys, arguments, error):
    assert main(["prove", *arguments.format(module).split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moesaic prove: ")
    assert error.format(module) in captured.err


def test_inputs_are_made_up_for_every_line(module, capsys):
    assert main(["prove", f"{module}:lines", "--axes", "2", "--meshes", "--no-backward"]) == 0
    said = capsys.readouterr().out
    for line in ("m k, k n -> m n", "b! m k, b! k n -> b! m n", "m k, k -> m"):
        assert f"admitted and right: {line}\n" in said
    assert "note:" not in said


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("{0}:faked", "faked does not work on meta tensors"),
        ("{0}:right --inputs {0}:failing", "--inputs {0}:failing: it raised KeyError: 'no data"),
        (".{0}:right", "'.{0}:right': expected module:operator"),
        (":right", "':right': expected module:operator"),
        ("{0}..inner:right", "'{0}..inner:right': expected module:operator"),
        ("{0}:right --meshes 2x2x2x2", "meshes: at most three axes; got 2x2x2x2"),
    ],
)
def test_one_line_says_what_is_the_matter(module, capsys, arguments, error):
    assert main(["prove", *arguments.format(module).split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moesaic prove: ")
    assert error.format(module) in line


def test_an_error_in_the_module_itself(module, tmp_path):
    (tmp_path / f"{module}.py").write_text("import not_installed_at_all")
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        main(["prove", f"{module}:right"])


def test_help(capsys):
    with pytest.raises(SystemExit) as left:
        main(["prove", "--help"])
    assert left.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Exit status: 0 nothing is wrong; 1 something is wrong, or was not tried; 2 the call cannot work." in said
    assert "--inputs" in said
