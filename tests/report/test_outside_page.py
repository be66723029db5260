"""What the report says of where the relevance lies, and of the randomisation test."""

import csv
import json
from pathlib import Path

import pytest
from markupsafe import escape
from PIL import Image

from cxrdist.config import ReportConfig
from cxrdist.explain.description import read_description
from cxrdist.report.files import read_relevance
from cxrdist.report.html import report
from cxrdist.run import RunDirectory


def region(share: float, low: float, high: float, area: float) -> dict:
    """A region of relevance.json, of 30 images."""
    found = {"images": 30, "patients": 28, "area": area, "share": share}
    found |= {"share_interval": [low, high], "peaks": 0.7, "peaks_interval": [0.5, 0.8]}
    return found


def described(run: Path, border: dict) -> dict:
    """Write relevance.json with a share in the border, and give it back."""
    corners = region(0.05, 0.02, 0.09, 0.16)
    row = {"images": 30, "patients": 28, "regions": {"border": border, "corners": corners}}
    alike = {"alike": 0.9, "alike_interval": [0.8, 0.95], "alike_area": 0.031}
    intervals = {"method": "m", "level": 0.95, "replicates": 2000, "seed": 0}
    intervals |= {"patients": 28, "unit": "patient"}
    maps = {"class_map": {"spearman": 0.99, "pearson": 0.987}}
    maps |= {"contrast": {"spearman": 0.2, "pearson": 0.123}}
    blocks = (["head"], ["denseblock4", "head"], ["stem", "denseblock4", "head"])
    info = json.loads((run / "test" / "relevance.json").read_text())
    info["outside"] = {"all": row, "classes": {"COVID-19": row | alike}, "intervals": intervals}
    drawn = [{"blocks": names, **maps} for names in blocks]
    info["randomisation"] = {"images": 8, "drawn": drawn}
    (run / "test" / "relevance.json").write_text(json.dumps(info))
    return info


def page_of(run: Path) -> str:
    """The text of the report with single spaces."""
    page = report(ReportConfig(run)).read_text(encoding="utf-8")
    return " ".join(page.replace("\N{NO-BREAK SPACE}", " ").split())


def test_relevance_above_chance_stands_in_the_verdict(run: Path) -> None:
    """Share, interval, area, images, patients; not a share whose interval holds the area."""
    described(run, region(0.521, 0.47, 0.57, 0.36))
    (run / "test" / "mean_maps").mkdir()
    Image.new("RGB", (64, 64)).save(run / "test" / "mean_maps" / "COVID-19.png")
    page = page_of(run)
    assert (
        "52.1 % of the relevance lies in the outer tenth of the images (95 % interval 47.0 % to "
        "57.0 %), and the largest one in 70.0 % of the images. By chance it would be 36.0 %, the "
        "share of the area (30 explained images of 28 patients)." in page
    )
    assert "in their corners (95 %" not in page
    assert "Mean map of <b>COVID-19</b>, 30 images of 28 patients" in page
    described(run, region(0.38, 0.35, 0.42, 0.36))
    assert "in the outer tenth of the images (95 %" not in page_of(run)
    described(run, region(0.521, 0.47, 0.57, 0.36) | {"images": 1, "patients": 1})
    assert "(1 explained image of 1 patient)." in page_of(run)


def test_the_report_says_which_map_moves(run: Path) -> None:
    """The similarities stand where the maps are shown, and what they mean for a class's map."""
    described(run, region(0.3, 0.2, 0.4, 0.36))
    page = page_of(run)
    assert "<b>0.987</b>" in page
    assert "<b>0.123</b>" in page
    assert "The map of a class hardly depends on these blocks" in page


def test_the_contrast_comes_first(run: Path) -> None:
    """In the gallery and in the mistakes; in the table of the ledger it has no row."""
    table = run / "test" / "relevance.csv"
    with open(table, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    key, *numbers = rows[0][0], *rows[0][2:]
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([header, *rows, [key, "COVID-19 minus NORMAL", *numbers]])
    found = read_relevance(RunDirectory(run), "test", ["NORMAL", "COVID-19", '<b>&"'])
    assert [item.is_contrast for item in found[key]] == [False, False, False, True]
    page = page_of(run)
    shown = page.split(f'alt="Heat map of {escape(key)} for ')[1:]
    assert shown
    assert shown[0].startswith("COVID-19 minus NORMAL")
    assert '<th scope="row" class="name">COVID-19 minus NORMAL' not in page


def test_older_documents_are_read(run: Path) -> None:
    """Before it had a format, relevance.json called pixel flipping a sanity check."""
    path = run / "test" / "relevance.json"
    info = json.loads(path.read_text())
    tests = {name: info[name] for name in ("ledger_residual", "pixel_flipping")}
    path.write_text(json.dumps({"how": info["how"], "sanity": tests}))
    found = read_description(path, "")
    assert found == info
    assert "<b>0.625</b>" in page_of(run)
    path.write_text(json.dumps({"how": info["how"], "sanity": None}))
    assert read_description(path, "")["pixel_flipping"] is None


@pytest.mark.parametrize("share", [1.5, None, "much"])
def test_impossible_shares_are_refused(run: Path, share: object) -> None:
    """In one line with the place in the document."""
    described(run, region(0.3, 0.2, 0.4, 0.36) | {"share": share})
    with pytest.raises(ValueError, match=r"outside.all.regions.border.share"):
        page_of(run)
