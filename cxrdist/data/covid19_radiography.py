"""The COVID-19 Radiography Database (Chowdhury et al. 2020, Rahman et al. 2021) as unpacked.

Kaggle: tawsifurrahman/covid19-radiography-database. The paper used the first release.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from cxrdist.data.found import LeftOut, find_images
from cxrdist.data.records import Record, Source, own_patient
from cxrdist.errors import CxrdistError

NAME = "COVID-19 Radiography Database"
# COVID-19 images of the first release that COVID-Net leaves out (its create_COVIDx notebooks).
UNUSABLE = {*range(100, 106), *range(110, 114), *range(122, 127), 217}
MOST_BYTES = 64 << 20  # of a workbook, unpacked; the largest of the releases has 2 MB
# Sources by part of an image's URL in a workbook.
SOURCES = {
    "rsna": "RSNA",
    "paultimothymooney": "Kermany",
    "bimcv": "BIMCV",
    "sirm": "SIRM",
    "eurorad": "Eurorad",
    "ieee8023": "covid-chestxray-dataset",
    "ml-workgroup": "Hannover",
    "armiro": "COVID-CXNet",
    "figshare": "Figshare",
}


@dataclass(frozen=True)
class Release:
    """A release, recognised by its folders."""

    name: str
    classes: dict[str, str]
    """By folder, the source of the images that no workbook lists."""
    images: str = ""
    """Folder within a class's folder."""


# The children's images are Kermany's (2018), the opacities RSNA's (2018).
CHILDREN = {"NORMAL": "Kermany", "Viral Pneumonia": "Kermany"}
# In this order: where names ignore case, a current release has the middle one's folders too.
RELEASES = (
    Release(
        "current release",
        {"COVID": NAME, "Lung_Opacity": "RSNA", "Normal": NAME, "Viral Pneumonia": "Kermany"},
        "images",
    ),
    Release("middle release", {"COVID": NAME, **CHILDREN}),
    Release("first release", {"COVID-19": NAME, **CHILDREN}),
)


def read_covid19_radiography(
    folder: Path, *, drop_unusable: bool, besides: Sequence[Path] = ()
) -> Source:
    """Read one of the three releases, recognised by its folders; lung masks are left out.

    The folder is that of the release, or the one above it; folders in ``besides`` are skipped. The
    label is the folder's name. No patient is known. The source is that of the URL in the metadata
    workbooks, else that of the class (`Release`). ``drop_unusable`` leaves out images that
    COVID-Net lists as unusable.

    Raises:
        CxrdistError: the folder has no release, a class has no image, a workbook cannot be read, or
            ``drop_unusable`` is set for another release than the first.
    """
    root, release = _recognise(folder)
    if drop_unusable and release.name != "first release":
        raise CxrdistError(
            f"--drop-unusable: is for the first release, {root} is the {release.name}"
        )
    found = find_images(root, besides)
    urls = {name: _read_workbook(root, name) for name in release.classes}
    records: list[Record] = []
    left_out = list(found.left_out)
    for file in found.images:
        parts = file.relative_to(root).parts
        path, name, number = "/".join(parts), parts[0], _number(file.name)
        if reason := _why_left_out(release, parts, drop_unusable):
            left_out.append(LeftOut(path, reason))
            continue
        source = source_of(urls[name][number]) if number in urls[name] else release.classes[name]
        records.append(Record(file, path, name, own_patient(path), source))
    empty = sorted(set(release.classes) - {record.label for record in records})
    if empty:
        raise CxrdistError(f"{root / empty[0]}: the class has no image; unpack the release again")
    return Source(
        records,
        "multiclass",
        sorted(release.classes),
        f"{NAME}, {release.name}",
        left_out=tuple(sorted(left_out)),
        num_found=found.num_files,
        dicom=found.dicom,
    )


def _why_left_out(release: Release, parts: Sequence[str], drop_unusable: bool) -> str:
    """Return why an image in the release's folder is not packed; empty if it is."""
    folders = [part for part in (parts[0], release.images) if part]
    if list(parts[:-1]) != folders or parts[0] not in release.classes:
        return "lung mask" if "masks" in parts[1:-1] else "outside of the release's folders"
    if drop_unusable and parts[0] == "COVID-19" and _number(parts[-1]) in UNUSABLE:
        return "unusable according to COVID-Net"
    return ""


def _recognise(folder: Path) -> tuple[Path, Release]:
    """Return the release's folder, and which release it is."""
    for root in (folder, *(child for child in sorted(folder.iterdir(), key=str) if child.is_dir())):
        for release in RELEASES:
            if all((root / name / release.images).is_dir() for name in release.classes):
                return root, release
    expected = "; ".join(", ".join(release.classes) for release in RELEASES)
    raise CxrdistError(
        f"--input {folder}: is not a release of the {NAME}; expected the folders of one: {expected}"
    )


def _read_workbook(root: Path, name: str) -> dict[int, str]:
    """Return the URLs of a class's images by their numbers; empty without a workbook.

    Names in the workbooks are spelt in several ways, such as COVID-19(1) for ``COVID-19 (1)`` and
    NORMAL-1 for ``Normal-1``: only the number identifies an image.
    """
    books = sorted(root.glob("*.xlsx"), key=str)
    # Only the part before the first dot counts: the first release has a `.matadata.xlsx`.
    book = next((b for b in books if b.name.split(".")[0].lower() == name.lower()), None)
    if book is None:
        return {}
    rows = _read_rows(book)
    header = [str(cell or "").strip().upper() for cell in rows[0]] if rows else []
    if not {"FILE NAME", "URL"} <= set(header):
        raise CxrdistError(f"{book}: has no columns FILE NAME and URL; unpack it again")
    name_at, url_at = header.index("FILE NAME"), header.index("URL")
    return {
        number: str(row[url_at])
        for row in rows[1:]
        if len(row) > max(name_at, url_at)
        and row[url_at]
        and (number := _number(str(row[name_at] or ""))) is not None
    }


def _read_rows(book: Path) -> list[tuple[Any, ...]]:
    """Return the cells of a workbook's first sheet; reject one that is damaged or too large."""
    from openpyxl import load_workbook

    try:
        content = io.BytesIO(book.read_bytes())
        with ZipFile(content) as archive:
            # Declared sizes are enough: zipfile returns no more of a member than that.
            size = sum(member.file_size for member in archive.infolist())
        if size > MOST_BYTES:
            raise ValueError(f"{size} bytes")
        sheet = load_workbook(content, read_only=True, data_only=True).worksheets[0]
        return list(sheet.iter_rows(values_only=True))
    except Exception as error:
        # openpyxl and the zip and XML readers below it raise errors of any kind on damaged files.
        raise CxrdistError(
            f"{book}: is not a readable workbook ({type(error).__name__}); unpack the release again"
        ) from error


def _number(name: str) -> int | None:
    """Return the last number in an image's name without suffix: 7 for ``COVID-19 (7).png``."""
    match = re.search(r"(\d+)\)?$", re.sub(r"\.\w+$", "", name.strip()))
    return int(match.group(1)) if match else None


def source_of(url: str) -> str:
    """Return the name of the collection that a URL belongs to, else its host."""
    known = next((name for part, name in SOURCES.items() if part in url.lower()), None)
    # urllib.parse raises an error for some malformed URLs.
    host = re.match(r"\s*(?:[\w+.-]+:)?//(?:www\.)?([^/?#\s]+)", url)
    return known or (host[1] if host else NAME)
