"""What a run keeps of its images: copies are found, strangers are not, damage is refused."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from cxrdist.data.images import decode
from cxrdist.data.index import Sample
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.seen import (
    PATIENT_BYTES,
    Prints,
    find_matches,
    patient_name,
    read_seen,
    take_prints,
    write_seen,
)

SIZE_PX = 224
NUM_SEEN, NUM_OTHERS, NUM_COPIED = 80, 60, 20


def prints_of(squares: list[np.ndarray], patients: list[str] | None = None) -> Prints:
    """Prints of squares; each image is a patient of its own unless patients are given."""
    samples = [
        Sample(f"k{i}", "test", "s", "a", p, "clinic", f"{i}.png", "0" * 64)
        for i, p in enumerate(patients or [f"image:{i}" for i in range(len(squares))])
    ]
    return take_prints(np.stack(squares), samples, np.arange(len(squares)), "ab" * 32)


def alter(image: Image.Image, kind: str) -> Image.Image:
    """A copy as others hand it on, stored as JPEG."""
    if kind in ("cropped", "all"):
        left, top = round(0.03 * image.width), round(0.03 * image.height)
        image = image.crop((left, top, image.width - left, image.height - top))
    if kind in ("scaled", "all"):
        image = image.resize((round(0.7 * image.width), round(0.7 * image.height)))
    if kind == "squared":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((256, 256))
    if kind == "all":
        image = ImageEnhance.Brightness(image).enhance(1.1)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60 if kind in ("encoded", "all") else 90)
    return Image.open(buffer)


def test_planted_copies_of_real_xrays_are_found_and_others_are_not(real_data, tmp_path):
    """All copies of 20 X-rays in five ways; of more than 12,000 different pairs not one."""
    every = sorted((real_data / "nih14" / "images").glob("*.jpg"))
    files = [every[i] for i in np.random.default_rng(0).permutation(len(every))]
    files = files[: NUM_SEEN + NUM_OTHERS]
    squares = [decode(file, SIZE_PX, "crop").pixels for file in files]
    seen = prints_of(squares[:NUM_SEEN])
    copies, of = [], []
    for number in range(NUM_COPIED):
        with Image.open(files[number]) as original:
            grey = original.convert("L")
        for kind in ("encoded", "scaled", "cropped", "squared", "all"):
            alter(grey, kind).save(path := tmp_path / f"{number}.{kind}.png")
            copies.append(decode(path, SIZE_PX, "crop").pixels)
            of.append(f"k{number}")
    found = find_matches(prints_of([*copies, *squares[NUM_SEEN:], squares[7]]), seen)
    assert [found[row].of for row in range(len(copies))] == of
    assert {found[row].why for row in range(len(copies))} == {"altered copy"}
    # The others: not one of (60 + 20 x 5) x 80 pairs that are no copies.
    assert {*found} == {*range(len(copies)), len(copies) + NUM_OTHERS}
    assert found[len(copies) + NUM_OTHERS] == ("equal image", "k7")


def test_flat_squares_are_seen_only_when_they_are_equal():
    """Black squares with another speck each have like hashes and are other images."""
    squares = np.zeros((6, 64, 64), np.uint8)
    for place, square in enumerate(squares):
        square[place, place] = 5
    found = find_matches(prints_of([squares[0], *squares[3:]]), prints_of([*squares[:3]]))
    assert found == {0: ("equal image", "k0")}


def test_images_of_a_seen_patient_are_found_and_unknown_patients_are_nobody():
    """Another image of a patient counts; two images without a patient are not of one patient."""
    random = np.random.default_rng(1)
    noise = [*random.integers(0, 256, (5, 48, 48), dtype=np.uint8)]
    seen = prints_of(noise[:2], ["7", "image:x"])
    found = find_matches(prints_of(noise[2:], ["8", "7", "image:x"]), seen)
    assert found == {1: ("same patient", "k0")}


@pytest.mark.parametrize(
    ("patient", "source", "path", "expected"),
    [
        ("00000013", "ChestX-ray14", "00000013_005.png", "chestxray14/00000013"),
        ("RSNA/00000013", "RSNA", "a/b.dcm", "chestxray14/00000013"),
        ("chestxray14/00000013", "RSNA", "rsna/b.dcm", "chestxray14/00000013"),
        ("image:Normal/00000013_005.jpg", "x", "Normal/00000013_005.jpg", "chestxray14/00000013"),
        ("1", "St. Mary", "1.png", "St. Mary\x001"),
        ("1", "images", "1.png", ""),
        ("1", "", "1.png", ""),
        ("image:1.png", "St. Mary", "1.png", ""),
        ("patient-0123456789abcdef0123", "source-1", "1f.png", ""),
    ],
)
def test_patients_are_compared_within_a_source_or_by_the_numbers_of_the_nih(
    patient, source, path, expected
):
    """Patient 1 of another hospital is another person; ChestX-ray14's numbers are everywhere."""
    sample = Sample("k", "test", "s", "a", patient, source, path, "0" * 64)
    assert patient_name(sample) == expected


def some_prints(num: int = 3) -> Prints:
    random = np.random.default_rng(2)
    return prints_of([*random.integers(0, 256, (num, 40, 40), dtype=np.uint8)], ["1", "2", "3"])


def test_what_is_written_is_read_back_and_is_the_same_bytes(tmp_path):
    """Two files of the same images are equal; patients are there only as hashes."""
    prints = some_prints()
    write_seen(tmp_path / "a.npz", prints)
    write_seen(tmp_path / "b.npz", prints)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert b"clinic" not in (tmp_path / "a.npz").read_bytes()
    found = read_seen(tmp_path / "a.npz")
    assert (found.keys, found.index_sha256) == (prints.keys, prints.index_sha256)
    for name in ("sha256", "phash", "inner_phash", "thumbnails", "flat", "patients"):
        assert np.array_equal(getattr(found, name), getattr(prints, name))
    assert found.patients.shape == (3, PATIENT_BYTES)


def test_a_file_has_at_most_1800_bytes_per_image(tmp_path):
    """180 MB for 100,000 images."""
    random = np.random.default_rng(2)
    squares = [*random.integers(0, 256, (200, 40, 40), dtype=np.uint8)]
    write_seen(tmp_path / "seen.npz", prints_of(squares))
    assert (tmp_path / "seen.npz").stat().st_size < 200 * 1800 + 2500


def header_of(shape: tuple[int, ...], kind: str = "|u1") -> bytes:
    header = io.BytesIO()
    about = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, about)
    return header.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "method"),
    [
        ("phash", header_of((3, 32)) + bytes(95), zipfile.ZIP_STORED),
        ("phash", header_of((1 << 40, 32)), zipfile.ZIP_STORED),
        ("phash", header_of((3, 33)) + bytes(99), zipfile.ZIP_STORED),
        ("phash", header_of((3, 32))[:10] + b"(((".ljust(118) + bytes(96), zipfile.ZIP_STORED),
        ("phash", header_of((3, 32), "|O") + bytes(96), zipfile.ZIP_STORED),
        ("thumbnails", header_of((3, 40, 40)) + bytes(4800), zipfile.ZIP_DEFLATED),
        ("keys", header_of((3,), "|S9") + b"../../etc" * 3, zipfile.ZIP_STORED),
        ("format", header_of((), "|S14") + b"cxrdist-seen-2", zipfile.ZIP_STORED),
        ("sha256", None, zipfile.ZIP_STORED),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, name, content, method):
    """Sizes are checked before anything is allocated, and nothing compressed is unpacked."""
    write_seen(tmp_path / "good.npz", some_prints())
    path = tmp_path / "seen.npz"
    with zipfile.ZipFile(tmp_path / "good.npz") as good, zipfile.ZipFile(path, "w") as bad:
        for entry in good.infolist():
            if entry.filename != f"{name}.npy":
                bad.writestr(entry, good.read(entry))
        if content is not None:
            bad.writestr(f"{name}.npy", content, method)
    with pytest.raises(CxrdistError, match=r"seen.npz: is not what cxrdist train writes"):
        read_seen(path)


def test_a_cut_file_is_refused(tmp_path: Path):
    """A copy that broke off is no zip."""
    write_seen(tmp_path / "seen.npz", some_prints())
    data = (tmp_path / "seen.npz").read_bytes()
    (tmp_path / "seen.npz").write_bytes(data[:-40])
    with pytest.raises(CxrdistError, match="copy the run directory again"):
        read_seen(tmp_path / "seen.npz")
