"""Errors for users, and what the errors of the operating system and of PyTorch are among them."""

import errno
import re
from collections.abc import Iterable


class CxrdistError(ValueError):
    """Wrong usage or bad input: one line that says what, where and how to mend it (exit code 2)."""


class RunFailedError(RuntimeError):
    """A run that started well and could not go on, such as a loss that is not finite (exit 1)."""


class Stopped(BaseException):
    """A request to stop was followed and nothing is lost (exit 75); no error to be caught as one.

    Its text is the line for the user, empty on ranks that leave it to the main one.
    """


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
    """Say in one line what the operating system refused, and how to mend it.

    Args:
        error: of a call that had to do with a file.
        path: the file as the user knows it; what the error names if None.
        mend: what the user can do where this place cannot be used; else a general word.

    Returns:
        RunFailedError for a fault of the machine, such as a full disk, CxrdistError for a name that
        cannot be used, None for what has nothing to do with a file that the error names.
    """
    path = path or error.filename or ("" if error.errno not in _FULL else "the output")
    line = f"{path}: {error.strerror}"
    if error.errno in _FULL:
        return RunFailedError(f"{line}; {mend or 'make room, then run the same command again'}")
    if not path:
        return None
    if error.errno in _FORBIDDEN:
        return RunFailedError(f"{line}; {mend or 'change its permissions, or name another path'}")
    if error.errno in _MACHINE:
        return RunFailedError(
            f"{line}; {mend or 'mend that on this machine, then run the same command again'}"
        )
    if error.errno in _NAMES:
        return CxrdistError(f"{line}; {mend or 'name another file or directory'}")
    return None


# Messages of gloo (transport/tcp) and NCCL about a peer that is gone. Both also report that no
# network interface or no GPU was found, which is a fault of this machine.
_LOST_CONNECTION = re.compile(
    r"gloo/transport/\w+/(pair|unbound_buffer)\.cc"
    r"|Connection (closed|reset) by (remote )?peer|ncclRemoteError|NCCL communicator was aborted"
    r"|Watchdog caught collective operation timeout"
)


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another rank has ended or does not answer."""
    return bool(_LOST_CONNECTION.search(str(error)))


def choices(name: str, names: Iterable[str], nearest: Iterable[str] = ()) -> str:
    """Return the end of an error about an unknown name: those there are, and the nearest one.

    Args:
        name: that is unknown.
        names: that are known.
        nearest: names to be called the nearest ones; found by their letters if empty.
    """
    from difflib import get_close_matches  # which `cxrdist --help` does not need

    folded = {known.casefold().strip("-"): known for known in names}
    alike = [folded[match] for match in get_close_matches(name.casefold().strip("-"), folded, 1)]
    near = " or ".join([*nearest] or alike)
    mend = f"; nearest is {near}" if near else ""
    return f"expected {'one of ' if len(folded) > 1 else ''}{', '.join(folded.values())}{mend}"
