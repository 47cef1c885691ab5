"""Errors a person can act on. The command line prints their text and no traceback."""


class UserError(Exception):
    """Something about the call, the files or the machine is not right; the text says what, and what to do."""


class TrainingError(Exception):
    """Training itself failed, the same way on every rank: a number that is not finite, for one."""
