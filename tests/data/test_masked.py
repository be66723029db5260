"""Which mask is of which image, and what is said of the others."""

from pathlib import Path

import pytest
from PIL import Image
from test_run_lengths import row, write

from cxrdist.config import SourceConfig
from cxrdist.data.sources import read_source
from cxrdist.errors import CxrdistError


def draw(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("1", (40, 50), 1).save(file)


@pytest.fixture
def images(tmp_path) -> Path:
    """Class folders a and b with 0.jpg and 1.jpg each."""
    draw(*(tmp_path / "images" / name / f"{i}.jpg" for name in "ab" for i in range(2)))
    return tmp_path / "images"


def masks_of(source: Path, masks: Path, kind="folder", **options) -> tuple[dict[str, str], str]:
    """Names of the masks by the path of the image, and the notes."""
    found = read_source(SourceConfig(kind, source, masks=masks, **options))
    named = {r.path: r.mask and r.mask.file.relative_to(masks).as_posix() for r in found.records}
    return named, "; ".join(found.notes)


def test_a_mask_has_the_name_of_its_image_and_any_suffix(images, tmp_path):
    """What has no mask has none, and a mask of no image is said by name."""
    folder = tmp_path / "m"
    draw(folder / "a/0.png", folder / "b/1.jpg", folder / "c/7.png")
    (folder / "readme.txt").write_text("lungs")
    named, notes = masks_of(images, folder)
    assert named == {"a/0.jpg": "a/0.png", "a/1.jpg": None, "b/0.jpg": None, "b/1.jpg": "b/1.jpg"}
    assert notes == "1 of 3 masks match no image, the first is c/7.png"


def test_masks_beside_the_classes_are_no_class(images):
    """A folder of masks within the source is not searched for images."""
    folder = images / "lungs"
    draw(folder / "a/0.png", folder / "b/0.png")
    source = read_source(SourceConfig("folder", images, masks=folder))
    assert source.classes == ["a", "b"]
    assert (len(source.records), source.num_found) == (4, 4)
    assert sum(record.mask is not None for record in source.records) == 2


@pytest.mark.parametrize("above", [False, True], ids=["the release", "the folder above it"])
def test_the_masks_of_the_radiography_database_are_found_beside_its_images(
    tmp_path, monkeypatch, above
):
    """masks/ in place of images/ in the path; --masks and --input are one folder."""
    root = tmp_path / "COVID-19_Radiography_Dataset"
    for name in ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"):
        draw(root / name / "images" / f"{name}-1.png", root / name / "masks" / f"{name}-1.png")
    draw(root / "COVID" / "masks" / "COVID-2.png")
    folder = tmp_path if above else root
    monkeypatch.chdir(folder)  # the same folder by another name
    named, notes = masks_of(Path(), folder, "covid19-radiography")
    start = f"{root.name}/" if above else ""
    expected = {path: start + path.replace("images", "masks") for path in named}
    assert len(named) == 4
    assert named == expected
    stray = f"{start}COVID/masks/COVID-2.png"
    assert notes == f"1 of 5 masks match no image, the first is {stray}"


def test_a_table_of_run_lengths_names_its_images_by_the_end_of_their_paths(images, tmp_path):
    """Below a Dice of 0.7 a mask is left out, as its authors advise."""
    rows = [row("a/0.jpg"), row("b/1.png", mean="0.69"), row("b/0.jpg", mean="0.7"), row("z.jpg")]
    table = write(tmp_path / "t.csv", rows, "Path")
    source = read_source(SourceConfig("folder", images, masks=table))
    assert {r.path for r in source.records if r.mask} == {"a/0.jpg", "b/0.jpg"}
    assert all(record.mask.num_bytes for record in source.records if record.mask)
    assert source.notes == (
        "1 masks have a Dice RCA below 0.7 and are left out",
        f"1 of 3 masks match no image, the first is {table} row 5 (z.jpg)",
    )


def no_folder(images, folder):
    pass


def none_fits(images, folder):
    draw(folder / "c" / "0.png")


def ambiguous(images, folder):
    draw(folder / "0.png")


def of_three(images, folder):
    draw(images / "c" / "0.jpg", folder / "0.png")


def two(images, folder):
    draw(folder / "a/0.png", folder / "a/0.gif")


def outside(images, folder):
    draw(folder / "x.png")
    (folder / "x.png").rename(folder.parent / "x.png")
    (folder / "a").symlink_to(folder)


def poor(images: Path, masks: Path) -> None:
    write(masks, [row("a/0.png", mean="0.3")])


def strange(images: Path, masks: Path) -> None:
    write(masks, [row("z.png")])


REFUSED = {
    "no folder": (no_folder, "no such folder or table"),
    "none fits": (none_fits, r"none of its 1 masks .* like a/0\.png, found c/0\.png"),
    "of two images": (ambiguous, r"0\.png matches both a/0\.jpg and b/0\.jpg"),
    "of three images": (of_three, r"0\.png matches both a/0\.jpg and b/0\.jpg"),
    "two masks": (two, r"a/0\.gif and a/0\.png both match a/0\.jpg; remove one"),
    "a poor table": (poor, r"0 masks .* found nothing; 1 masks have a Dice RCA below 0\.7"),
    "a table of others": (strange, r"found .*m row 2 \(z\.png\)"),
    "links in a circle": (outside, "none of its 0 masks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_masks_that_are_of_no_image_or_of_several_are_refused(images, tmp_path, case):
    """One line with the option and what was expected."""
    make, problem = REFUSED[case]
    make(images, tmp_path / "m")
    with pytest.raises(CxrdistError, match=rf"^--masks.*{problem}") as caught:
        read_source(SourceConfig("folder", images, masks=tmp_path / "m"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"), [("more", "none of its 0 masks"), ("masks", "masks, which are no X-rays")]
)
def test_images_are_no_masks_of_themselves(images, name, message):
    """--masks INPUT where masks/ is missing, or is within a class."""
    draw(images / "a" / name / "2.jpg")
    with pytest.raises(CxrdistError, match=message):
        read_source(SourceConfig("folder", images, masks=images))
