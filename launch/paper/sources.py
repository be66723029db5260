"""Tables that `cxrdist pack` reads, made from the folders of launch/paper.sh.

Images stay where they are: beside each table is a link to their folder.
"""

import argparse
import csv
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from cxrdist.data.chestxray14 import read_chestxray14
from cxrdist.data.index import read_index
from cxrdist.data.patients import age_of
from cxrdist.errors import CxrdistError
from cxrdist.files import write_table, write_text

ABOUT = ("path", "patient", "age", "sex", "view")
ADULT_YEARS = 18
DAY = re.compile(r"[-_]?day[-_]?\d+.*")  # follows a name that all days of a patient share
NIH_NAME = re.compile(r"(\d{8})_\d{3}")


def findings(data: Path, folder: Path) -> None:
    """ChestX-ray14's labels of nih14 and adult_normal, for the 14-label stage."""
    rows = read_rows(data / "adult_normal" / "table.csv", *ABOUT, "nih_labels")
    labelled = [row | {"labels": row["nih_labels"]} for row in rows]
    _write(folder / "adult_normal", labelled, *ABOUT, "labels")
    _link(folder / "adult_normal" / "images", data / "adult_normal" / "images")
    nih14 = {"source": "chestxray14", "input": str((data / "nih14").resolve())}
    _write_sources(folder, nih14=nih14, adult={"source": "csv", "input": "adult_normal/table.csv"})


def adults(data: Path, folder: Path) -> None:
    """Adults only, so that age tells no class: COVID-19, normal and pneumonia.

    COVID-19 of paper_like (ages are not known, but the collection is of adults), adult_normal, and
    the pneumonia of covid3, whose ages nih14's table tells. The last two are of one hospital, but
    were saved at 224 and 512 px: normal against pneumonia of one processing is covid3.
    """
    rows = read_rows(data / "adult_normal" / "table.csv", *ABOUT)
    normal = [row | {"label": "Normal"} for row in rows if _is_adult(age_of(row["age"]))]
    _write(folder / "normal", normal, *ABOUT, "label")
    _link(folder / "normal" / "images", data / "adult_normal" / "images")
    names = {file.stem for file in (data / "covid3" / "Pneumonia").iterdir()}
    pneumonia = [
        {"path": f"images/{r.path}", "patient": r.patient, "age": f"{r.age:g}", "sex": r.sex}
        | {"view": r.view, "label": "Pneumonia"}
        for r in read_chestxray14(data / "nih14").records
        if Path(r.path).stem in names and _is_adult(r.age)
    ]
    _write(folder / "pneumonia", pneumonia, *ABOUT, "label")
    _link(folder / "pneumonia" / "images", data / "nih14" / "images")
    only = folder / "covid.yaml"
    # A label that maps to null leaves its images out, so that only COVID-19 is read.
    write_text(only, yaml.safe_dump({"Normal": None, "Viral Pneumonia": None}))
    table = str((data / "paper_like" / "table.csv").resolve())
    _write_sources(
        folder,
        covid={"source": "csv", "input": table, "label_map": only.name},
        normal={"source": "csv", "input": "normal/table.csv"},
        pneumonia={"source": "csv", "input": "pneumonia/table.csv"},
    )


def covid3(data: Path, folder: Path) -> None:
    """covid3 with its patients: NIH's numbers, and for COVID-19 the patients of paper_like.

    Both hold X-rays of one collection under the same names. An image that paper_like does not name
    has the patient of another day's image, or is a patient of its own.
    """
    known: dict[str, str] = {}
    for row in read_rows(data / "paper_like" / "table.csv", "path", "patient"):
        stem = Path(row["path"]).stem
        known |= {stem: row["patient"], DAY.sub("", stem): row["patient"]}
    rows = []
    for file in sorted((data / "covid3").glob("*/*")):
        number = NIH_NAME.fullmatch(file.stem)
        # The image itself comes first. With no patient known, pack takes it as one of its own.
        found = known.get(file.stem) or known.get(DAY.sub("", file.stem), "")
        label = file.parent.name
        rows.append(
            {"path": f"images/{label}/{file.name}", "label": label}
            | {"patient": number[1] if number else found}
        )
    _write(folder, rows, "path", "label", "patient")
    _link(folder / "images", data / "covid3")


def words(data: Path, folder: Path) -> None:
    """The test images of a draw, in which text is looked for: FOLDER is words-K beside shards-K."""
    index = read_index(folder.parent / folder.name.replace("words", "shards"))
    test = {index.samples[number].path for number in index.numbers("test")}
    columns = ("path", "label", "patient")
    table = read_rows(data / "paper_like" / "table.csv", *columns)
    rows = [row for row in table if row["path"] in test]
    _write(folder, rows, *columns)
    for name in sorted({row["path"].split("/")[0] for row in rows}):
        _link(folder / name, data / "paper_like" / name)


TABLES = {"findings": findings, "adults": adults, "covid3": covid3, "words": words}


def read_rows(file: Path, *columns: str) -> list[dict[str, str]]:
    """Read a table.

    Raises:
        CxrdistError: it is not there, or lacks a column.
    """
    if not file.is_file():
        raise CxrdistError(f"{file}: no such file; see the head of launch/paper.sh for the folders")
    with open(file, newline="", encoding="utf-8-sig") as text:
        table = csv.DictReader(text)
        if missing := [name for name in columns if name not in (table.fieldnames or ())]:
            raise CxrdistError(f"{file}: has no column {missing[0]}; expected {', '.join(columns)}")
        return list(table)


def _is_adult(years: float | None) -> bool:
    """Whether an age is known, and one of an adult."""
    return years is not None and years >= ADULT_YEARS


def _write(folder: Path, rows: Iterable[Mapping[str, str]], *columns: str) -> None:
    """Write some columns of rows as FOLDER/table.csv."""
    write_table(folder / "table.csv", columns, ([row[name] for name in columns] for row in rows))


def _write_sources(folder: Path, **sources: Mapping[str, str]) -> None:
    """Write FOLDER/sources.yaml, an input of `cxrdist pack --source several`."""
    content = {name: dict(source) for name, source in sources.items()}
    write_text(folder / "sources.yaml", yaml.safe_dump(content, sort_keys=False))


def _link(link: Path, folder: Path) -> None:
    if not link.is_symlink():
        # A relative target would start from the folder of the link.
        link.symlink_to(folder.resolve())


def main() -> int:
    """Read the command line; 2 for bad input, with one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("data", type=Path, help="as of launch/paper.sh")
    parser.add_argument("folder", type=Path, help="directory to write the table into")
    options = parser.parse_args()
    try:
        TABLES[options.table](options.data, options.folder)
    except (CxrdistError, OSError) as error:
        print(f"sources: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
