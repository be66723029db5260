"""The run directory: where each file stands, and how it is written."""

import csv
import ctypes
import errno
import fcntl
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from cxrdist.documents import MOST_BYTES, MOST_YAML_BYTES, parse_json, parse_yaml, typed
from cxrdist.errors import CxrdistError, RunFailedError, failure_of

MOST_LINE_BYTES = 1 << 16  # of a log; a row has 300
MOST_LOG_ROWS = 2_000_000  # 10,000 epochs of ChestX-ray14 in the paper's batches

T = TypeVar("T")

STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,99}")
"""A stage has a directory of its name in the run."""

_PARTIAL = re.compile(r"\..+\.([^.]+)\.(\d+)\.partial")


@dataclass(frozen=True)
class RunDirectory:
    """Names of the files of one run (.github/DESIGN.md, Files).

    What belongs to a set of images lies in a place of its own: ``train``, ``val`` or ``test``, or
    ``external/NAME`` for shards that are not the run's own.

    ``root`` may be a link, such as one to a scratch disk; below it no name is given out that is
    one, so that nothing is read, written or removed elsewhere.
    """

    root: Path

    def inside(self, *names: str) -> Path:
        """Name a file or directory of the run, by names that may hold several with / between them.

        Raises:
            CxrdistError: it, or a directory above it in the run, is a link.
        """
        path = self.root
        for name in "/".join(names).split("/"):
            path /= name
            if path.is_symlink():
                raise CxrdistError(
                    f"{path}: is a link, which may lead out of the run; put there what it points "
                    "to (only the run directory as a whole may be a link)"
                )
        return path

    @property
    def recipe(self) -> Path:
        """The resolved recipe, YAML; can be passed back with --config."""
        return self.inside("recipe.yaml")

    @property
    def info(self) -> Path:
        """What was run: versions, world, precision, git revision, shard index hash, weights."""
        return self.inside("run.json")

    @property
    def log(self) -> Path:
        """One JSON object a line."""
        return self.inside("log.jsonl")

    @property
    def checkpoints(self) -> Path:
        """Resumable states."""
        return self.inside("checkpoints")

    @property
    def model(self) -> Path:
        """The weights for use, with model.json."""
        return self.inside("model")

    def stage(self, name: str) -> "RunDirectory":
        """Return a run of a stage before the last one, with the model of its best epoch.

        Raises:
            CxrdistError: the name is none for a directory, or a link is in the way.
        """
        refuse_bad_stage_name(name)
        return RunDirectory(self.inside("stages", name))

    @property
    def tracking(self) -> Path:
        """What the trackers of --track write."""
        return self.inside("tracking")

    @property
    def audit(self) -> Path:
        """The audit of the shards, as it was when the training began."""
        return self.inside("audit.json")

    @property
    def seen(self) -> Path:
        """What is kept of the train and val images, to know them again in an external set."""
        return self.inside("seen.npz")

    @property
    def report(self) -> Path:
        """The self-contained report."""
        return self.inside("report.html")

    @property
    def checklist(self) -> Path:
        """The reporting checklists, filled in as far as the run can."""
        return self.inside("checklist.html")

    @property
    def card(self) -> Path:
        """The model card, in the form of Hugging Face."""
        return self.inside("model", "README.md")

    @property
    def members(self) -> Path:
        """The figures of an ensemble's members, and their spread."""
        return self.inside("members.json")

    def predictions(self, place: str) -> Path:
        """One row a sample of the place."""
        return self.inside(place, "predictions.csv")

    def metrics(self, place: str) -> Path:
        """Metrics of the place."""
        return self.inside(place, "metrics.json")

    def heatmaps(self, place: str) -> Path:
        """Pictures KEY.png (the X-ray) and KEY.CLASS.png (with relevance over it)."""
        return self.inside(place, "heatmaps")

    def mistakes(self, place: str) -> Path:
        """Pictures KEY.png of the images that were got wrong, the surest ones."""
        return self.inside(place, "mistakes")

    def nearest(self, place: str) -> Path:
        """One row an explained sample: the training image that the network takes for most alike."""
        return self.inside(place, "nearest.csv")

    def nearest_pictures(self, place: str) -> Path:
        """Pictures KEY.png of those training images."""
        return self.inside(place, "nearest")

    def relevance(self, place: str) -> Path:
        """Signed relevance, one KEY.npz a sample or tars of them."""
        return self.inside(place, "relevance")

    def text(self, place: str) -> Path:
        """Return what the probe for words on the images found."""
        return self.inside(place, "text.json")

    def text_pictures(self, place: str) -> Path:
        """Pictures of that probe."""
        return self.inside(place, "text")

    def localisation(self, place: str) -> Path:
        """Return how the relevance of the place agrees with boxes or masks."""
        return self.inside(place, "localisation.json")

    def localisation_pictures(self, place: str) -> Path:
        """Pictures of that."""
        return self.inside(place, "localisation")

    def mean_maps(self, place: str) -> Path:
        """Pictures of each class's mean map over the explained images of the place."""
        return self.inside(place, "mean_maps")

    def relevance_info(self, place: str) -> Path:
        """Return how the relevance of the place was made, and whether it stands up to a test."""
        return self.inside(place, "relevance.json")

    def relevance_table(self, place: str) -> Path:
        """One row a sample and class: the ledger of the logit."""
        return self.inside(place, "relevance.csv")


def refuse_bad_stage_name(name: str) -> None:
    """Make sure that a stage can have a directory of its name.

    Raises:
        CxrdistError: it cannot.
    """
    if not STAGE_NAME.fullmatch(name):
        raise CxrdistError(
            f"--stages: the name {name!r:.120} cannot be that of a directory; expected letters, "
            "digits, dots, -, _ and spaces, at most 100 of them"
        )


def external_place(name: str) -> str:
    """Return the place of an external set in a run.

    Raises:
        CxrdistError: the name is none for a directory.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise CxrdistError(
            f"--name {name!r:.120}: expected letters, digits, dots, - and _, at most 100 of them; "
            "give such a name with --name"
        )
    return f"external/{name}"


def options_of(place: str) -> str:
    """Return the option of evaluate and explain that leads to a place, for messages."""
    name = place.removeprefix("external/")
    return f"--split {place}" if name == place else f"--name {name}"


def open_run(root: Path) -> RunDirectory:
    """Name the files of a finished run.

    Raises:
        CxrdistError: there is no trained model in ``root``.
    """
    run = RunDirectory(root)
    files = [run.inside("model", name) for name in ("model.json", "model.safetensors")]
    if not files[0].is_file():
        raise CxrdistError(
            f"--run {root}: holds no trained model (model/model.json); "
            "give the directory of a finished `cxrdist train`"
        )
    return run


def open_regular(path: Path, flags: int) -> BinaryIO:
    """Open a regular file, buffered; its directory may hold links and pipes of other people.

    Args:
        path: of the file; directories above it may be links.
        flags: of `os.open`; a new file gets the mode that the umask leaves.

    Raises:
        CxrdistError: something else has this name.
        OSError: it cannot be opened.
    """
    try:
        # Without O_NONBLOCK a pipe would be waited for.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
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
    """Hold a directory for one writing process, or for several that share it.

    The kernel frees the lock of a dead holder. It holds on local disks, on NFS (Linux makes it a
    lock of the server) and on Lustre mounted with `flock`; with `localflock` only within a node.
    Directories that did not exist before are removed again where nothing was written to them.

    Raises:
        CxrdistError: another process holds it.
    """
    made = [path for path in (root, *root.parents) if not path.exists()]
    root.mkdir(parents=True, exist_ok=True)
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
            if made and not shared and os.listdir(root) == [".lock"]:
                _remove_empty(made)


def _remove_empty(directories: list[Path]) -> None:
    """Remove a directory that holds a lock alone, and those above it that are empty then."""
    (directories[0] / ".lock").unlink()
    for directory in directories:
        if any(directory.iterdir()):
            return
        directory.rmdir()


def _holder() -> str:
    """Who holds a lock, for the message of the next one who wants it."""
    job = os.environ.get("SLURM_JOB_ID")
    about = [f"host {platform.node()}", f"pid {os.getpid()}", *([f"job {job}"] if job else [])]
    return f"{', '.join(about)}, since {now()}"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; the file appears under its own name when it is complete.

    A link of that name is replaced, and what it points to is left alone.

    Raises:
        RunFailedError: the disk is full or read-only.
        CxrdistError: the name cannot be used.
    """
    if not isinstance(path, Path):  # an object store shows a file when it is whole
        with scratch_directory() as here:
            yield here / path.name
            path.fs.put_file(f"{here}/{path.name}", path.path)
        return
    partial = _partial(path)
    try:
        with room_for(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _discard(partial)
            yield partial
            _sync(partial)
            os.replace(partial, path)
            _sync(path.parent)
    finally:
        _discard(partial)


def _partial(path: Path) -> Path:
    """Return where a file or directory is made; says who makes it, so that `sweep` can tell."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.partial")


def _host() -> str:
    return platform.node().replace(".", "-")


def sweep(directory: Path, *, alone: bool = False) -> None:
    """Remove what dead processes have left half-written in a directory.

    Args:
        directory: its own entries only, and of them those that `_partial` names.
        alone: whether a lock says that no other process writes here; without it only what
            processes of this host have left is known to be dead.
    """
    for partial in directory.glob(".*.partial"):
        match = _PARTIAL.fullmatch(partial.name)
        dead = match and match[1] == _host() and not Path(f"/proc/{match[2]}").exists()
        if dead or (match and alone):
            _discard(partial)


def _discard(partial: Path) -> None:
    """Remove what was made under a name of `_partial`: a file, a directory, or only a link."""
    try:
        partial.unlink(missing_ok=True)
    except (IsADirectoryError, PermissionError):  # Linux and other systems say so of a directory
        shutil.rmtree(partial, ignore_errors=True)
    except OSError:
        # The name is too long or the disk read-only: then nothing of that name was made.
        return


@contextmanager
def room_for(path: Path, mend: str = "") -> Iterator[None]:
    """Turn what the operating system refuses into one line about a file, such as a full disk.

    Args:
        path: what is written, under the name that the user knows; an error that names a file
            elsewhere keeps that name.
        mend: what the user can do where this place cannot be used.

    Raises:
        RunFailedError: the disk is full, read-only or not allowed.
        CxrdistError: the name cannot be used.
    """
    try:
        yield
    except OSError as error:
        named = Path(error.filename or path)
        if named.is_relative_to(path.parent) or path.is_relative_to(named):
            failure = failure_of(error, path, mend)
        else:
            failure = failure_of(error)
        if failure is None:
            raise
        raise failure from error


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """Yield a directory for temporary files, removed at the end.

    Raises:
        RunFailedError, CxrdistError: there is none that can be written to, or it is full.
    """
    mend = "set TMPDIR to a directory with room"
    try:
        directory = tempfile.gettempdir()
    except FileNotFoundError as error:  # it tried to write in each place that it knows
        raise RunFailedError(f"{error.strerror}; {mend}") from error
    with (
        room_for(Path(directory) / "cxrdist-", mend),
        tempfile.TemporaryDirectory(prefix="cxrdist-", ignore_cleanup_errors=True) as here,
    ):
        yield Path(here)


def refuse_unwritable(path: Path) -> None:
    """Make sure before the work that its file can be written, as far as permissions tell.

    Raises:
        CxrdistError: a directory has this name, or a file stands where its directory would be.
        RunFailedError: its directory is read-only.
    """
    if path.is_dir():
        raise CxrdistError(f"{path}: is a directory; name a file to write")
    directory = next(parent for parent in path.absolute().parents if parent.exists())
    if not directory.is_dir():
        raise CxrdistError(f"{path}: {directory} is no directory; name another place")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise RunFailedError(f"{path}: {directory} is read-only; name another place")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a directory to fill; it appears under its own name when it is complete.

    A directory of that name that already exists is replaced.

    Raises:
        RunFailedError: the disk is full or read-only.
        CxrdistError: a file or a link has the name.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise CxrdistError(f"{path}: is a file or a link, expected a directory; move it away")
    partial = _partial(path)
    _discard(partial)
    try:
        with room_for(path):
            partial.mkdir(parents=True)
            yield partial
            for file in sorted(partial.rglob("*")):
                _sync(file)
            _sync(partial)
            if path.exists():
                _exchange(partial, path)
            else:
                os.replace(partial, path)
            _sync(path.parent)
    finally:
        _discard(partial)


def _exchange(new: Path, old: Path) -> None:
    """Let two directories swap names in one operation (Linux renameat2, RENAME_EXCHANGE)."""
    here, exchange = -100, 2
    names = (os.fsencode(new.absolute()), os.fsencode(old.absolute()))
    if ctypes.CDLL(None, use_errno=True).renameat2(here, names[0], here, names[1], exchange):
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(number, os.strerror(number), str(old))
        # NFS has no exchange: for a moment there is neither, never half of one.
        aside = _partial(old.with_name(f"{old.name}.old"))
        os.replace(old, aside)
        os.replace(new, old)
        _discard(aside)


def publish(made: Path, path: Path) -> None:
    """Give a complete directory its name; in an object store its index.json comes last.

    Args:
        made: on this machine; all files in it are complete.
        path: where it is to stand, local or an fsspec path; an empty directory may be there.
    """
    if isinstance(path, Path):
        _sync(made)
        os.replace(made, path)
        _sync(path.parent)
        return
    for file in sorted(made.iterdir(), key=lambda file: file.name == "index.json"):
        path.fs.put_file(str(file), f"{path.path}/{file.name}")


def remove(directory: Path) -> None:
    """Remove a directory, local or an fsspec path, as far as it is there."""
    if isinstance(directory, Path):
        shutil.rmtree(directory, ignore_errors=True)
    elif directory.exists():
        directory.fs.rm(directory.path, recursive=True)


def _sync(path: Path) -> None:
    """Bring a file or a directory's entries to the disk, so that a power cut leaves it whole."""
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
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file of plain values and dataclasses atomically; a NaN is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, default=asdict) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file, with the bounds of `parse_json`.

    Raises:
        CxrdistError: it is missing or damaged.
    """
    return read_document(path, object)


def read_document(path: Path, kind: type[T], mend: str = "copy the directory again") -> T:
    """Read a JSON file as the type that it is declared with; see `typed`.

    Args:
        path: local, or an fsspec path.
        kind: type of the document.
        mend: what the user can do about a damaged one.

    Raises:
        CxrdistError: it is missing, damaged or of another type.
        RunFailedError: it may not be read.
    """
    with judging(path, mend):
        return typed(parse_json(read_bytes(path, MOST_BYTES)), kind)


@contextmanager
def judging(where: Path | str, mend: str) -> Iterator[None]:
    """Turn what is wrong with a document into one line.

    Args:
        where: its file, and where in it the document is.
        mend: what the user can do about it.

    Raises:
        CxrdistError: it is missing or holds something else.
        RunFailedError: it may not be read.
    """
    try:
        yield
    except CxrdistError:
        raise
    except OSError as error:
        failure = failure_of(error, where, mend if isinstance(error, FileNotFoundError) else "")
        # An object store's errors have no number.
        raise failure or CxrdistError(f"{where}: cannot be read ({error}); {mend}") from error
    except ValueError as error:
        raise CxrdistError(f"{where}: {error}; {mend}") from error


def read_recipe(path: Path, mend: str) -> tuple[str, dict[str, Any]]:
    """Read a recipe: its text, and what it holds.

    Raises:
        CxrdistError: it cannot be read, or is no YAML object with the bounds of `parse_yaml`.
    """
    with judging(path, mend):
        data = read_bytes(path, MOST_YAML_BYTES)
        return data.decode("utf-8-sig"), parse_yaml(data)


def read_bytes(path: Path, most: int) -> bytes:
    """Read a file of an untrusted directory whole.

    Args:
        path: local, where neither a link nor a pipe is followed, or an fsspec path.
        most: bytes that it may have.

    Raises:
        CxrdistError: it is larger, or no regular file.
        OSError: it cannot be read.
    """
    is_local = isinstance(path, Path)
    with open_regular(path, os.O_RDONLY) if is_local else path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size if is_local else path.stat().st_size
        if size > most:
            raise CxrdistError(f"{path}: has {size} bytes, expected at most {most}; copy it again")
        content: bytes = file.read(size)
    return content


def now() -> str:
    """Return the time for run.json: ISO, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment() -> dict[str, Any]:
    """Versions of what computes, and the git revision when cxrdist runs from a checkout."""
    names = ("cxrdist", "torch", "accelerate", "timm", "kornia", "webdataset", "torchmetrics")
    versions = {name: version(name) for name in (*names, "zennit", "numpy", "pillow")}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "git_revision": _git_revision(Path(__file__).parent.parent),
    }


def _git_revision(checkout: Path) -> str | None:
    """HEAD of the checkout that the package lies in, with + where it was changed; else None."""
    if not (checkout / ".git").exists() or not shutil.which("git"):
        return None
    git = ["git", "-C", str(checkout)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def append_log(path: Path, row: dict[str, Any]) -> None:
    """Append one object to a JSON-lines log.

    Raises:
        RunFailedError: the disk is full.
    """
    with room_for(path), open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as log:
        log.write(json.dumps(row, allow_nan=False).encode() + b"\n")


def settle_log(path: Path) -> int:
    """Bring a log to the disk; its length in bytes."""
    _sync(path)
    return path.stat().st_size


def cut_log(path: Path, num_bytes: int) -> None:
    """Cut off what was logged after a checkpoint.

    Raises:
        CxrdistError: the log is shorter than it was then.
    """
    with room_for(path), open_regular(path, os.O_RDWR | os.O_CREAT) as log:
        if log.seek(0, os.SEEK_END) < num_bytes:
            raise CxrdistError(
                f"{path}: has {log.tell()} bytes, the checkpoint was written at {num_bytes}; "
                "copy the run directory again, or remove it to start anew"
            )
        log.truncate(num_bytes)


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Read a JSON-lines log; a last line without an end was cut off when the run was killed.

    Raises:
        CxrdistError: a line is not an object, or lines or their number have no bounds.
        OSError: it cannot be read.
    """
    with open_regular(path, os.O_RDONLY) as log:
        for number in range(1, MOST_LOG_ROWS + 1):
            line = log.readline(MOST_LINE_BYTES)
            if len(line) < MOST_LINE_BYTES and not line.endswith(b"\n"):
                return
            try:
                yield typed(parse_json(line), dict[str, Any])
            except ValueError as error:
                raise CxrdistError(
                    f"{path}, line {number}: {error}; run `cxrdist train` again"
                ) from error
    raise CxrdistError(f"{path}: has more than {MOST_LOG_ROWS} lines; run `cxrdist train` again")
