"""Options of commands: the fields of a frozen dataclass become flags, and their docstrings the help text.

tyro does the work. What it would do otherwise, and is done here: it takes the line ends of a docstring for those of the
help text, does not wrap the description, and knows groups of flags only as nested classes.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

T = TypeVar("T")


def parse(
    options: type[T], command: str, arguments: Sequence[str], *, default: T | None = None, speak: bool = True
) -> T:
    """The options that a command line gives.

    Args:
        options: a frozen dataclass. Fields that it inherits from other dataclasses are a group of flags for each of
            them. The title is the class's name, the line below it the class's docstring.
        command: the name of the command, for the help text.
        arguments: the command line after the name of the command.
        default: values of flags that are not given. By default those of the fields.
        speak: whether to print help and mistakes.

    Raises:
        SystemExit: with status 0 after ``--help``, and 2 after a mistake in a flag.
    """
    groups = [base for base in options.__bases__ if dataclasses.is_dataclass(base)] or [options]
    forms = {_title(group): _form(group, default) for group in groups}
    whole, *more = forms.values()
    if more:
        helps = [tyro.conf.arg(help=_one_line(group.__doc__)) for group in groups]
        nested = [
            (name, Annotated[form, tyro.conf.OmitArgPrefixes, help_of])
            for (name, form), help_of in zip(forms.items(), helps, strict=True)
        ]
        whole = dataclasses.make_dataclass("Options", nested, frozen=True)
    paragraphs = inspect.cleandoc(options.__doc__ or "").split("\n\n")
    description = "\n\n".join(map(_one_line, paragraphs))
    with contextlib.ExitStack() as stack:
        if speak and {"-h", "--help"} & {*arguments}:
            stack.enter_context(_wrapped_help())
        if not speak:
            # tyro has an option for this, which some mistakes pass by.
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        found = tyro.cli(whole, prog=f"moesaic {command}", description=description, args=list(arguments))
    parts = [getattr(found, name) for name in forms] if more else [found]
    values = {field.name: getattr(part, field.name) for part in parts for field in dataclasses.fields(part)}
    return options(**values)


def _form(group: Any, default: Any) -> Any:
    """A dataclass with the fields of `group`, their help in one line, and with the values of `default`."""
    hints = get_type_hints(group, include_extras=True)
    documents = docstrings(group)
    fields: list[Any] = []
    for field in dataclasses.fields(group):
        hint: Any = Annotated[hints[field.name], tyro.conf.arg(help=documents.get(field.name, ""))]
        if default is not None:
            fields.append((field.name, hint, dataclasses.field(default=getattr(default, field.name))))
        elif field.default is not dataclasses.MISSING:
            fields.append((field.name, hint, dataclasses.field(default=field.default)))
        else:
            fields.append((field.name, hint))
    return dataclasses.make_dataclass(group.__name__, fields, frozen=True)


def docstrings(group: Any) -> dict[str, str]:
    """The docstring below each field of a dataclass, in one line."""
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(group))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node, following in zip(tree.body, tree.body[1:], strict=False):
        match node, following:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                found[name] = _one_line(text)
    return found


def _title(group: Any) -> str:
    """`text` for TextOptions."""
    return group.__name__.removesuffix("Options").lower() or "options"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


class _Captured(io.StringIO):
    """What is printed, to somebody who draws boxes and colours where the real output can show them."""

    encoding = property(lambda self: getattr(sys.__stdout__, "encoding", None))  # type: ignore[assignment]

    def isatty(self) -> bool:
        return sys.__stdout__ is not None and sys.__stdout__.isatty()


@contextlib.contextmanager
def _wrapped_help() -> Iterator[None]:
    """Print what is printed here with its long lines wrapped, at the ends of words."""
    width = max(40, shutil.get_terminal_size().columns)
    printed = _Captured()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            fits = len(line) <= width or not line[:1].isalpha()
            print(line if fits else textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False))
        sys.stdout.flush()
