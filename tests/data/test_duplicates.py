import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from support import run_measured

from cxrdist.data import duplicates
from cxrdist.data.duplicates import (
    MOST_BITS,
    SAME,
    Duplicates,
    compare,
    find_duplicates,
    join_groups,
    views,
)
from cxrdist.data.fingerprint import fingerprint
from cxrdist.data.images import decode, encode_png
from cxrdist.data.phantom import write_phantoms

SIZE_PX = 224


def altered(file: Path, folder: Path) -> Path:
    """A copy with 3 % cut from each side, scaled by 0.7, 10 % brighter, stored as JPEG 60."""
    with Image.open(file) as image:
        grey = image.convert("L")
    width, height = grey.size
    left, top = round(0.03 * width), round(0.03 * height)
    inside = grey.crop((left, top, width - left, height - top))
    smaller = inside.resize((round(0.7 * inside.width), round(0.7 * inside.height)))
    folder.mkdir(exist_ok=True)
    copy = folder / f"{file.stem}.jpg"
    ImageEnhance.Brightness(smaller).enhance(1.1).save(copy, quality=60)
    return copy


def squares_of(files: list[Path]) -> list[np.ndarray]:
    return [decode(file, SIZE_PX, "crop").pixels for file in files]


def duplicates_of(squares: list[np.ndarray]):
    return find_duplicates([fingerprint(pixels) for pixels in squares], squares.__getitem__)


def test_altered_copies_of_real_xrays_are_found_and_other_patients_are_not(real_data, tmp_path):
    """At least 99 % of 200 copies, and at most 1 in 10,000 pairs of different patients."""
    every = sorted((real_data / "nih14" / "images").glob("*.jpg"))
    chosen = np.random.default_rng(0).choice(len(every), 200, replace=False)
    originals = [every[i] for i in sorted(chosen)]
    copies = [altered(file, tmp_path / "copies") for file in originals]
    found = duplicates_of(squares_of([*originals, *copies]))
    pairs = set(found.pairs)
    hits = sum((i, i + 200) in pairs for i in range(200))
    patients = [file.name[:8] for file in [*originals, *copies]]
    wrong = sum(patients[one] != patients[other] for one, other in pairs)
    assert hits >= 198
    different = sum(a != b for i, a in enumerate(patients) for b in patients[:i])
    assert wrong <= different / 10_000


def test_every_image_in_both_real_sets_is_found_by_its_hash(real_data):
    """covid3 and nih14 share files; the equal ones by their bytes are the equal ones found."""
    files = [
        *sorted((real_data / "covid3").glob("*/*.jpg")),
        *sorted((real_data / "nih14" / "images").glob("*.jpg")),
    ]
    content = [file.read_bytes() for file in files]
    squares = squares_of(files)
    found = duplicates_of(squares)
    groups = join_groups(range(len(files)), found.exact)
    by_bytes = [content.index(data) for data in content]
    assert groups == join_groups(by_bytes, [])
    assert all(np.array_equal(squares[one], squares[other]) for one, other in found.exact)
    assert len({f.name for f in files[:917]} & {f.name for f in files[917:]}) == 821


def test_synthetic_xrays_of_two_patients_are_not_taken_for_copies(tmp_path):
    """An altered copy of a phantom is found; images of other phantoms are other images."""
    write_phantoms(tmp_path / "phantoms", 8, image_size_px=256)
    files = sorted((tmp_path / "phantoms").glob("*/*.png"))
    copy = altered(files[0], tmp_path / "copies")
    found = duplicates_of(squares_of([*files, copy]))
    assert (0, len(files)) in found.pairs
    patients = [file.name.split("_")[0] for file in [*files, copy]]
    assert all(patients[one] == patients[other] for one, other in found.pairs)


def test_of_equal_images_each_is_paired_with_the_first():
    """Three equal images and an altered one are one group of three pairs."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (28, 28), dtype=np.uint8)
    image = np.asarray(Image.fromarray(noise).resize((SIZE_PX, SIZE_PX)))
    darker = (image * 0.9).astype(np.uint8)
    other = image[::-1].copy()
    found = duplicates_of([image, other, image.copy(), darker, image.copy()])
    assert found.exact == [(0, 2), (0, 4)]
    assert [(pair.first, pair.second) for pair in found.near] == [(0, 3)]
    assert join_groups([0, 1, 2, 3, 4], found.pairs) == [0, 1, 0, 0, 0]


def test_images_without_structure_are_only_the_same_when_they_are_equal():
    """Black and grey squares have the same hash and are not taken for copies."""
    squares = [np.full((64, 64), level, np.uint8) for level in (0, 0, 128)]
    found = duplicates_of(squares)
    assert found.exact == [(0, 1)]
    assert found.near == []


def test_views_of_many_copies_of_one_image_are_made_about_once_per_row_of_tiles(monkeypatch):
    """Of 20 copies among others, 12 views are cached: not 190 pairs with a new view each."""
    monkeypatch.setattr(duplicates, "KEPT_IMAGES", 12)
    noise = np.random.Generator(np.random.Philox(0))
    texture = np.kron(noise.integers(0, 200, (32, 32)), np.ones((2, 2)))
    squares = []
    for number in range(40):  # the copies at every second position
        other = np.kron(noise.integers(0, 200, (32, 32)), np.ones((2, 2)))
        pixels = (other if number % 2 else texture) + noise.integers(0, 20, (64, 64))
        squares.append(pixels.astype(np.uint8))
    made = []

    def pixels_of(number: int) -> np.ndarray:
        made.append(number)
        return squares[number]

    near = find_duplicates([fingerprint(pixels) for pixels in squares], pixels_of).near
    pairs = list(itertools.combinations(range(0, 40, 2), 2))
    assert [pair[:2] for pair in near] == pairs
    # 5 tiles of 4 images: each tile once for itself, and once for each tile before it.
    assert len(made) <= 20 + 4 * (5 * 4 // 2)


def test_the_correlation_is_that_of_the_best_overlay():
    """Two overlapping crops of one image correlate 1, the mirrored one does not."""
    random = np.random.default_rng(1)
    noise = Image.fromarray(random.integers(0, 256, (40, 40), dtype=np.uint8))
    large = np.asarray(noise.resize((140, 140)))
    one, other = large[4:132, 4:132], large[7:135, 2:130]
    assert compare(views(one), views(other)) == pytest.approx(1, abs=0.001)
    assert compare(views(one), views(one[:, ::-1].copy())) < SAME


@pytest.mark.parametrize("shift", [(0, 0), (5, -8), (-8, 8)])
def test_a_correlation_is_numpys_at_the_best_of_all_shifts(shift):
    """Of the inside of one view, moved by up to 8 px each way over another one of 128 px."""
    random = np.random.default_rng(4)
    blocks = np.kron(random.integers(0, 200, (40, 40)), np.ones((4, 4)))
    large = (blocks + random.integers(0, 55, blocks.shape)).astype(np.uint8)
    down, right = (16 + pixels for pixels in shift)
    noisy = (large + random.integers(0, 200, large.shape)) // 2
    one = duplicates._detail(large[16:144, 16:144], 1.0, 2.0)
    other = duplicates._detail(
        noisy[down : down + 128, right : right + 128].astype(np.uint8), 1.0, 2.0
    )
    inside = other[8:-8, 8:-8].ravel()
    every = [
        np.corrcoef(one[y : y + 112, x : x + 112].ravel(), inside)[0, 1]
        for y in range(17)
        for x in range(17)
    ]
    correlation = duplicates._correlate(duplicates._view(one), duplicates._view(other))
    assert correlation == pytest.approx(max(every), abs=1e-6)
    assert np.argmax(every) == (8 + shift[0]) * 17 + 8 + shift[1]
    assert 0.2 < correlation < 0.99


def test_groups_join_through_images_that_are_the_same():
    """Patients 0 and 2 share an image, 2 and 3 another: they are one group."""
    assert join_groups([0, 0, 1, 2, 3, 4], [(1, 3), (3, 4)]) == [0, 0, 1, 0, 0, 2]


PLANTED = f"""
import json, time
import numpy as np
from cxrdist.data.duplicates import find_candidates
random = np.random.default_rng(0)
hashes = random.integers(0, 256, (112_120, 32), dtype=np.uint8)
places = random.permutation(112_120)[:1000].reshape(500, 2)
for one, other in places:
    bits = np.unpackbits(hashes[one])
    bits[random.permutation(256)[:random.integers(0, {MOST_BITS} + 1)]] ^= 1
    hashes[other] = np.packbits(bits)
inner = random.integers(0, 256, (112_120, 32), dtype=np.uint8)
start = time.perf_counter()
found = find_candidates(hashes, inner)
seconds = time.perf_counter() - start
print(json.dumps({{
    "equal": set(found) == {{(min(p), max(p)) for p in places.tolist()}},
    "seconds": seconds,
}}))
"""


def test_500_planted_pairs_among_all_hashes_of_chestxray14_are_found():
    """All of them and no other, in less than 2 GiB."""
    done = run_measured(PLANTED)
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["equal"]
    assert done.mib < 2048
    assert result["seconds"] < 120


def test_a_png_round_trip_keeps_the_fingerprint():
    """What is packed has the fingerprint of what was decoded."""
    pixels = np.random.default_rng(2).integers(0, 256, (32, 32), dtype=np.uint8)
    with Image.open(io.BytesIO(encode_png(pixels))) as image:
        assert fingerprint(np.asarray(image)) == fingerprint(pixels)


def test_flat_squares_are_no_copies_of_each_other_unless_equal():
    """Black squares with a few noisy pixels: all hashes are near, and none is compared."""
    squares = np.zeros((400, 64, 64), np.uint8)
    for place, square in enumerate(squares[:-1]):
        square[place // 64, place % 64] = 5
    squares[-1] = squares[0]
    prints = [fingerprint(square) for square in squares]
    found = find_duplicates(prints, lambda place: pytest.fail("a flat square was compared"))
    assert found == Duplicates([(0, 399)], [])
