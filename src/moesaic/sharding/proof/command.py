"""``moesaic prove module:op``: options, finding the operator and its inputs, exit status."""

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from moesaic.options import parse
from moesaic.sharding.decide import RULES, as_called, is_tensor, overload_of
from moesaic.sharding.notation import Notation
from moesaic.sharding.proof.examples import first_line
from moesaic.sharding.prove import prove


@dataclass(frozen=True)
class Options:
    """Prove the sharding rule of an operator on simulated ranks.

    Exit status: 0 nothing is wrong; 1 something is wrong, or was not tried; 2 the call cannot work.
    """

    op: Annotated[str, tyro.conf.Positional]
    """The operator: as module:name, such as mylib.ops:my_mm, or by its registered name, as in reports: mylib::my_mm."""
    module: str = ""
    """The module that registers mylib::my_mm, if it is not mylib."""
    inputs: str = ""
    """A function, as module:name, that returns a tuple of inputs, or a list of such tuples. By default random floating
    tensors with different sizes are made for each line of the rule."""
    axes: tuple[int, ...] = (2, 3, 4)
    """Sizes of meshes of one axis."""
    meshes: tuple[str, ...] = ("2x2", "2x3")
    """Larger meshes."""
    complete: bool = False
    """Also fail if something is missing: placements that are right, but that the rule does not admit."""
    backward: bool = True
    """Compare gradients too."""


class CallError(Exception):
    """The call cannot work. The message says what to change."""


def run(arguments: Sequence[str]) -> int:
    """Run ``moesaic prove`` and return its exit status."""
    options = parse(Options, "prove", arguments)
    try:
        op = _overload(options.op, options.module)
        (first, *also), notes = (_given_inputs(options.inputs), []) if options.inputs else _made_up_inputs(op)
        with Console(stderr=True).status(f"proving {op._name}") as status:
            report = prove(
                op,
                *first,
                also=also,
                axes=options.axes,
                meshes=[_mesh(text) for text in options.meshes],
                backward=options.backward,
                on_progress=status.update,
            )
    except (CallError, ValueError) as error:
        print(f"moesaic prove: {error}", file=sys.stderr)
        return 2
    for note in notes:
        report.note(note)
    print(report)
    return 0 if report.ok and (report.complete or not options.complete) else 1


def _mesh(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if not all(size.isdecimal() for size in sizes):
        raise CallError(f"--meshes {text}: expected sizes of the axes, such as 2x3")
    return tuple(map(int, sizes))


def _overload(path: str, module: str) -> torch._ops.OpOverload:
    found = _registered(path, module) if "::" in path else _find(path, "operator")
    try:
        return overload_of(found)
    except TypeError as error:
        raise CallError(f"{path}: {error}") from None


def _registered(name: str, module: str) -> Any:
    """An operator by the name that it is registered with; first its module is imported, if that is not torch."""
    namespace, _, rest = name.partition("::")
    op, _, overload = rest.partition(".")
    if module or not hasattr(getattr(torch.ops, namespace), op):
        module = module or namespace
        _import(module)
    if not hasattr(getattr(torch.ops, namespace), op):
        raise CallError(f"{name}: the module {module!r} registers no such operator; say which does with --module")
    packet = getattr(getattr(torch.ops, namespace), op)
    if (overload or "default") not in packet.overloads():
        raise CallError(f"{name}: say which overload: {', '.join(f'{name}.{o}' for o in packet.overloads())}")
    return getattr(packet, overload or "default")


def _import(module: str) -> Any:
    # As `python -m` does: what lies in the current folder can be imported.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that it imports itself
        raise CallError(f"there is no module {error.name!r} here or among the installed ones") from None


def _given_inputs(path: str) -> list[tuple[Any, ...]]:
    function = _find(path, "function")
    if not callable(function):
        raise CallError(f"--inputs {path}: expected a function that returns inputs, not {type(function).__name__}")
    try:
        inputs = function()
    except Exception as error:
        raise CallError(f"--inputs {path}: it raised {type(error).__name__}: {first_line(error)}") from error
    inputs = inputs if isinstance(inputs, list) else [inputs]
    if not inputs or not all(isinstance(args, tuple) for args in inputs):
        raise CallError(f"--inputs {path}: it has to return a tuple of inputs, or a list of such tuples")
    return inputs


def _find(path: str, kind: str) -> Any:
    module_name, colon, name = path.partition(":")
    if not colon or not name or not all(module_name.split(".")):
        raise CallError(f"{path!r}: expected module:{kind}, such as mylib.ops:{name or 'name'}")
    found = _import(module_name)
    for part in name.split("."):
        if not hasattr(found, part):
            raise CallError(f"{path}: {found.__name__ if hasattr(found, '__name__') else found} has no {part!r}")
        found = getattr(found, part)
    return found


def _made_up_inputs(op: torch._ops.OpOverload) -> tuple[list[tuple[Any, ...]], list[str]]:
    """Inputs for every line of the rule that they can be made up for, and a note of each other line."""
    if op not in RULES:
        raise CallError(f"{op._name} has no sharding rule to make up inputs from: give --inputs module:function")
    inputs: list[tuple[Any, ...]] = []
    errors: dict[str, CallError] = {}
    for line in RULES[op].lines:
        try:
            inputs.append(_inputs_for(op, line))
        except CallError as error:
            errors[line.text] = error
    if not inputs:
        raise next(iter(errors.values()))
    return inputs, [f"no inputs made up for the line '{text}': {first_line(e)}" for text, e in errors.items()]


def _inputs_for(op: torch._ops.OpOverload, line: Notation) -> tuple[Any, ...]:
    """Floating tensors for a line of the rule: factors of distinct sizes, blocks of one that axes divide."""
    sizes, flags = dict(_sizes(line)), dict(line.when)
    generator = torch.Generator().manual_seed(0)
    patterns = iter(line.inputs)
    args: list[Any] = []
    for argument in op._schema.arguments:
        values = flags.get(argument.name, ())
        if is_tensor(argument.type):
            shape = [torch.Size([sizes[f] for f in dim.factors]).numel() for dim in next(patterns).dims]
            args.append(None if values == (None,) else torch.randn(shape, generator=generator))
        elif values:
            args.append(values[0])
        elif argument.has_default_value():
            args.append(argument.default_value)
        else:
            raise CallError(f"{op._name}: no value for argument {argument.name!r}: give --inputs module:function")
    positional, keywords = as_called(op, args)
    try:
        op(*positional, **keywords)
    except Exception as error:
        shapes = ", ".join(str(list(a.shape)) for a in args if isinstance(a, torch.Tensor))
        raise CallError(
            f"{op._name} refuses inputs made up from its rule, floating tensors {shapes}: {first_line(error)}\n"
            "Give inputs that it takes with --inputs module:function, a function that returns a tuple of them."
        ) from None
    return tuple(args)


def _sizes(line: Notation) -> Iterator[tuple[str, int]]:
    inner = iter(range(2, 100))
    whole = iter(range(13, 100))
    for factor in line.factors:
        leads = any(dim.leading == factor for p in (*line.inputs, *line.outputs) for dim in p.dims)
        yield factor, 12 if factor in line.blocks else next(whole if leads else inner)
