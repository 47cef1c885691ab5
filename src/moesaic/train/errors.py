"""Errors a person can act on. The command line prints their text and no traceback."""


class UserError(Exception):
    """Something about the call, the files or the machine is not right; the text says what, and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class TrainingError(Exception):
    """Training itself failed, the same way on every rank: a number that is not finite, for one."""
