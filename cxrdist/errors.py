class CxrdistError(ValueError):
    """Wrong usage or bad input: one line that says what, where and how to mend it (exit code 2)."""


class RunFailedError(RuntimeError):
    """A run that started well and could not go on, such as a loss that is not finite (exit 1)."""


class Stopped(BaseException):
    """A request to stop was followed and nothing is lost (exit 75); no error to be caught as one.

    Its text is the line for the user, empty on ranks that leave it to the main one.
    """


def refuse_below_one(options: object, *names: str) -> None:
    """Make sure that numbers among the options are 1 or more; None is left alone.

    Raises:
        CxrdistError: one is less.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise CxrdistError(f"{name}: is {value}, expected at least 1")
