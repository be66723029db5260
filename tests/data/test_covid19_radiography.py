import os
from collections import Counter
from pathlib import Path

import pytest
from openpyxl import Workbook
from PIL import Image
from support import run_command

from cxrdist.config import PackConfig
from cxrdist.data.covid19_radiography import NAME, source_of
from cxrdist.data.sources import read_source
from cxrdist.errors import CxrdistError

KERMANY = "https://www.kaggle.com/paultimothymooney/chest-xray-pneumonia"


def write_images(folder: Path, form: str, count: int) -> None:
    """Tiny images named by a form such as ``COVID-{}.png``."""
    folder.mkdir(parents=True)
    Image.new("L", (8, 8), 90).save(folder / form.format(1))
    for number in range(2, count + 1):
        os.link(folder / form.format(1), folder / form.format(number))


def write_workbook(file: Path, rows: list[tuple[str, str]]) -> None:
    book = Workbook()
    book.active.append(["FILE NAME", "FORMAT", "SIZE", "URL"])
    for name, url in rows:
        book.active.append([name, "PNG", "1024*1024", url])
    book.save(file)


def first_release(folder: Path, covid: int = 219, normal: int = 1341, viral: int = 1345) -> Path:
    """The paper's: its workbooks write a name in their own way, one is misspelt."""
    root = folder / "COVID-19 Radiography Database"
    write_images(root / "COVID-19", "COVID-19 ({}).png", covid)
    write_images(root / "NORMAL", "NORMAL ({}).png", normal)
    write_images(root / "Viral Pneumonia", "Viral Pneumonia ({}).png", viral)
    sirm, eurorad = "https://www.sirm.org/en/category/x", "https://www.eurorad.org/case/1"
    rows = [(f"COVID-19({i})", sirm if i % 2 else eurorad) for i in range(1, covid + 1)]
    write_workbook(root / "COVID-19.metadata.xlsx", rows)
    rows = [(f"NORMAL ({i})", KERMANY) for i in range(1, normal + 1)]
    write_workbook(root / "NORMAL.metadata.xlsx", rows)
    rows = [(f"Viral Pneumonia ({i})", KERMANY) for i in range(1, viral + 1)]
    write_workbook(root / "Viral Pneumonia.matadata.xlsx", rows)
    return root


def current_release(folder: Path) -> Path:
    """A hundredth of the current one; its masks are unreadable on purpose."""
    root = folder / "COVID-19_Radiography_Dataset"
    counts = {"COVID": 36, "Normal": 102, "Lung_Opacity": 60, "Viral Pneumonia": 13}
    for name, count in counts.items():
        write_images(root / name / "images", f"{name}-{{}}.png", count)
        (root / name / "masks").mkdir()
        for number in range(1, count + 1):
            (root / name / "masks" / f"{name}-{number}.png").write_bytes(b"a mask is no X-ray")
    rsna = "https://www.kaggle.com/c/rsna-pneumonia-detection-challenge/data"
    rows = [(f"NORMAL-{i}", rsna if i <= 88 else KERMANY) for i in range(1, 103)]
    write_workbook(root / "Normal.metadata.xlsx", rows)
    rows = [(f"COVID-{i}", "https://bimcv.cipf.es/bimcv-projects/") for i in range(1, 37)]
    write_workbook(root / "COVID.metadata.xlsx", rows)
    return root


def read(folder: Path, **options: object):
    return read_source(PackConfig("covid19-radiography", folder, Path("out"), **options))


@pytest.mark.parametrize("inside", [True, False])
def test_the_first_release_has_the_papers_counts_and_sources(tmp_path, inside):
    """219 / 1341 / 1345; the sources are the workbooks', whichever folder is named."""
    root = first_release(tmp_path)
    source = read(root if inside else tmp_path)
    labels = Counter(record.label for record in source.records)
    assert labels == {"COVID-19": 219, "NORMAL": 1341, "Viral Pneumonia": 1345}
    assert source.task == "multiclass"
    assert "first release" in source.name
    sources = Counter((record.label, record.source) for record in source.records)
    assert sources == {
        ("COVID-19", "SIRM"): 110,
        ("COVID-19", "Eurorad"): 109,
        ("NORMAL", "Kermany"): 1341,
        ("Viral Pneumonia", "Kermany"): 1345,
    }
    assert len({record.patient for record in source.records}) == 2905


def test_covid_nets_unusable_numbers_are_left_out(tmp_path):
    """16 of the first release, and the option is refused for another one."""
    source = read(first_release(tmp_path, normal=3, viral=3), drop_unusable=True)
    names = {Path(r.path).name for r in source.records if r.label == "COVID-19"}
    assert len(names) == 219 - 16
    assert "COVID-19 (99).png" in names
    assert not {f"COVID-19 ({i}).png" for i in (100, 105, 110, 113, 122, 126, 217)} & names
    with pytest.raises(CxrdistError, match="drop-unusable: is for the first release"):
        read(current_release(tmp_path / "current"), drop_unusable=True)


def test_the_middle_release_is_told_by_its_folder(tmp_path):
    """COVID/COVID (1).png, without workbooks: the class tells the source."""
    for name, form, count in (
        ("COVID", "COVID ({}).png", 5),
        ("NORMAL", "NORMAL ({}).png", 4),
        ("Viral Pneumonia", "Viral Pneumonia ({}).png", 3),
    ):
        write_images(tmp_path / name, form, count)
    source = read(tmp_path)
    assert "middle release" in source.name
    assert Counter((record.label, record.source) for record in source.records) == {
        ("COVID", "COVID-19 Radiography Database"): 5,
        ("NORMAL", "Kermany"): 4,
        ("Viral Pneumonia", "Kermany"): 3,
    }


def test_of_the_current_release_only_the_images_are_read(tmp_path):
    """No mask; normals come from two sources, as the workbook says in other letters."""
    source = read(current_release(tmp_path))
    assert "current release" in source.name
    assert all(record.path.split("/")[1] == "images" for record in source.records)
    reasons = Counter(left.reason for left in source.left_out)
    assert reasons == {"lung mask": 211, "not an image": 2}
    assert source.num_found == 211 + 211 + 2
    assert Counter((record.label, record.source) for record in source.records) == {
        ("COVID", "BIMCV"): 36,
        ("Normal", "RSNA"): 88,
        ("Normal", "Kermany"): 14,
        ("Lung_Opacity", "RSNA"): 60,
        ("Viral Pneumonia", "Kermany"): 13,
    }


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://www.sirm.org/category/x", "SIRM"),
        ("https://www.radiology.example/case?id=1", "radiology.example"),
        ("http://[broken/case", "[broken"),
        ("a book", NAME),
    ],
)
def test_an_unknown_source_is_the_host_of_its_url(url, expected):
    """A malformed URL in a workbook is no error."""
    assert source_of(url) == expected


def test_what_is_no_release_is_one_line(tmp_path):
    """Another folder, an empty class, and a damaged workbook are named."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(CxrdistError, match="is not a release of the COVID-19 Radiography Database"):
        read(tmp_path / "empty")
    root = first_release(tmp_path, 3, 3, 3)
    (root / "NORMAL.metadata.xlsx").write_bytes(b"no workbook")
    with pytest.raises(CxrdistError, match=r"NORMAL\.metadata\.xlsx: is not a readable workbook"):
        read(root)
    (root / "NORMAL.metadata.xlsx").unlink()
    for file in (root / "Viral Pneumonia").iterdir():
        file.unlink()
    with pytest.raises(CxrdistError, match="Viral Pneumonia: the class has no image"):
        read(root)


def test_counts_that_are_not_the_published_ones_are_said(tmp_path):
    """A copy that lacks images is packed, and says so; the confounding is in the audit."""
    root = first_release(tmp_path, 12, 13, 14)
    done = run_command(
        *("pack", "--config", "shards/covid19-radiography-first.yaml", "--input", root),
        *("--out", tmp_path / "out", "--size", 32, "--split", "0.5/0.25/0.25"),
        *("--duplicates", "report"),
    )
    assert done.returncode == 0, done.stderr
    assert "COVID-19 has 12 images, expected 219" in done.stdout
    assert "100% of the images of COVID-19 have sources that no other image has" in done.stdout
