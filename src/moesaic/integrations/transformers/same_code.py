"""Whether a class of transformers computes what another one does: by its code, not by its name.

A model of transformers that takes a block from another model has a copy of it under a name of its own. What is compared
is the source of all methods, without docstrings and annotations, and what their global names stand for.
"""

import ast
import functools
import inspect
import textwrap
from types import FunctionType
from typing import Any

from torch import nn

# Not what is computed: constructors read sizes from configs, and tensors are compared by themselves.
_LEFT_OUT = {"__init__", "extra_repr"}


def same_code(one: type[nn.Module], other: type[nn.Module]) -> bool:
    """Whether two classes of modules have the same methods and constants. False where a source cannot be read."""
    if one is other:
        return True
    if _torch_base(one) is not _torch_base(other):
        return False
    mine, its = _members(one), _members(other)
    return mine.keys() == its.keys() and all(_same(mine[name], its[name], ()) for name in mine)


def is_of_torch(cls: type) -> bool:
    """Whether a class is one of torch's own."""
    return cls.__module__.partition(".")[0] == "torch"


def _torch_base(cls: type) -> type:
    return next(base for base in cls.__mro__ if is_of_torch(base))


def _members(cls: type) -> dict[str, Any]:
    """Methods, and constants that are numbers, with those of base classes that are not torch's."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if is_of_torch(base):
            break
        for name, value in vars(base).items():
            value = getattr(value, "__func__", value)
            if isinstance(value, FunctionType | int | float) and name not in _LEFT_OUT:
                found.setdefault(name, value)
    return {name: value for name, value in found.items() if not name.startswith("__") or callable(value)}


def _same(one: Any, other: Any, inside: tuple[Any, ...]) -> bool:
    if one is other or (one, other) in inside:
        return True
    if not (isinstance(one, FunctionType) and isinstance(other, FunctionType)):
        return type(one) is type(other) and isinstance(one, int | float | str) and one == other
    # An experts class has a forward of the interface around its own.
    one, other = inspect.unwrap(one), inspect.unwrap(other)
    mine, its = _code(one), _code(other)
    if mine is None or its is None or mine != its:
        return False
    names = mine[1]
    values = ((one.__globals__.get(name), other.__globals__.get(name)) for name in names)
    return all(_same(a, b, (*inside, (one, other))) for a, b in values)


@functools.cache
def _code(function: FunctionType) -> tuple[str, frozenset[str]] | None:
    """The body and the arguments of a function as text, and the global names in it."""
    if set(function.__code__.co_freevars) - {"__class__"}:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(tree, ast.FunctionDef):
        return None
    tree.returns, tree.name = None, ""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:] or [ast.Pass()]
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return ast.dump(tree), frozenset(loaded & function.__globals__.keys())
