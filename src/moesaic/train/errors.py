"""Errors that a user can act on. The command line prints their text without a traceback."""

import importlib.util


class UserError(Exception):
    """The call, the files or the machine are wrong. The text says what is wrong and what to do."""


def check_packages(who: str, extra: str, *packages: str) -> None:
    """Raise `UserError` unless the packages are installed that `who` needs. They come with an extra of moesaic."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{who} needs the package {package}: pip install '.[{extra}]' in a checkout of moesaic")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class TrainingError(Exception):
    """Training failed, on every rank: for example, a number is not finite.

    Args:
        text: what happened.
        told: whether this rank is the one to say so. By default rank 0 is.
    """

    def __init__(self, text: str, *, told: bool | None = None):
        super().__init__(text)
        self.told = told
