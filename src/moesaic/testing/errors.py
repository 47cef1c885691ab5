"""What a check raises."""


class CheckError(ValueError):
    """A check that cannot be run. The message says what to change."""
