"""Squares: decoded and encoded images, kept on disk until they are packed into shards.

A pack decodes its records in parts of `PART_SIZE`. Each part is a file NNNNNN.squares: a line of
JSON that describes each image, then the PNGs and thumbnails, image by image. A part is written
atomically. A killed pack resumes with the missing parts, and the tasks of a SLURM array make parts
in parallel.

Images that do not declare their bit depth are first scaled by the bits that each uses. Once all
are decoded, the depth of the source is known, and images scaled by another one are decoded again.

An image with burned-in text to cover has two PNGs, original and covered: its split decides which
one is used, and the splits are drawn once all images are decoded. Its mask is a third PNG.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pebble import ProcessPool
from PIL import Image

from cxrdist.data.anonymise import keyed, shared_key
from cxrdist.data.fingerprint import THUMBNAIL_PX, Fingerprint, fingerprint, shrink
from cxrdist.data.images import decode, encode_png
from cxrdist.data.pictures import Picture
from cxrdist.data.records import Record
from cxrdist.data.workers import Job, Step, image_workers, schedule
from cxrdist.errors import CxrdistError
from cxrdist.files import atomic_file

# Another size makes unfinished packs unreadable: a part is known by its number.
PART_SIZE = 128
# Images sent to a worker at once. They share one SECONDS_PER_IMAGE, and are tried one by one if it
# is not enough (`cxrdist.data.workers.Job`).
CHUNK = 16
# Size and time of change (ns) of a record's file, and of its mask file if it has one.
State = tuple[int, ...]
Encoded = tuple["Square", bytes]  # a square, and its PNGs and thumbnails
Decoded = tuple[Record, Picture]
Pending = tuple[list[State], Job[Record, Encoded]]
NO_FINGERPRINT = Fingerprint("", b"", b"", {})  # of what could not be decoded
Kept = dict[int, Encoded]  # squares that need no decoding, by position of the record
NOT_STORED = ("record", "covered", "part", "first_byte")  # whoever reads a part knows them
THUMBNAIL_BYTES = THUMBNAIL_PX**2
PARTS_AHEAD = 4  # parts submitted to the workers before the first of them is written


@dataclass(frozen=True)
class Square:
    """A decoded record, without its pixels; facts that are not listed here are those of `Picture`.

    Attributes:
        record: what was decoded.
        state: state of its files when they were read.
        reason: why it cannot be used, without its name; if empty, the fields below are known.
        png_bytes: length of its PNG in the part's file.
        fingerprint: fingerprint of the pixels.
        patient: the DICOM patient under the pack's key (`keyed`), or empty.
        covered_bytes: length of the PNG with burned-in text covered, 0 if nothing is to be covered.
        covered_fingerprint: fingerprint of the pixels with burned-in text covered.
        depth: bit depth that it was scaled by if its file declares none, else None.
        mask_bytes: length of the PNG of its mask, 0 without one.
        mask_sha256: hash of the mask's pixels, empty without one.
        mask_share: share of the square that the mask covers.
        covered: whether the square with burned-in text covered is the one to use.
        part: number of the part that holds it.
        first_byte: where its PNG starts in the part's file.
    """

    record: Record
    state: State = ()
    reason: str = ""
    png_bytes: int = 0
    fingerprint: Fingerprint = NO_FINGERPRINT
    width_px: int = 0
    height_px: int = 0
    patient: str = ""
    view: str | None = ""
    covered_bytes: int = 0
    covered_fingerprint: Fingerprint | None = None
    sex: str = ""
    age: float | None = None
    used_depth: int | None = None
    depth: int | None = None
    mask_bytes: int = 0
    mask_sha256: str = ""
    mask_share: float = 0.0
    covered: bool = False
    part: int = 0
    first_byte: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the PNG, the covered PNG, the mask, the thumbnail and the covered one."""
        of_pngs = self.png_bytes, self.covered_bytes, self.mask_bytes
        return *of_pngs, *(THUMBNAIL_BYTES * (png > 0) for png in of_pngs[:2])

    def cover(self) -> "Square":
        """Return the square with its burned-in text covered, if it has any."""
        if self.covered_fingerprint is None:
            return self
        return replace(self, covered=True, fingerprint=self.covered_fingerprint)

    def png(self, directory: Path) -> bytes:
        """Read its PNG from the local directory of the parts."""
        return self._read(directory, int(self.covered))

    def mask(self, directory: Path) -> bytes:
        """Read the PNG of its mask, empty without one."""
        return self._read(directory, 2)

    def thumbnail(self, directory: Path) -> NDArray[np.uint8]:
        """Read its thumbnail, uint8 [THUMBNAIL_PX, THUMBNAIL_PX]."""
        data = self._read(directory, 3 + int(self.covered))
        return np.frombuffer(data, np.uint8).reshape(THUMBNAIL_PX, THUMBNAIL_PX)

    def _read(self, directory: Path, number: int) -> bytes:
        """Read the bytes that one of `lengths` counts."""
        lengths = self.lengths
        if not lengths[number]:
            return b""  # most images have no mask
        with open(part_file(directory, self.part), "rb") as file:
            file.seek(self.first_byte + sum(lengths[:number]))
            return file.read(lengths[number])

    def is_scaled_by(self, depth: int | None) -> bool:
        """Return whether decoding by a depth would give the same square; None is its own depth."""
        return self.used_depth is None or self.depth == (depth or self.used_depth)


@dataclass(frozen=True)
class Part:
    """Records that are decoded together; `number` names their file."""

    number: int
    records: Sequence[Record]


def plan_parts(records: Sequence[Record]) -> list[Part]:
    """Divide records into parts; the same records always give the same parts."""
    starts = range(0, len(records), PART_SIZE)
    return [Part(i, records[start : start + PART_SIZE]) for i, start in enumerate(starts)]


def make_squares(
    parts: Sequence[Part],
    directory: Path,
    size_px: int,
    fit: str,
    workers: int | None,
    cover: str = "black",
    depth: int | None = None,
) -> Iterator[int]:
    """Decode the parts in worker processes; images that crash or hang one get a `Square.reason`.

    In a part that already exists, only images are decoded again that could not be read or were
    scaled by another depth. The directory, local or an fsspec path, gets the parts' files; the
    pack's key is next to it. Workers are those of `image_workers`, all other options of `decode`.

    Yields:
        The number of decoded images of each part, once it is written.
    """
    key = shared_key(directory.parent)
    steps = (
        partial(_decode, size_px=size_px, fit=fit, cover=cover, depth=depth),
        _encode,
        partial(_describe, depth=depth, key=key),
    )
    with image_workers(workers, [__name__]) as pool:
        waiting: deque[tuple[Part, Kept, list[Pending]]] = deque()
        for part in parts:
            kept = _keep(directory, part, depth)
            waiting.append((part, kept, _submit(_without(part, kept), pool, steps)))
            if len(waiting) > PARTS_AHEAD:
                yield _write_part(directory, *waiting.popleft())
        while waiting:
            yield _write_part(directory, *waiting.popleft())


def _keep(directory: Path, part: Part, depth: int | None) -> Kept:
    """Return the squares of a part that need not be decoded again, by position of the record."""
    path = part_file(directory, part.number)
    if not path.is_file():
        return {}
    data = path.read_bytes()
    head = data[: data.find(b"\n") + 1]
    return {
        i: (square, data[square.first_byte : square.first_byte + sum(square.lengths)])
        for i, square in enumerate(_squares(path, part, head, len(data)))
        if not square.reason and square.is_scaled_by(depth)
    }


def _without(part: Part, kept: Kept) -> Part:
    """Return the part with only the records that must be decoded."""
    return replace(part, records=[r for i, r in enumerate(part.records) if i not in kept])


def _submit(part: Part, pool: ProcessPool, steps: Sequence[Step]) -> list[Pending]:
    """Submit a part to the workers.

    The state of a file is taken before it is read, so that a change meanwhile is noticed.
    """
    chunks = [part.records[i : i + CHUNK] for i in range(0, len(part.records), CHUNK)]
    return [([file_state(r) for r in chunk], schedule(pool, steps, chunk)) for chunk in chunks]


def _decode(record: Record, size_px: int, fit: str, cover: str, depth: int | None) -> Decoded:
    """Decode an image; with its lungs alone if the record asks for them."""
    decoded = decode(record.file, size_px, fit, record.boxes, cover, depth, record.mask)
    return record, _lungs_alone(record, decoded) if record.lungs_only else decoded


def _encode(decoded: Decoded) -> tuple[Decoded, list[bytes]]:
    """Encode its square, the square with text covered and the mask; what it lacks is empty."""
    images = decoded[1].pixels, decoded[1].covered, decoded[1].mask
    return decoded, [b"" if image is None else encode_png(image) for image in images]


def _describe(encoded: tuple[Decoded, list[bytes]], depth: int | None, key: bytes) -> Encoded:
    """Describe a decoded image, and add the thumbnails to its PNGs."""
    (record, decoded), pngs = encoded
    mask = decoded.mask
    png_bytes, covered_bytes, mask_bytes = map(len, pngs)
    square = Square(
        record=record,
        png_bytes=png_bytes,
        covered_bytes=covered_bytes,
        fingerprint=fingerprint(decoded.pixels),
        covered_fingerprint=None if decoded.covered is None else fingerprint(decoded.covered),
        width_px=decoded.width_px,
        height_px=decoded.height_px,
        patient=keyed(key, decoded.patient) if decoded.patient else "",
        view=decoded.view,
        sex=decoded.sex,
        age=decoded.age,
        used_depth=decoded.used_depth,
        depth=None if decoded.used_depth is None else depth or decoded.used_depth,
        mask_bytes=mask_bytes,
        mask_sha256="" if mask is None else hashlib.sha256(mask.tobytes()).hexdigest(),
        mask_share=0.0 if mask is None else float(np.mean(mask > 0)),
    )
    images = (image for image in (decoded.pixels, decoded.covered) if image is not None)
    # In the order of `Square.lengths`.
    return square, b"".join([*pngs, *(shrink(image).tobytes() for image in images)])


def _lungs_alone(record: Record, decoded: Picture) -> Picture:
    """Make everything outside the mask black; it is an error if the mask covers nothing."""
    mask = decoded.mask
    if mask is None or not mask.any():
        raise CxrdistError(f"{record.file}: its mask covers nothing of the square")
    image, covered = Image.fromarray(decoded.pixels & mask), decoded.covered
    return replace(decoded, image=image, covered=None if covered is None else covered & mask)


def _unnamed(file: Path, error: CxrdistError) -> str:
    """Return the message without the file's name, which may identify a patient."""
    return str(error).removeprefix(f"{file}: ").replace(str(file), "the file")


def _write_part(directory: Path, part: Part, kept: Kept, pending: list[Pending]) -> int:
    """Write the file of a part when its images are done; return how many were decoded."""
    records = _without(part, kept).records
    states = [state for known, _ in pending for state in known]
    results = [result for _, job in pending for result in job.results()]
    decoded = (
        (Square(record, state, _unnamed(record.file, result)), b"")
        if isinstance(result, CxrdistError)
        else (replace(result[0], state=state), result[1])
        for record, state, result in zip(records, states, results, strict=True)
    )
    squares = [kept[i] if i in kept else next(decoded) for i in range(len(part.records))]
    rows = json.dumps([_row(square) for square, _ in squares], default=bytes.hex).encode()
    with atomic_file(part_file(directory, part.number)) as file:
        file.write_bytes(b"".join([rows, b"\n", *(content for _, content in squares)]))
    return len(records)


def _row(square: Square) -> dict[str, Any]:
    """Return a square for JSON; `dataclasses.asdict` would copy deeply, a tenth of all the work."""
    row = {name: value for name, value in vars(square).items() if name not in NOT_STORED}
    prints = {name: vars(v) for name, v in row.items() if isinstance(v, Fingerprint)}
    return {"path": square.record.path, **row, **prints}


def part_file(directory: Path, number: int) -> Path:
    """Return the file of a part."""
    return directory / f"{number:06d}.squares"


def file_state(record: Record) -> State:
    """Return the state of a record's files; a missing one is reported later, when it is read."""
    mask = () if record.mask is None else (record.mask.file,)
    return tuple(number for file in (record.file, *mask) for number in _state(file))


def _state(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except FileNotFoundError:
        return -1, -1
    return status.st_size, getattr(status, "st_mtime_ns", int(status.st_mtime * 1e9))


def read_part(directory: Path, part: Part, *, redo_bad: bool) -> list[Square] | None:
    """Return the squares of a part; None if the part must still be made.

    With ``redo_bad`` a part is made again if one of its unreadable files was changed.

    Raises:
        CxrdistError: a file was changed since it was read.
    """
    path = part_file(directory, part.number)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        head = file.readline()
        squares = _squares(path, part, head, path.stat().st_size)
    for square in squares:
        state = file_state(square.record)
        if state != square.state:
            if square.reason and redo_bad:
                return None
            # The first two numbers are those of the image, the others those of its mask.
            whose = "its mask " if state[:2] == square.state[:2] else ""
            raise CxrdistError(
                f"{square.record.file}: {whose}was changed after this pack started; restore it, or "
                f"remove {directory.parent} to start over"
            )
    return squares


def _squares(path: Path, part: Part, head: bytes, num_bytes: int) -> list[Square]:
    """Parse the squares of a part from the first line of its file, with the line feed.

    It is an error if another version of cxrdist wrote the file, or if it is damaged.
    """
    try:
        squares, start = [], len(head)
        for record, row in zip(part.records, json.loads(head), strict=True):
            if row.pop("path") != record.path:
                raise ValueError("lists other images")
            squares.append(_square(record, part.number, start, row))
            start += sum(squares[-1].lengths)
        if start != num_bytes:
            raise ValueError("holds other bytes than its first line says")
        return squares
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CxrdistError(
            f"{path}: is damaged, or was written by another version of cxrdist; remove "
            f"{path.parent.parent} to start over"
        ) from error


def _square(record: Record, part: int, first_byte: int, row: dict[str, Any]) -> Square:
    for name in ("fingerprint", "covered_fingerprint"):
        fields = row[name]
        if fields is not None:
            hashes = {name: bytes.fromhex(fields[name]) for name in ("phash", "inner_phash")}
            row[name] = Fingerprint(**{**fields, **hashes})
    row["state"] = tuple(row["state"])
    return Square(record=record, part=part, first_byte=first_byte, **row)
