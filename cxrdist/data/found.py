"""Found: every file below a folder, as an image or left out with a reason.

A file with an image suffix counts as an image, and its decoder reports what it cannot read. For any
other file the first bytes decide.
"""

import heapq
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cxrdist.data.images import DICOM_SUFFIXES
from cxrdist.data.kinds import kind_of
from cxrdist.errors import CxrdistError

IMAGE_SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".gif"),
    *(".jp2", ".j2k", ".pgm", ".ppm", ".pnm", *DICOM_SUFFIXES),
}
# Made by archivers, desktops, photo servers and file systems; names with a leading dot are hidden.
SYSTEM_NAMES = {
    *("__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini", "Icon\r", "@eaDir"),
    *("$RECYCLE.BIN", "System Volume Information", "lost+found"),
}
HEAD_BYTES = 1024  # contains DICOM's file meta information, which identifies a DICOMDIR
DICOMDIR = b"1.2.840.10008.1.3.10"  # Media Storage Directory Storage (DICOM PS3.4, table B.5-1)

HIDDEN = "hidden or system file"
SEEN = "folder that is read under another name"


class LeftOut(NamedTuple):
    """A file that is not packed, or a folder that was not entered."""

    path: str
    """Relative to the source, with slashes; bytes that are not UTF-8 are escaped."""
    reason: str


@dataclass(frozen=True)
class Found:
    """All files below a folder, sorted by name."""

    images: tuple[Path, ...]
    """Files to decode."""
    left_out: tuple[LeftOut, ...]
    """Everything else."""
    dicom: bool
    """Whether any image is a DICOM file, judged by suffix or first bytes."""

    @property
    def num_files(self) -> int:
        """Number of all files."""
        return len(self.images) + len(self.left_out)


def find_images(folder: Path, besides: Sequence[Path] = ()) -> Found:
    """Classify every file below a folder, local or an fsspec path.

    Folders in ``besides``, such as the one that is being written, are skipped.

    Raises:
        CxrdistError: an image has a name that is not UTF-8, so that it cannot be in a table.
    """
    images, left_out, dicom = [], [], False
    for file, reason in walk(folder, besides):
        kind, reason = ("", reason) if reason else look_at(file)
        if reason:
            left_out.append(LeftOut(escaped(file.relative_to(folder).as_posix()), reason))
            continue
        refuse_undecodable_name(file)
        images.append(file)
        dicom = dicom or kind == "DICOM"
    # As texts, like the paths of records: paths would sort by their parts, `a/1` before `a-b/1`.
    return Found(tuple(sorted(images, key=str)), tuple(sorted(left_out)), dicom)


def walk(folder: Path, besides: Sequence[Path] = ()) -> Iterator[tuple[Path, str]]:
    """Yield every file below a folder, and why it cannot be an image; an empty reason if it may.

    Linked folders are followed. A folder that can be reached in several ways is read once, under
    its own name rather than a link's, so that circular links end; the other ways are yielded with
    the reason `SEEN`.
    """
    if not isinstance(folder, Path):  # an object store has neither links nor special files
        yield from _walk_store(folder, besides)
        return
    own = {_identity(path) for path in besides if isinstance(path, Path) and path.is_dir()}
    # Counted as seen, so that nothing in them is yielded, whatever link leads there.
    seen = set(own)
    waiting = [(False, False, str(folder))]  # plain folders first, then links, then hidden ones
    while waiting:
        hidden, _, name = heapq.heappop(waiting)
        try:
            identity = _identity(name)
            entries = [] if identity in seen else sorted(os.scandir(name), key=os.fspath)
        except OSError as error:
            yield Path(name), f"folder that cannot be read ({error.strerror})"
            continue
        if identity in seen and identity not in own:
            yield Path(name), SEEN
        seen.add(identity)
        for entry in entries:
            below_hidden = hidden or is_hidden(entry.name)
            fault = _fault(entry)
            if fault is None:
                heapq.heappush(waiting, (below_hidden, entry.is_symlink(), entry.path))
            else:
                yield Path(entry.path), HIDDEN if below_hidden else fault


def _walk_store(folder: Path, besides: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    for file in folder.rglob("*"):
        if file.is_file() and not any(is_within(file, other) for other in besides):
            yield file, HIDDEN if is_hidden(*file.relative_to(folder).parts) else ""


def look_at(file: Path) -> tuple[str, str]:
    """Return the kind of an image, and why a file is not an image; one of the two is empty."""
    suffix = file.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "DICOM" if suffix in DICOM_SUFFIXES else "picture", ""
    try:
        with file.open("rb") as content:
            head = content.read(HEAD_BYTES)
    except OSError as error:
        return "", f"cannot be read ({error.strerror or error})"
    if DICOMDIR in head:
        return "", "DICOMDIR"
    kind = kind_of(head)
    return (kind, "") if kind else ("", "not an image")


def absolute(file: Path) -> str:
    """Return the absolute path of a file, local or an fsspec path; links are not followed."""
    return os.path.abspath(file) if isinstance(file, Path) else str(file)


def path_below(folder: Path, file: Path) -> str:
    """Return the path of a file below a folder, with slashes; faster than `Path.relative_to`."""
    return file.as_posix().removeprefix(f"{folder.as_posix().rstrip('/')}/")


def without_suffix(path: str) -> str:
    """Return a path without the suffix of an image; a DICOM UID, all digits and dots, has none."""
    suffix = PurePosixPath(path).suffix
    return path.removesuffix(suffix) if suffix.lower() in IMAGE_SUFFIXES else path


def path_ends(paths: Iterable[str], names: Iterable[str]) -> dict[str, list[int]]:
    """Index paths without suffix by their ends that have as many folders as one of the names."""
    depths = {name.count("/") for name in names}
    positions: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        parts = without_suffix(path).split("/")
        for depth in depths:
            if depth < len(parts):
                positions.setdefault("/".join(parts[-depth - 1 :]), []).append(i)
    return positions


def escaped(name: str) -> str:
    """Return a file's name as text that can be printed; bytes that are not UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def refuse_undecodable_name(file: Path) -> None:
    """Reject a file name that is not UTF-8, so that it cannot be written to a table."""
    name = str(file)
    if escaped(name) != name:
        raise CxrdistError(
            f"{escaped(name)}: the name is not UTF-8; rename it, for example with convmv -r "
            "-f latin1 -t utf8 --notest FOLDER"
        )


def is_hidden(*names: str) -> bool:
    """Return whether any of these names belongs to a hidden or system file or folder."""
    return any(name.startswith(".") or name in SYSTEM_NAMES for name in names)


def is_within(path: Path, folder: Path) -> bool:
    """Return whether a path is a folder itself or below it."""
    if isinstance(path, Path) and isinstance(folder, Path):
        return path.resolve().is_relative_to(folder.resolve())
    return f"{str(path).rstrip('/')}/".startswith(f"{str(folder).rstrip('/')}/")


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _fault(entry: "os.DirEntry[str]") -> str | None:
    """Return why an entry is not a regular file; empty if it is one, None for a folder."""
    try:
        if entry.is_dir():
            return None
        if entry.is_file():
            return ""
        return "not a regular file" if os.path.exists(entry.path) else "link to a missing file"
    except OSError as error:  # circular links
        return f"cannot be read ({error.strerror})"
