"""Files: locks, atomic writes, and reading what an untrusted directory contains."""

import csv
import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, BinaryIO, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from cxrdist.documents import FLOAT32, MOST_BYTES, MOST_YAML_BYTES, parse_json, parse_yaml, typed
from cxrdist.errors import CxrdistError, RunFailedError, failure_of

MOST_LINE_BYTES = 1 << 16  # of a line in a log; a usual row has 300
MOST_LOG_ROWS = 2_000_000  # 10,000 epochs of ChestX-ray14 in the paper's batches
MEND_OPTIONAL = "copy the run directory again, or remove the file if the training is finished"
"""For a log or recipe, which a trained run can do without; another training does not mend it."""
MOST_HEADER_BYTES = 1000  # of an npy file; a long text can crash literal_eval, which parses it
DAMAGE = (
    *(ValueError, LookupError, EOFError, NotImplementedError, RuntimeError, SyntaxError, TypeError),
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, struct.error, tokenize.TokenError),
)
"""What zipfile, tarfile, zlib and numpy raise for damaged archives of arrays."""

T = TypeVar("T")

_PARTIAL = re.compile(r"\..+\.([^.]+)\.(\d+)\.partial")


def open_regular(path: Path, flags: int) -> BinaryIO:
    """Open a regular file, buffered; reject links and pipes, since its directory is untrusted.

    Directories above it may be links. The flags are those of `os.open`.

    Raises:
        CxrdistError: the path is not a regular file.
        OSError: the file cannot be opened.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its other end.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _irregular(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _irregular(path)
    writing = "ab" if flags & os.O_APPEND else "wb" if flags & os.O_WRONLY else "r+b"
    return cast(BinaryIO, os.fdopen(descriptor, writing if flags & os.O_ACCMODE else "rb"))


def _irregular(path: Path) -> CxrdistError:
    return CxrdistError(
        f"{path}: is a link, a directory or another special file, expected a regular file; "
        "move it away"
    )


@contextmanager
def locked(root: Path, *, shared: bool = False) -> Iterator[None]:
    """Lock a directory for one writing process, or for several; raise CxrdistError if it is held.

    The kernel frees the lock when its holder dies. The lock works on local disks, on NFS (where
    Linux locks on the server) and on Lustre mounted with `flock`; with `localflock` only within a
    node. Directories created for the lock are removed again if nothing was written to them.
    """
    # The deepest comes first, as `_remove_empty` needs it.
    made = [path for path in (root, *root.parents) if not path.exists()]
    root.mkdir(parents=True, exist_ok=True)
    # NFS grants an exclusive lock only on a file that is open for writing (flock(2)).
    with open_regular(root / ".lock", os.O_RDWR | os.O_CREAT) as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if not os.fstat(lock.fileno()).st_nlink:  # its holder has just removed it
                raise BlockingIOError
        except BlockingIOError:
            holder = lock.read(200).decode("utf-8", "replace").strip()
            raise CxrdistError(
                f"{root}: another cxrdist process is writing here ({holder}); wait for it or end it"
            ) from None
        lock.truncate(0)
        lock.write(f"{_holder()}\n".encode())
        lock.flush()
        try:
            yield
        finally:
            # Others may still hold a shared lock.
            if made and not shared and os.listdir(root) == [".lock"]:
                _remove_empty(made)


@contextmanager
def waiting_lock(file: Path) -> Iterator[None]:
    """Lock a file, waiting for its holder; the kernel frees the lock of a killed process."""
    with open_regular(file, os.O_RDWR | os.O_CREAT) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_empty(directories: list[Path]) -> None:
    """Remove a directory that contains only a lock, and its parents as far as they are empty."""
    (directories[0] / ".lock").unlink()
    for directory in directories:
        if any(directory.iterdir()):
            return
        directory.rmdir()


def _holder() -> str:
    """Describe this process as the holder of a lock, for the error of a process that waits."""
    job = os.environ.get("SLURM_JOB_ID")
    facts = [f"host {platform.node()}", f"pid {os.getpid()}", *([f"job {job}"] if job else [])]
    return f"{', '.join(facts)}, since {now()}"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; the file appears under its own name when it is complete.

    A link of that name is replaced; its target stays as it is. Errors are those of `room_for`.
    """
    if not isinstance(path, Path):  # an object store shows a file only once it is complete
        with scratch_directory() as here:
            yield here / path.name
            path.fs.put_file(f"{here}/{path.name}", path.path)
        return
    partial = _partial(path)
    try:
        with room_for(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep_once(path.parent)
            _discard(partial)
            yield partial
            # First the content, or a power cut could leave an empty file under the final name.
            _sync(partial)
            os.replace(partial, path)
            _sync(path.parent)
    finally:
        _discard(partial)


def _partial(path: Path) -> Path:
    """Return a temporary path beside the final one, with host and process ID for `sweep`."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.partial")


def _host() -> str:
    # `_PARTIAL` finds the host between two dots.
    return platform.node().replace(".", "-")


def sweep(directory: Path, *, alone: bool = False) -> None:
    """Remove half-written files and directories that dead processes have left in a directory.

    Only processes of this host can be checked, so leftovers of others are removed only if the
    caller holds the lock, which means that no other process writes here (`alone`).
    """
    for partial in directory.glob(".*.partial"):
        match = _PARTIAL.fullmatch(partial.name)
        dead = match and match[1] == _host() and not _is_running(int(match[2]))
        if dead or (match and alone):
            _discard(partial)


@cache
def _sweep_once(directory: Path) -> None:
    """Sweep a directory before this process first writes a file there."""
    sweep(directory)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # it is of another user, or of another system
    return True


def _discard(partial: Path) -> None:
    """Remove a partial file or directory; of a link only the link itself."""
    try:
        partial.unlink(missing_ok=True)
    except (IsADirectoryError, PermissionError):  # a directory, on Linux and on other systems
        shutil.rmtree(partial, ignore_errors=True)
    except OSError:
        # The name is too long or the disk is read-only: then it was never created.
        return


@contextmanager
def room_for(path: Path, mend: str = "") -> Iterator[None]:
    """Turn operating system errors, such as a full disk, into one line about a file.

    Args:
        path: the file being written, as the user knows it; an error about a file elsewhere keeps
            the name of that file.
        mend: what the user can do if this path cannot be used.

    Raises:
        RunFailedError: the disk is full or read-only, or permissions are missing.
        CxrdistError: the name cannot be used.
    """
    try:
        yield
    except OSError as error:
        named = Path(error.filename or path)
        # The error may name the partial file beside the path, or a parent that could not be made:
        # the user knows neither.
        if named.is_relative_to(path.parent) or path.is_relative_to(named):
            failure = failure_of(error, path, mend)
        else:
            failure = failure_of(error)
        if failure is None:
            raise
        raise failure from error


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """Yield a directory for temporary files, removed at the end; errors are those of `room_for`."""
    mend = "set TMPDIR to a directory with room"
    try:
        directory = tempfile.gettempdir()
    except FileNotFoundError as error:  # none of its directories is writable
        raise RunFailedError(f"{error.strerror}; {mend}") from error
    with (
        room_for(Path(directory) / "cxrdist-", mend),
        tempfile.TemporaryDirectory(prefix="cxrdist-", ignore_cleanup_errors=True) as here,
    ):
        yield Path(here)


def refuse_unwritable(path: Path) -> None:
    """Reject an output file that cannot be written, before the work for it starts.

    Raises:
        CxrdistError: the path is a directory, or one of its parents is a file.
        RunFailedError: its directory is read-only.
    """
    if path.is_dir():
        raise CxrdistError(f"{path}: is a directory; name a file to write")
    directory = next(parent for parent in path.absolute().parents if parent.exists())
    if not directory.is_dir():
        raise CxrdistError(f"{path}: {directory} is not a directory; name another place")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise RunFailedError(f"{path}: {directory} is read-only; name another place")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a directory to fill; it appears under its own name when it is complete.

    A directory of that name that already exists is replaced. Errors are those of `room_for`, and
    a CxrdistError if a file or a link has the name.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise CxrdistError(f"{path}: is a file or a link, expected a directory; move it away")
    partial = _partial(path)
    try:
        with room_for(path):
            _sweep_once(path.parent)
            _discard(partial)
            partial.mkdir(parents=True)
            yield partial
            for file in sorted(partial.rglob("*")):
                _sync(file)
            _sync(partial)
            if path.exists():
                # The partial directory is the old one afterwards, and is discarded below.
                _exchange(partial, path)
            else:
                os.replace(partial, path)
            _sync(path.parent)
    finally:
        _discard(partial)


def _exchange(new: Path, old: Path) -> None:
    """Let two directories swap names in one operation (Linux renameat2, RENAME_EXCHANGE)."""
    # AT_FDCWD of linux/fcntl.h, RENAME_EXCHANGE of linux/fs.h.
    here, exchange = -100, 2
    names = (os.fsencode(new.absolute()), os.fsencode(old.absolute()))
    if ctypes.CDLL(None, use_errno=True).renameat2(here, names[0], here, names[1], exchange):
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(number, os.strerror(number), str(old))
        # NFS cannot exchange: for a moment neither directory exists, but never a half-written one.
        aside = _partial(old.with_name(f"{old.name}.old"))
        os.replace(old, aside)
        os.replace(new, old)
        _discard(aside)


def publish(made: Path, path: Path) -> None:
    """Move a complete directory to its final path, local or fsspec.

    An object store has no atomic rename, so index.json is uploaded last: a directory with an index
    is complete. A local path may exist as an empty directory.
    """
    if isinstance(path, Path):
        _sync(made)
        os.replace(made, path)
        _sync(path.parent)
        return
    for file in sorted(made.iterdir(), key=lambda file: file.name == "index.json"):
        path.fs.put_file(str(file), f"{path.path}/{file.name}")


def remove(directory: Path) -> None:
    """Remove a directory, a local or fsspec path, if it exists."""
    if isinstance(directory, Path):
        shutil.rmtree(directory, ignore_errors=True)
    elif directory.exists():
        directory.fs.rm(directory.path, recursive=True)


def remove_made(directory: Path, made: re.Pattern[str], kept: Container[str] = ()) -> None:
    """Remove a directory's files whose whole names match, except some; then itself, if empty."""
    for path in directory.glob("*"):
        is_file = path.is_symlink() or not path.is_dir()
        if is_file and made.fullmatch(path.name) and path.name not in kept:
            path.unlink()
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def is_free(path: Path) -> bool:
    """Return whether a path is new or an empty directory; a link never is."""
    is_empty = path.is_dir() and not any(path.iterdir())
    return not path.is_symlink() and (is_empty or not path.exists())


def _sync(path: Path) -> None:
    """Flush a file or a directory's entries to disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    r"""Write a text file atomically, UTF-8; other bytes of a file name become \udcXX."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file atomically, encoded as in `write_text`, lines ending in a line feed."""
    with (
        atomic_file(path) as partial,
        open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.writelines(table_lines(chain([columns], rows)))


def table_lines(rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """Return the lines of a CSV, which end in a line feed."""
    # csv.writer leaves a carriage return in a cell unquoted unless its own lines end in one, and
    # readers would end the row there.
    writer = csv.writer(SimpleNamespace(write=str), lineterminator="\r\n")
    return (writer.writerow(row).removesuffix("\r\n") + "\n" for row in rows)


def sha256_of(file: Path) -> str:
    """Return the sha256 of a file, hexadecimal."""
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


@contextmanager
def open_table(path: Path) -> Iterator[tuple[list[str], Iterator[dict[str, str]]]]:
    """Open a CSV file of an untrusted directory to read; errors in its content name the line.

    Yields:
        The names of the columns, all different, and the rows, each with a cell for each column.
    """
    with TextIOWrapper(open_regular(path, os.O_RDONLY), encoding="utf-8", newline="") as text:
        table = csv.DictReader(text, strict=True)
        try:
            columns = list(table.fieldnames or [])
            if len({*columns}) < len(columns):
                raise ValueError("two columns have the same name")
            yield columns, _whole_rows(table, len(columns))
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            reason = f"misses {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"line {table.reader.line_num}: {reason:.200}") from error


def _whole_rows(table: "csv.DictReader[str]", num_columns: int) -> Iterator[dict[str, str]]:
    for row in table:
        # csv.DictReader puts surplus cells under the key None, and None for missing ones.
        if None in row or None in row.values():
            raise ValueError(f"expected {num_columns} fields")
        yield row


def finite(text: str) -> float:
    """Read a finite number of the float32 range, or raise ValueError."""
    value = float(text)
    if not abs(value) <= FLOAT32.most:
        raise ValueError(f"{text:.40} is not a finite number")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file of plain values and dataclasses atomically; a NaN raises ValueError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, default=asdict) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of any content, as `read_document` does."""
    return read_document(path, object)


def read_document(path: Path, kind: type[T], mend: str = "copy the directory again") -> T:
    """Read a JSON file, local or fsspec, and check it against its declared type; see `typed`.

    Errors are those of `judging`; `mend` is what the user can do about an invalid file.
    """
    with judging(path, mend):
        return typed(parse_json(read_bytes(path, MOST_BYTES)), kind)


@contextmanager
def judging(where: Path | str, mend: str) -> Iterator[None]:
    """Turn errors in reading a document into one line.

    Args:
        where: the file, and the position of the document in it.
        mend: what the user can do about it.

    Raises:
        CxrdistError: the document is missing or invalid.
        RunFailedError: permission to read it is missing.
    """
    try:
        yield
    except CxrdistError:  # a ValueError, but its line is complete
        raise
    except OSError as error:
        failure = failure_of(error, where, mend if isinstance(error, FileNotFoundError) else "")
        # An object store's errors have no number.
        raise failure or CxrdistError(f"{where}: cannot be read ({error}); {mend}") from error
    except ValueError as error:
        raise CxrdistError(f"{where}: {error}; {mend}") from error


def read_recipe(path: Path, mend: str) -> tuple[str, dict[str, Any]]:
    """Return the text of a recipe and its parsed content; errors are those of `judging`."""
    with judging(path, mend):
        data = read_bytes(path, MOST_YAML_BYTES)
        return data.decode("utf-8-sig"), parse_yaml(data)


def read_bytes(path: Path, most: int) -> bytes:
    """Read a whole file from an untrusted directory.

    Args:
        path: local, where links and pipes are rejected, or fsspec.
        most: largest allowed size in bytes.

    Raises:
        CxrdistError: the file is larger, or not a regular file.
        OSError: the file cannot be read.
    """
    is_local = isinstance(path, Path)
    with open_regular(path, os.O_RDONLY) if is_local else path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size if is_local else path.stat().st_size
        if size > most:
            raise CxrdistError(f"{path}: has {size} bytes, expected at most {most}; copy it again")
        # Not read(): the file may have grown since its size was checked.
        return file.read(size)


def read_npy(file: IO[bytes]) -> NDArray[Any]:
    """Read the array of an npy file whose size was checked; errors are those of `DAMAGE`."""
    # Not np.load, which allocates the size in the header before it reads.
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("it is of another version of npy")
    header = np.lib.format.read_array_header_1_0(file, MOST_HEADER_BYTES)
    (shape, is_fortran, dtype), data = header, file.read()
    fits = min(shape, default=1) >= 0 and math.prod(shape) * dtype.itemsize == len(data)
    if is_fortran or not fits:
        raise ValueError(f"{len(data)} bytes do not fit its shape {shape!s:.80}")
    return np.frombuffer(data, dtype).reshape(shape)


def now() -> str:
    """Return the time for run.json: ISO, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def append_log(path: Path, row: dict[str, Any]) -> None:
    """Append one object to a JSON-lines log."""
    with room_for(path), open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as log:
        log.write(json.dumps(row, allow_nan=False).encode() + b"\n")


def settle_log(path: Path) -> int:
    """Flush a log to disk, and return its length in bytes."""
    _sync(path)
    return path.stat().st_size


def cut_log(path: Path, num_bytes: int) -> None:
    """Truncate a log to its length at a checkpoint; raise CxrdistError if it is shorter."""
    # Before the first checkpoint there may be no log, which is then cut to 0 bytes.
    with room_for(path), open_regular(path, os.O_RDWR | os.O_CREAT) as log:
        if log.seek(0, os.SEEK_END) < num_bytes:
            raise CxrdistError(
                f"{path}: has {log.tell()} bytes, the checkpoint was written at {num_bytes}; "
                "copy the run directory again, or remove it to start anew"
            )
        log.truncate(num_bytes)


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Read a JSON-lines log, without an incomplete last line of a killed run.

    Raises:
        CxrdistError: a line is too long or not an object, or there are too many lines.
        OSError: the log cannot be read.
    """
    with open_regular(path, os.O_RDONLY) as log:
        for number in range(1, MOST_LOG_ROWS + 1):
            line = log.readline(MOST_LINE_BYTES)
            # The end of the file, or a row that a kill cut short. One of MOST_LINE_BYTES without an
            # end is too long, and fails as JSON below.
            if len(line) < MOST_LINE_BYTES and not line.endswith(b"\n"):
                return
            try:
                yield typed(parse_json(line), dict[str, Any])
            except ValueError as error:
                raise CxrdistError(f"{path}, line {number}: {error}; {MEND_OPTIONAL}") from error
    raise CxrdistError(f"{path}: has more than {MOST_LOG_ROWS} lines; {MEND_OPTIONAL}")
