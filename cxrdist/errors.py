class CxrdistError(ValueError):
    """Wrong usage or bad input: one line that says what, where and how to mend it (exit code 2)."""


class RunFailedError(RuntimeError):
    """A run that started well and could not go on, such as a loss that is not finite (exit 1)."""
