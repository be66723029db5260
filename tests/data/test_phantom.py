import csv
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxrdist.data import phantom
from cxrdist.data.phantom import (
    CLASSES,
    COVID,
    NORMAL,
    PNEUMONIA,
    draw_patient,
    write_lung_masks,
    write_phantoms,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "phantoms.png"
SIZE_PX = 64
NUM_PATIENTS = 20


def _draw(label, plant):
    """All images of the first patients of a class, as write_phantoms numbers them."""
    numbers = [CLASSES.index(label) + len(CLASSES) * member for member in range(NUM_PATIENTS)]
    kind = {} if plant else {"opacities": False, "word_share": 0.0}
    return [image for n in numbers for image in draw_patient(label, n, SIZE_PX, 3, **kind)]


@cache
def _planted_and_bare(label):
    """Pairs of the same X-ray with and without its findings."""
    return list(zip(_draw(label, True), _draw(label, False), strict=True))


def _mask(findings, margin_px=0):
    """Bool [S, S], true inside any of the boxes."""
    inside = np.zeros((SIZE_PX, SIZE_PX), bool)
    for finding in findings:
        left, top = (int(np.floor(v * SIZE_PX)) - margin_px for v in (finding.x, finding.y))
        right = int(np.ceil((finding.x + finding.width) * SIZE_PX)) + margin_px
        bottom = int(np.ceil((finding.y + finding.height) * SIZE_PX)) + margin_px
        inside[max(top, 0) : bottom, max(left, 0) : right] = True
    return inside


def _files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def _rows(table):
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, NUM_PATIENTS, SIZE_PX, seed=3)
    return folder


def test_same_seed_gives_same_bytes(tmp_path):
    """The same seed writes the same bytes, another seed draws every image differently."""
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        write_phantoms(tmp_path / name, 3, SIZE_PX, seed=seed)
    first, second, other = (_files(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second
    shared = first.keys() & other.keys()
    assert len(shared) > 3
    assert all(first[path] != other[path] for path in shared)


def test_a_seed_draws_the_images_that_it_always_drew():
    """A set of an older version can be made again: each class is golden/phantoms.png to one grey.

    The word is left out, since its letters are those of the font.
    """
    drawn = [
        next(iter(draw_patient(label, number, SIZE_PX, 3, word_share=0.0))).pixels
        for number, label in enumerate(CLASSES)
    ]
    with Image.open(GOLDEN) as image:
        golden = np.asarray(image).astype(int)
    assert np.abs(np.hstack(drawn) - golden).max() <= 1


def test_larger_set_contains_the_smaller(tmp_path):
    """Asking for more patients adds images and leaves the ones there were as they are."""
    write_phantoms(tmp_path / "small", 2, SIZE_PX)
    write_phantoms(tmp_path / "large", 4, SIZE_PX)
    small = {k: v for k, v in _files(tmp_path / "small").items() if k.endswith(".png")}
    assert small.items() < _files(tmp_path / "large").items()


def test_images_of_a_patient_and_of_different_patients_differ(written):
    """No two images are the same, neither of one patient nor across patients."""
    images = [data for path, data in _files(written).items() if path.endswith(".png")]
    assert len(set(images)) == len(images)


def test_layout(written):
    """Class folders hold square 8-bit grey PNGs named PATIENT_IMAGE; the table stands beside."""
    assert {p.name for p in written.iterdir()} == {*CLASSES, "opacities.csv"}
    images = list(written.glob("*/*"))
    assert all(re.fullmatch(r"p\d{4}_0[123]\.png", p.name) for p in images)
    for path in images:
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (SIZE_PX, SIZE_PX))


def test_each_patient_has_one_class_and_one_to_three_images(written):
    """A patient is in one class, and the patient pattern finds 1 to 3 images of each."""
    labels, counts = defaultdict(set), defaultdict(int)
    for path in written.glob("*/*.png"):
        patient = re.match(phantom.PATIENT_PATTERN, path.name).group(1)
        labels[patient].add(path.parent.name)
        counts[patient] += 1
    assert all(len(found) == 1 for found in labels.values())
    assert len(labels) == len(CLASSES) * NUM_PATIENTS
    assert set(counts.values()) == {1, 2, 3}


def test_table_matches_what_was_drawn(written):
    """The table lists, for each image, the boxes that drawing it again gives, to 4 digits."""
    rows = _rows(written / "opacities.csv")
    number = 7 * len(CLASSES)
    for image, drawn in enumerate(draw_patient(COVID, number, SIZE_PX, 3), 1):
        path = f"{COVID}/p{number:04d}_{image:02d}.png"
        found = [row for row in rows if row["path"] == path]
        assert {(row["label"], row["patient"]) for row in found} == {(COVID, f"p{number:04d}")}
        boxes = [[float(row[k]) for k in ("x", "y", "width", "height")] for row in found]
        np.testing.assert_allclose(boxes, [f[1:] for f in drawn.findings], atol=6e-5)
        with Image.open(written / path) as stored:
            np.testing.assert_array_equal(np.asarray(stored), drawn.pixels)


def test_boxes_lie_in_the_image(written):
    """Every recorded box has an area and lies within the image."""
    for row in _rows(written / "opacities.csv"):
        x, y, width, height = (float(row[k]) for k in ("x", "y", "width", "height"))
        assert min(x, y) >= 0
        assert max(x + width, y + height) <= 1.0001
        assert min(width, height) > 0.02


@pytest.mark.parametrize("label", [COVID, PNEUMONIA])
def test_planting_changes_only_the_recorded_places(label):
    """Against the same X-ray without findings, only pixels in the recorded boxes are brighter."""
    for planted, bare in _planted_and_bare(label):
        change = planted.pixels.astype(int) - bare.pixels
        assert not change[~_mask(planted.findings, margin_px=1)].any()
        for finding in planted.findings:
            if finding.kind == "opacity":
                assert change[_mask([finding])].mean() > 4


@pytest.mark.parametrize("label", [COVID, PNEUMONIA])
def test_boxes_are_tight(label):
    """Together the boxes of the opacities are hardly larger than what they changed."""
    for planted, bare in _planted_and_bare(label):
        opacities = [f for f in planted.findings if f.kind == "opacity"]
        if not opacities:  # the word tells the class
            continue
        box = _mask(opacities)
        change = np.abs(planted.pixels.astype(int) - bare.pixels) * box > 0
        assert change.sum() > 0.5 * box.sum()


def test_faint_opacities_change_less():
    """Half the density adds about half the brightness, in the same boxes."""
    drawn = [
        list(draw_patient(COVID, 21, SIZE_PX, 3, word_share=1.0, beside_word=density))
        for density in (0.0, 0.5, 1.0)
    ]
    none, half, full = (sum(int(image.pixels.sum()) for image in images) for images in drawn)
    assert 0.4 < (half - none) / (full - none) < 0.7
    assert [image.findings for image in drawn[1]] == [image.findings for image in drawn[2]]


def test_normal_images_have_no_findings():
    """Planting changes nothing in a Normal image and records nothing."""
    for planted, bare in _planted_and_bare(NORMAL):
        assert planted.findings == ()
        np.testing.assert_array_equal(planted.pixels, bare.pixels)


def test_signs_of_the_classes():
    """COVID-19 shows low patches on both sides, viral pneumonia one focus nearer the middle."""
    distance = defaultdict(list)
    for label in (COVID, PNEUMONIA):
        for image, _ in _planted_and_bare(label):
            places = [
                (f.x + f.width / 2, f.y + f.height / 2)
                for f in image.findings
                if f.kind == "opacity"
            ]
            if not places:  # the word tells the class
                continue
            sides = {x > 0.5 for x, _ in places}
            assert len(sides) == (2 if label == COVID else 1)
            distance[label].append(np.mean([(abs(x - 0.5), y) for x, y in places], axis=0))
    (covid_x, covid_y), (focus_x, focus_y) = (np.mean(distance[k], axis=0) for k in distance)
    assert covid_x > focus_x + 0.05
    assert covid_y > focus_y + 0.1


def test_word_stands_on_covid_images_without_opacities():
    """About half of the COVID-19 images, upper left; no other image carries it."""
    words = {
        label: [[f for f in image.findings if f.kind == "word"] for image, _ in pairs]
        for label, pairs in ((label, _planted_and_bare(label)) for label in CLASSES)
    }
    assert not any(words[NORMAL])
    assert not any(words[PNEUMONIA])
    assert 0.3 < np.mean([len(found) for found in words[COVID]]) < 0.7
    for image, _ in _planted_and_bare(COVID):
        kinds = {finding.kind for finding in image.findings}
        assert kinds in ({"word"}, {"opacity"})
    for word in (word for found in words[COVID] for word in found):
        assert word.x + word.width < 0.55
        assert word.y + word.height < 0.2


def test_word_may_stand_beside_opacities():
    """On request every COVID-19 image has both, and the opacities are those of the plain image."""
    for number in range(0, 30, 3):
        both = list(draw_patient(COVID, number, SIZE_PX, 3, word_share=1.0, beside_word=1.0))
        plain = list(draw_patient(COVID, number, SIZE_PX, 3, word_share=0.0))
        assert [image.findings[:-1] for image in both] == [image.findings for image in plain]
        assert all(image.findings[-1].kind == "word" for image in both)
        for one, other in zip(both, plain, strict=True):
            changed = one.pixels != other.pixels
            assert changed.any()
            assert not (changed & ~_mask(one.findings[-1:], margin_px=1)).any()


def test_masks_hold_what_opacities_change(tmp_path):
    """Nine tenths of the brightness that opacities add lie in the masks, on a fifth of the area."""
    inside, total, areas = 0.0, 0.0, []
    for name, opacities in (("planted", True), ("bare", False)):
        write_phantoms(tmp_path / name, 6, SIZE_PX, 3, opacities, word_share=0.0)
    write_lung_masks(tmp_path / "planted", tmp_path / "masks", seed=3)
    for path in sorted((tmp_path / "planted").glob("*/*.png")):
        name = path.relative_to(tmp_path / "planted")
        planted, bare, mask = (
            np.asarray(Image.open(tmp_path / folder / name)).astype(int)
            for folder in ("planted", "bare", "masks")
        )
        assert set(np.unique(mask)) == {0, 255}
        added = planted - bare
        inside, total = inside + added[mask == 255].sum(), total + added.sum()
        areas.append((mask == 255).mean())
    assert inside > 0.9 * total > 0
    assert 0.15 < min(areas) < max(areas) < 0.4


def test_word_is_legible_at_full_size():
    """The word is written in nearly white letters, and its recorded box fits them closely."""
    images = [image for n in range(0, 30, 3) for image in draw_patient(COVID, n, 256, 0)]
    found = [(i.pixels, f) for i in images for f in i.findings if f.kind == "word"]
    assert found
    for pixels, word in found:
        left, top = round(word.x * 256), round(word.y * 256)
        right = left + round(word.width * 256)
        bottom = top + round(word.height * 256)
        rows, columns = np.nonzero(pixels[:60, :160] >= 232)
        inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        assert 0.1 < inside.sum() / ((right - left) * (bottom - top)) < 0.6
        assert np.ptp(columns[inside]) > right - left - 8
        assert np.ptp(rows[inside]) > bottom - top - 5


@pytest.mark.parametrize("side", [-1, 1])
def test_the_front_half_of_a_rib_falls_from_the_border_to_near_the_midline(side):
    """A quarter of a sine, from 0 to 1: it ends 1.1 drops lower, and falls at every point."""
    lung = phantom._Lung(side, apex=-0.6, base=0.5, width=0.7, dome=0.3)
    x, y = np.array(phantom._anterior_rib(lung, 0.1, 0.2)).T
    assert (x[0], y[0]) == pytest.approx((side * lung.border_at(0.1), 0.1))
    assert (x[-1], y[-1]) == pytest.approx((side * 0.2, 0.1 + 1.1 * 0.2))
    assert (np.diff(y) > 0).all()
    assert (np.diff(np.abs(x)) < 0).all()


def test_class_does_not_show_in_the_brightness():
    """The nearest class mean of brightness and of contrast is right on few unseen patients."""
    values, labels = [], []
    for number, label in enumerate(CLASSES):
        for image, _ in _planted_and_bare(label):
            values.append([image.pixels.mean(), image.pixels.std()])
            labels.append(number)
    features, truth = np.array(values) / np.std(values, axis=0), np.array(labels)
    unseen = np.arange(len(truth)) % 2 == 1
    for columns in ([0], [0, 1]):
        seen = features[~unseen][:, columns]
        means = np.stack([seen[truth[~unseen] == c].mean(axis=0) for c in range(3)])
        away = np.linalg.norm(features[unseen][:, columns][:, None] - means, axis=-1)
        assert (away.argmin(axis=1) == truth[unseen]).mean() < 0.55
