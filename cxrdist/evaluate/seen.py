"""Prints of a run's train and val images, to recognise them in an external set.

RUN/seen.npz holds per image the sha256 of its pixels, two perceptual hashes, a thumbnail and the
hashed patient: 1.8 kB, 180 MB for 100,000 images. The shards are not needed later.

Copies are found as in `cxrdist.data.duplicates`: hashes give candidates, and the correlation of
aligned thumbnails decides. Measured at 224 px:

- Copies of 60 X-rays of nih14 and covid3 (stored as JPEG 60; scaled by 0.7; cropped by 3 % on each
  side; all of these and 10 % brighter; squared to 256 px) differ in at most 12 of 256 bits, and
  their thumbnails correlate at least 0.88. Copies of the demo's synthetic X-rays: 18 bits, 0.93.
- Among the 24.4 million pairs of 6,985 X-rays of four public data sets, the audit at full size
  finds 131 copies, which others made with larger crops. They differ in up to 52 bits and correlate
  at least 0.896. No other pair within 32 bits correlates above 0.8, and none within 56 bits above
  0.863.
"""

import hashlib
import os
import re
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxrdist.data.cache import Images
from cxrdist.data.duplicates import FLAT, KEPT_IMAGES, compare, find_candidates_between, views
from cxrdist.data.fingerprint import fingerprint
from cxrdist.data.index import KEY, MOST_SAMPLES, Sample
from cxrdist.data.records import KNOWN_NAMES, NO_PATIENT, OF_NIH
from cxrdist.data.several import NIH_PATIENT
from cxrdist.files import DAMAGE, atomic_file, judging, open_regular, read_npy
from cxrdist.terminal import progress

FORMAT = "cxrdist-seen-1"
SIDE_PX = 40  # of a thumbnail; at 32 px copies (0.854) and other X-rays (0.865) overlap
BLUR_PX = 3.0  # of 128; thumbnails have no finer structure
NEAR_BITS = 32  # of 256; artificial copies differ in up to 18
SAME_NEAR = 0.8  # least correlation of copies whose hashes are near
SAME = 0.88  # least correlation of other copies, between 0.863 and 0.896
NUM_THREADS = 8
PATIENT_BYTES = 16  # 128 bits, so that no two patients have the same by chance
MEND = "copy the run directory again"
# Generic folder names: "patient 1 of images" may be any patient.
COMMON_SOURCES = frozenset(
    (
        *("cxr", "data", "dataset", "dicom", "image", "images", "img", "jpeg", "jpg", "png"),
        *("test", "train", "val", "x-rays", "xray", "xrays"),
    )
)
# Names by `cxrdist.data.anonymise`: they differ between packs, so they cannot be compared.
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
_MOST_KEY_BYTES = 90  # see `cxrdist.data.index.KEY`


@dataclass(frozen=True)
class Prints:
    """The prints of M images.

    Attributes:
        index_sha256: sha256 of the index of their shards.
        keys: keys of their samples.
        sha256: sha256 of their pixels, uint8 [M, 32].
        phash: perceptual hash, uint8 [M, 32].
        inner_phash: perceptual hash of the inner part, uint8 [M, 32].
        thumbnails: uint8 [M, SIDE_PX, SIDE_PX].
        flat: 1 where the square is flat and its hashes are noise, uint8 [M].
        patients: the first bytes of the sha256 of `patient_name`, zeros where unknown, uint8 [M,
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
        """Return these prints and those of the run that this one's weights came from."""
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
    """Key of the seen image or of an image of the seen patient, or the data set of the list."""


def patient_name(sample: Sample) -> str:
    """Return a patient name that can be compared between shards; empty if the patient is unknown.

    Patients of ChestX-ray14 get its number, also in RSNA's images and in data sets that include its
    files. Other patients are only compared within the same source, such as a data set or a hospital
    in a table's column `source`, because patient 1 of another source is another person. Generic
    folder names such as ``images`` and anonymised names cannot be compared.
    """
    file = sample.path.rsplit("/", 1)[-1]
    number = NIH_PATIENT.fullmatch(sample.patient) if sample.source in OF_NIH else None
    if number:
        return f"chestxray14/{number[1]}"
    if _NIH_OF_SEVERAL.fullmatch(sample.patient):
        return sample.patient
    if KNOWN_NAMES["ChestX-ray14"].search(file):
        # File names are PATIENT_IMAGE.png, with eight digits of the patient.
        return f"chestxray14/{file[:8]}"
    has_source = sample.source and sample.source.casefold() not in COMMON_SOURCES
    unknown = sample.patient.startswith(NO_PATIENT) or _ANONYMOUS.fullmatch(sample.patient)
    if unknown or not has_source:
        return ""
    # No folder name or cell of a table has a zero byte, so two pairs never give the same name.
    return f"{sample.source}\0{sample.patient}"


def take_prints(
    images: Images, samples: Sequence[Sample], numbers: NDArray[np.int64], index_sha256: str
) -> Prints:
    """Compute the prints of M samples of shards, given by number, in threads."""
    shapes = {name: (len(numbers), *shape) for name, shape in _ROW_SHAPES.items()}
    arrays = {name: np.empty(shape, np.uint8) for name, shape in shapes.items()}

    def take(rows: range) -> int:
        for row in rows:
            sample, pixels = samples[numbers[row]], np.asarray(images[numbers[row]])
            prints = fingerprint(pixels)
            small = Image.fromarray(pixels).resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
            arrays["sha256"][row] = [*bytes.fromhex(prints.sha256)]
            arrays["phash"][row] = [*prints.phash]
            arrays["inner_phash"][row] = [*prints.inner_phash]
            arrays["thumbnails"][row] = np.asarray(small)
            arrays["flat"][row] = prints.statistics["spread"] < FLAT
            arrays["patients"][row] = [*_hashed(patient_name(sample))]
        return len(rows)

    # In blocks, because a task of its own for each image would take more time and memory.
    blocks = [range(len(numbers))[i : i + 64] for i in range(0, len(numbers), 64)]
    threads = max(1, min(NUM_THREADS, len(os.sched_getaffinity(0))))
    with (
        ThreadPoolExecutor(threads) as pool,
        progress(len(numbers), "fingerprints", "images") as bar,
    ):
        for count in pool.map(take, blocks):
            bar.update(count)
    return Prints(index_sha256, [samples[n].key for n in numbers.tolist()], **arrays)


def _hashed(patient: str) -> bytes:
    digest = hashlib.sha256(patient.encode("utf-8", "surrogateescape")).digest()
    return digest[:PATIENT_BYTES] if patient else bytes(PATIENT_BYTES)


def find_matches(images: Prints, seen: Prints) -> dict[int, Match]:
    """Find images that were seen, altered copies of seen images, and images of seen patients.

    Returns:
        The first of these matches of an image, by its position in `images`.
    """
    equal, patients = _first_rows(seen.sha256), _first_rows(seen.patients)
    # Zeros stand for unknown patients, who are not all the same one.
    patients.pop(bytes(PATIENT_BYTES), None)
    matches: dict[int, Match] = {}
    for row, (digest, patient) in enumerate(zip(images.sha256, images.patients, strict=True)):
        if (original := equal.get(digest.tobytes())) is not None:
            matches[row] = Match("equal image", seen.keys[original])
        elif (original := patients.get(patient.tobytes())) is not None:
            matches[row] = Match("same patient", seen.keys[original])
    # Images of seen patients are compared too: a copy names the very image that was seen.
    copies = _find_copies(images, seen, {r for r, m in matches.items() if m.why == "equal image"})
    return dict(sorted((matches | copies).items()))


def _first_rows(values: NDArray[np.uint8]) -> dict[bytes, int]:
    """Return the first row of each value."""
    rows: dict[bytes, int] = {}
    for row, value in enumerate(values):
        rows.setdefault(value.tobytes(), row)
    return rows


def _find_copies(images: Prints, seen: Prints, known: set[int]) -> dict[int, Match]:
    """Find altered copies among the images outside `known`, each with its nearest original."""
    rows = np.array([r for r in np.flatnonzero(images.flat == 0) if r not in known], np.int64)
    originals = np.flatnonzero(seen.flat == 0)
    candidates = find_candidates_between(
        (images.phash[rows], images.inner_phash[rows]),
        (seen.phash[originals], seen.inner_phash[originals]),
    )
    views_of = lru_cache(KEPT_IMAGES)(lambda row: views(images.thumbnails[row], BLUR_PX))
    seen_views = lru_cache(KEPT_IMAGES)(lambda original: views(seen.thumbnails[original], BLUR_PX))
    matches: dict[int, Match] = {}
    # By image, so that its views stay cached, then by distance, so that the nearest copy is named.
    nearest_first = sorted(candidates.items(), key=lambda item: (item[0][0], item[1], item[0][1]))
    with progress(len(candidates), "comparing", "pairs", show=len(candidates) > 1000) as bar:
        for (one, other), bits in nearest_first:
            row, original = int(rows[one]), int(originals[other])
            least = SAME_NEAR if bits <= NEAR_BITS else SAME
            if row not in matches and compare(views_of(row), seen_views(original)) >= least:
                matches[row] = Match("altered copy", seen.keys[original])
            bar.update()
    return matches


def write_seen(path: Path, seen: Prints) -> None:
    """Write seen.npz; the same images give the same bytes.

    Its members are stored uncompressed, so that a small file cannot expand to a huge array.
    """
    arrays = {
        "format": np.array(FORMAT, "S"),
        "index_sha256": np.array(seen.index_sha256, "S64"),
        "keys": np.array(seen.keys, "S"),
        **{name: getattr(seen, name) for name in _ROW_SHAPES},
    }
    with atomic_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)


def read_seen(path: Path) -> Prints:
    """Read seen.npz.

    Raises:
        CxrdistError: it is damaged, or not what `write_seen` writes.
    """
    with judging(path, MEND), open_regular(path, os.O_RDONLY) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return _read_prints(archive, os.fstat(file.fileno()).st_size)
        except DAMAGE as error:
            raise ValueError(f"is not what cxrdist train writes ({error!s:.150})") from error


def _read_prints(archive: zipfile.ZipFile, num_bytes: int) -> Prints:
    """Read the arrays; together they may not be larger than the file."""
    names = ("format", "index_sha256", "keys", *_ROW_SHAPES)
    sizes = [archive.getinfo(f"{name}.npy").file_size for name in names]
    # Stored members of a crafted archive may overlap: each fits into the file, but not their sum.
    if sum(sizes) > num_bytes:
        raise ValueError(f"its arrays have {sum(sizes)} bytes, the file has {num_bytes}")
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
    """Read an array of bytes or strings; its size must match its header."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    with archive.open(entry) as member:
        array = read_npy(member)
    is_text = array.dtype.kind == "S" and array.itemsize <= _MOST_KEY_BYTES
    if not (array.dtype == np.uint8 if name in _ROW_SHAPES else is_text):
        raise ValueError(f"{name} is of another type")
    return array
