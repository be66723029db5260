"""Listed: match the files of a public data set with the rows of its tables."""

import re
from collections.abc import Sequence
from pathlib import Path

from cxrdist.data.found import LeftOut, find_images, path_below
from cxrdist.errors import CxrdistError

MISSING = "in the table, but not here"
TWICE = "in the table, but for the second time"
NOT_IN_TABLE = "not in the table"
OUTSIDE = "outside of the data set's folders"


class Listed:
    """The images below a data set's folder; each can be taken by one row of a table."""

    def __init__(
        self,
        folder: Path,
        image: re.Pattern[str],
        besides: Sequence[Path] = (),
        *,
        suffix: str | None = "",
    ) -> None:
        """List every file except those in folders of ``besides``.

        ``image`` matches the path of an image of the data set, relative to the folder and without
        its suffix, which smaller copies of a data set change. The group of the pattern and
        ``suffix`` together are the image's name in the tables; None is the file's own suffix.

        Raises:
            CxrdistError: there is no image in the data set's folders, or two have one name.
        """
        found = find_images(folder, besides)
        self._left_out = list(found.left_out)
        self._waiting: dict[str, tuple[Path, str]] = {}
        self._num_found, self._dicom = found.num_files, found.dicom
        for file in found.images:
            path = path_below(folder, file)
            match = image.fullmatch(path.removesuffix(file.suffix))
            if match is None:
                self._left_out.append(LeftOut(path, OUTSIDE))
                continue
            name = match[1] + (file.suffix if suffix is None else suffix)
            if name in self._waiting:
                raise CxrdistError(f"{file}: is also in {self._waiting[name][0]}; remove one")
            self._waiting[name] = file, path
        if not self._waiting:
            raise CxrdistError(f"--input {folder}: has no images in the data set's folders")
        self._taken: dict[str, object] = {}

    def take(self, name: str, where: object = "", stated: object = None) -> tuple[Path, str] | None:
        """Take the file of a row, and its path relative to the folder; each can be taken once.

        None is returned if the file is missing or was taken before, which is recorded. What the row
        says about the image is ``stated``; ``where`` names the row in messages.

        Raises:
            CxrdistError: an earlier row says something else about the image.
        """
        is_twice = name in self._taken
        # Otherwise the order of the rows would decide which label or view the image has.
        if self._taken.setdefault(name, stated) != stated:
            raise CxrdistError(
                f"{where}: {name} is in an earlier row, which says something else; remove one"
            )
        taken = self._waiting.pop(name, None)
        if taken is None:
            self._left_out.append(LeftOut(name, TWICE if is_twice else MISSING))
            # A row without a file is among the left out, so it must count as found.
            self._num_found += 1
        return taken

    def names(self) -> list[str]:
        """Return the names of the images that no row has taken yet."""
        return list(self._waiting)

    def leave(self, path: str, reason: str) -> None:
        """Record why an image that was taken is not packed."""
        self._left_out.append(LeftOut(path, reason))

    def account(self) -> tuple[tuple[LeftOut, ...], int, bool]:
        """Return left_out (with the images that no row took), num_found and dicom of `Source`."""
        strays = (LeftOut(path, NOT_IN_TABLE) for _, path in self._waiting.values())
        return tuple(sorted((*self._left_out, *strays))), self._num_found, self._dicom

    def notes(self, *tables: Path) -> list[str]:
        """Return notes for the user, one line each."""
        names = " and ".join(table.name for table in tables)
        missing = sum(left.reason == MISSING for left in self._left_out)
        return [f"{missing} images of {names} are not here"] * bool(missing)
