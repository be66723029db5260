"""Seen: what a run keeps of its train and val images, to know them again in an external set.

RUN/seen.npz holds of each image the sha256 of its pixels, two perceptual hashes, a thumbnail and,
hashed, whose X-ray it is: 1.8 kB, 180 MB for 100,000 images. The shards need not be at hand later.

Copies are found as in `cxrdist.data.duplicates`: hashes name candidates, thumbnails laid over each
other decide. Measured at 224 px:

- copies of 60 X-rays of nih14 and covid3 (stored as JPEG 60; scaled by 0.7; cropped by 3 % on each
  side; all of these and 10 % brighter; squared to 256 px) differ in at most 12 of 256 bits, and
  their thumbnails correlate at least 0.88; copies of the demo's synthetic X-rays: 18 bits, 0.93;
- of the 24.4 million pairs of 6,985 X-rays of four public sets, the audit takes 131 for copies at
  full size, which others made with larger cuts: up to 52 bits, 0.896 and more. Of the other pairs
  none is within 32 bits and above 0.8, and none within 56 bits is above 0.863.
"""

import hashlib
import math
import os
import re
import struct
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxrdist.data.cache import Images
from cxrdist.data.duplicates import FLAT, MOST_BITS, compare, find_candidates_between, views
from cxrdist.data.fingerprint import fingerprint
from cxrdist.data.index import KEY, MOST_SAMPLES, Sample
from cxrdist.data.records import KNOWN_NAMES, NO_PATIENT
from cxrdist.data.several import NIH_PATIENT, OF_NIH
from cxrdist.run import atomic_file, judging, open_regular
from cxrdist.terminal import progress

FORMAT = "cxrdist-seen-1"
SIDE_PX = 40  # of a thumbnail; at 32 px copies of 0.854 and other X-rays of 0.865 run together
BLUR_PX = 3.0  # of 128: a thumbnail has no finer structure than this
NEAR_BITS = 32  # of 256; planted copies have up to 18
SAME_NEAR = 0.8  # correlation of a pair whose hashes are near
SAME = 0.88  # of any other candidate, between 0.863 and 0.896
KEPT_IMAGES = 128  # whose views are kept, as in `cxrdist.data.duplicates`
NUM_THREADS = 8
PATIENT_BYTES = 16
MEND = "copy the run directory again"
# Folders of any hospital: "patient 1 of images" may be anybody.
COMMON_SOURCES = frozenset(
    (
        *("cxr", "data", "dataset", "dicom", "image", "images", "img", "jpeg", "jpg", "png"),
        *("test", "train", "val", "x-rays", "xray", "xrays"),
    )
)
# Of `cxrdist.data.anonymise`: made anew for each pack, so that two of them tell nothing.
_ANONYMOUS = re.compile(r"(?:.+:)?patient-[0-9a-f]{20}")
_NIH_OF_SEVERAL = re.compile(r"chestxray14/\d{8}")
_ROW_SHAPES = {
    "sha256": (32,),
    "phash": (32,),
    "inner_phash": (32,),
    "thumbnails": (SIDE_PX, SIDE_PX),
    "flat": (),
    "patients": (PATIENT_BYTES,),
}
_MOST_HEADER_BYTES = 1000
_MOST_KEY_BYTES = 90
# What zipfile and numpy raise on damaged content.
_DAMAGE = (
    *(ValueError, LookupError, EOFError, NotImplementedError, RuntimeError, SyntaxError),
    *(TypeError, zipfile.BadZipFile, struct.error),
)


@dataclass(frozen=True)
class Prints:
    """What is kept of M images.

    Attributes:
        index_sha256: of their shards.
        keys: of their samples.
        sha256: of their pixels, uint8 [M, 32].
        phash: uint8 [M, 32].
        inner_phash: of their insides, uint8 [M, 32].
        thumbnails: uint8 [M, SIDE_PX, SIDE_PX].
        flat: 1 where the square is flat, so that its hashes are noise; uint8 [M].
        patients: the start of the sha256 of `patient_name`, zeros where it is not known; uint8 [M,
            PATIENT_BYTES].
    """

    index_sha256: str
    keys: list[str]
    sha256: NDArray[np.uint8]
    phash: NDArray[np.uint8]
    inner_phash: NDArray[np.uint8]
    thumbnails: NDArray[np.uint8]
    flat: NDArray[np.uint8]
    patients: NDArray[np.uint8]

    def followed_by(self, other: "Prints") -> "Prints":
        """These images, and those of a run that this one's weights started from."""
        joined = {
            name: np.concatenate([getattr(self, name), getattr(other, name)])
            for name in _ROW_SHAPES
        }
        return Prints(self.index_sha256, [*self.keys, *other.keys], **joined)


class Match(NamedTuple):
    """Why an image counts as seen."""

    why: str
    """``equal image``, ``altered copy``, ``same patient`` or ``pre-training list``."""
    of: str
    """Key of the seen image, one of a seen patient, or the data set of the list."""


def patient_name(sample: Sample) -> str:
    """Name the patient so that the names of two sets of shards can be compared; empty if unknown.

    Patients of ChestX-ray14 have its number, also in RSNA's images and in sets that took its files
    in. Any other patient is compared within the same source, such as a data set or a hospital in a
    table's column `source`: patient 1 of another source is another person. A source that has the
    name of any folder, such as ``images``, tells nothing, and neither do anonymised names.
    """
    file = sample.path.rsplit("/", 1)[-1]
    number = NIH_PATIENT.fullmatch(sample.patient) if sample.source in OF_NIH else None
    if number:
        return f"chestxray14/{number[1]}"
    if _NIH_OF_SEVERAL.fullmatch(sample.patient):
        return sample.patient
    if KNOWN_NAMES["ChestX-ray14"].search(file):
        return f"chestxray14/{file[:8]}"
    told = sample.source and sample.source.casefold() not in COMMON_SOURCES
    unknown = sample.patient.startswith(NO_PATIENT) or _ANONYMOUS.fullmatch(sample.patient)
    if unknown or not told:
        return ""
    return f"{sample.source}\0{sample.patient}"


def take_prints(
    images: Images, samples: Sequence[Sample], numbers: NDArray[np.int64], index_sha256: str
) -> Prints:
    """Take what is kept of some images, by threads.

    Args:
        images: uint8 [samples, S, S].
        samples: all samples of the shards.
        numbers: int64 [M], of the images.
        index_sha256: of the shards.
    """
    blocks = [numbers[i : i + 64] for i in range(0, len(numbers), 64)]
    rows: list[tuple[bytes, bytes, bytes, bytes, int]] = []
    threads = max(1, min(NUM_THREADS, len(os.sched_getaffinity(0))))
    with (
        ThreadPoolExecutor(threads) as pool,
        progress(len(numbers), "fingerprints", "images") as bar,
    ):
        for block in pool.map(partial(_prints_of, images), blocks):
            rows += block
            bar.update(len(block))
    sha256, phash, inner_phash, thumbnails, flat = zip(*rows, strict=True) if rows else ((),) * 5
    patients = [_hashed(patient_name(samples[number])) for number in numbers.tolist()]
    columns = {
        "sha256": sha256,
        "phash": phash,
        "inner_phash": inner_phash,
        "thumbnails": thumbnails,
        "flat": [bytes([value]) for value in flat],
        "patients": patients,
    }
    arrays = {
        name: np.frombuffer(b"".join(columns[name]), np.uint8).reshape(-1, *shape)
        for name, shape in _ROW_SHAPES.items()
    }
    return Prints(index_sha256, [samples[n].key for n in numbers.tolist()], **arrays)


def _prints_of(
    images: Images, numbers: NDArray[np.int64]
) -> list[tuple[bytes, bytes, bytes, bytes, int]]:
    """Return the hashes of some images, their thumbnails, and whether they are flat."""
    rows = []
    for number in numbers.tolist():
        pixels = np.asarray(images[number])
        found = fingerprint(pixels)
        small = Image.fromarray(pixels).resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
        is_flat = int(found.statistics["spread"] < FLAT)
        hashes = bytes.fromhex(found.sha256), found.phash, found.inner_phash
        rows.append((*hashes, small.tobytes(), is_flat))
    return rows


def _hashed(patient: str) -> bytes:
    digest = hashlib.sha256(patient.encode("utf-8", "surrogateescape")).digest()
    return digest[:PATIENT_BYTES] if patient else bytes(PATIENT_BYTES)


def find_matches(images: Prints, seen: Prints) -> dict[int, Match]:
    """Find the images that were seen, altered copies of them, and other images of their patients.

    Args:
        images: of an external set, N.
        seen: of a run.

    Returns:
        By the number of the image, 0 to N - 1, the first of these reasons.
    """
    equal, patients = _first_rows(seen.sha256), _first_rows(seen.patients)
    patients.pop(bytes(PATIENT_BYTES), None)
    matches: dict[int, Match] = {}
    for row, (digest, patient) in enumerate(zip(images.sha256, images.patients, strict=True)):
        if (place := equal.get(digest.tobytes())) is not None:
            matches[row] = Match("equal image", seen.keys[place])
        elif (place := patients.get(patient.tobytes())) is not None:
            matches[row] = Match("same patient", seen.keys[place])
    copies = _find_copies(images, seen, {r for r, m in matches.items() if m.why == "equal image"})
    return dict(sorted((matches | copies).items()))


def _first_rows(values: NDArray[np.uint8]) -> dict[bytes, int]:
    """Return the first row of each value."""
    rows: dict[bytes, int] = {}
    for place, value in enumerate(values):
        rows.setdefault(value.tobytes(), place)
    return rows


def _find_copies(images: Prints, seen: Prints, known: set[int]) -> dict[int, Match]:
    """Altered copies among the images that are not known yet, each with the nearest it is of."""
    rows = np.array([r for r in np.flatnonzero(images.flat == 0) if r not in known], np.int64)
    places = np.flatnonzero(seen.flat == 0)
    candidates = find_candidates_between(
        (images.phash[rows], images.inner_phash[rows]),
        (seen.phash[places], seen.inner_phash[places]),
        MOST_BITS,
    )
    views_of = lru_cache(KEPT_IMAGES)(lambda row: views(images.thumbnails[row], BLUR_PX))
    seen_views = lru_cache(KEPT_IMAGES)(lambda place: views(seen.thumbnails[place], BLUR_PX))
    matches: dict[int, Match] = {}
    nearest_first = sorted(candidates.items(), key=lambda item: (item[0][0], item[1], item[0][1]))
    with progress(len(candidates), "comparing", "pairs", show=len(candidates) > 1000) as bar:
        for (one, other), bits in nearest_first:
            row, place = int(rows[one]), int(places[other])
            least = SAME_NEAR if bits <= NEAR_BITS else SAME
            if row not in matches and compare(views_of(row), seen_views(place)) >= least:
                matches[row] = Match("altered copy", seen.keys[place])
            bar.update()
    return matches


def write_seen(path: Path, seen: Prints) -> None:
    """Write seen.npz; the same images give the same bytes.

    Its members are stored and not compressed, so that none is larger than the file says.
    """
    arrays = {
        "format": np.array(FORMAT, "S"),
        "index_sha256": np.array(seen.index_sha256, "S64"),
        "keys": np.array(seen.keys, "S"),
        **{name: getattr(seen, name) for name in _ROW_SHAPES},
    }
    with atomic_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as file:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980, so that bytes do not vary
            with file.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)


def read_seen(path: Path) -> Prints:
    """Read seen.npz.

    Raises:
        CxrdistError: it is damaged, or not what `write_seen` writes.
    """
    with judging(path, MEND), open_regular(path, os.O_RDONLY) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return _read_prints(archive, os.fstat(file.fileno()).st_size)
        except _DAMAGE as error:
            raise ValueError(f"is not what cxrdist train writes ({error!s:.150})") from error


def _read_prints(archive: zipfile.ZipFile, num_bytes: int) -> Prints:
    """Read the arrays, whose sizes together are at most that of the file.

    Raises:
        ValueError, LookupError: an array is missing, or of another type or shape.
    """
    names = ("format", "index_sha256", "keys", *_ROW_SHAPES)
    sizes = [archive.getinfo(f"{name}.npy").file_size for name in names]
    if sum(sizes) > num_bytes:
        raise ValueError(f"its arrays have {sum(sizes)} bytes, the file {num_bytes}")
    arrays = {name: _read_array(archive, name) for name in names}
    if arrays["format"].item() != FORMAT.encode():
        raise ValueError(f"its format is not {FORMAT}")
    texts = [key.decode("ascii") for key in arrays["keys"].reshape(-1).tolist()]
    digest = arrays["index_sha256"].item().decode("ascii")
    if not re.fullmatch("[0-9a-f]{64}", digest) or not all(map(KEY.fullmatch, texts)):
        raise ValueError("a key or a sha256 is invalid")
    if not 1 <= len(texts) <= MOST_SAMPLES:
        raise ValueError(f"has {len(texts)} images")
    for name, shape in _ROW_SHAPES.items():
        if arrays[name].shape != (len(texts), *shape):
            raise ValueError(f"{name} has the shape {arrays[name].shape}")
    return Prints(digest, texts, **{name: arrays[name] for name in _ROW_SHAPES})


def _read_array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """Read an array of bytes or texts whose size is the one that its header tells.

    Raises:
        ValueError: it is compressed, of another type, or of another size.
    """
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    with archive.open(entry) as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError(f"{name} is of another version of npy")
        header = np.lib.format.read_array_header_1_0(member, _MOST_HEADER_BYTES)
        data = member.read()
    shape, is_fortran, dtype = header
    is_text = dtype.kind == "S" and 1 <= dtype.itemsize <= _MOST_KEY_BYTES
    if is_fortran or not (dtype == np.uint8 if name in _ROW_SHAPES else is_text):
        raise ValueError(f"{name} is of another type")
    if min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{name} has {len(data)} bytes, which is not its shape {shape!s:.80}")
    return np.frombuffer(data, dtype).reshape(shape)
