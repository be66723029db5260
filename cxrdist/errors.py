"""Errors for users, and the translation of operating system and PyTorch errors into them."""

import errno
import re
from collections.abc import Iterable
from importlib import import_module


class CxrdistError(ValueError):
    """Wrong usage or bad input: one line with the problem, the place and the fix (exit code 2)."""


class RunFailedError(RuntimeError):
    """A run that started but cannot continue, such as one with a non-finite loss (exit code 1)."""


class Stopped(BaseException):
    """The process stops on request and nothing is lost (exit code 75).

    It derives from BaseException so that `except Exception` does not catch it. Its text is the line
    for the user; it is empty where the main rank prints that line.
    """


_HIDDEN = re.compile(r"(^|/)\.([^/]+)\.partial(/.*)?$", re.DOTALL)
"""Matches the hidden directory of unfinished work, of which group 2 is the user's name."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_MACHINE = (
    *(errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.EBUSY, errno.ESTALE),
)
_NAMES = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO),
)


def failure_of(
    error: OSError, path: object = None, mend: str = ""
) -> CxrdistError | RunFailedError | None:
    """Turn an operating system error about a file into one line for the user.

    Args:
        error: raised by a call that used a file.
        path: the file as the user knows it; if None, the file that the error names.
        mend: what the user can do if this path cannot be used; a general hint if empty.

    Returns:
        RunFailedError for a fault of the machine, such as a full disk; CxrdistError for a path that
        cannot be used; None if the error is not about a file.
    """
    path = path or error.filename or ("" if error.errno not in _FULL else "the output")
    if error.errno in _FULL:
        named = _HIDDEN.sub(r"\1\2", str(path))
        mend = mend or "make room, then run the same command again"
        return RunFailedError(f"{named}: {error.strerror}; {mend}")
    line = f"{path}: {error.strerror}"
    if not path:
        return None
    if error.errno in _FORBIDDEN:
        return RunFailedError(f"{line}; {mend or 'change its permissions, or name another path'}")
    if error.errno in _MACHINE:
        return RunFailedError(
            f"{line}; {mend or 'fix this on the machine, then run the same command again'}"
        )
    if error.errno in _NAMES:
        return CxrdistError(f"{line}; {mend or 'name another file or directory'}")
    return None


def store_failure(error: Exception) -> RunFailedError | None:
    """Return the line for an error of the clients of object stores, or None for any other error."""
    # By name: the classes have no common base, and most commands import none of their packages.
    package = type(error).__module__.partition(".")[0]
    if package not in ("aiohttp", "botocore"):
        return None
    return RunFailedError(
        f"the object store cannot be used: {error}; check its URL and your access to it"
    )


# Messages of gloo (transport/tcp) and NCCL about a lost peer. Not every gloo or NCCL error is one:
# both also report a missing network interface or GPU, which is a fault of this machine.
_LOST_CONNECTION = re.compile(
    r"gloo/transport/\w+/(pair|unbound_buffer)\.cc"
    r"|Connection (closed|reset) by (remote )?peer|ncclRemoteError|NCCL communicator was aborted"
    r"|Watchdog caught collective operation timeout"
)


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether a collective failed because another rank has ended or does not answer."""
    # A RunFailedError says what it is: the connection may be that to an object store.
    return not isinstance(error, RunFailedError) and bool(_LOST_CONNECTION.search(str(error)))


def require_modules(extra: str, *names: str, option: str = "") -> None:
    """Raise CxrdistError unless all these modules of an extra of the package are installed.

    The error begins with the option that needs them, if one does.
    """
    try:
        for name in names:
            # find_spec would also accept a module whose own imports fail.
            import_module(name)
    except ImportError as error:
        needed_by = option and f"{option}: "
        raise CxrdistError(f'{needed_by}{error}; pip install "cxrdist[{extra}]"') from error


def choices(name: str, names: Iterable[str], nearest: Iterable[str] = ()) -> str:
    """Return the end of an error about an unknown name: the known names and the nearest one.

    The most similarly spelled name is suggested, unless ``nearest`` has names to suggest.
    """
    from difflib import get_close_matches  # imported late: `cxrdist --help` does not need it

    known = [*names]
    folded = {name.casefold().strip("-"): name for name in known}
    similar = [folded[match] for match in get_close_matches(name.casefold().strip("-"), folded, 1)]
    near = " or ".join([*nearest] or similar)
    mend = f"; nearest is {near}" if near else ""
    return f"expected {'one of ' if len(known) > 1 else ''}{', '.join(known)}{mend}"
