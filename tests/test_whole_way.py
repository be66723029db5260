"""One command after the other on real X-rays."""

import csv
import html
import json
import re
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from cxrdist.cli import main
from cxrdist.files import write_table


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def test_real_x_rays_go_the_whole_way(real_data, tmp_path):
    """Files as they come in the wild: packed, trained on, evaluated, explained, reported."""
    shards, out, cache = (tmp_path / name for name in ("shards", "run", "cache"))
    recipe = {
        "init": "none",
        "global_batch_size": 6,
        "network": {"growth_rate": 8, "block_config": [2, 2, 2, 2]},
        "copies": {"COVID-19": 2},
        "stages": {"head": {"lr": {"head": 0.01}, "epochs": 1, "patience": 1}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    originals = real_data / "originals"
    pack = ("pack", "--source", "folder", "--input", originals, "--out", shards)
    run(*pack, "--size", 64, "--split", "0.5/0.2/0.3", "--patient-pattern", r"^(\d{8})_")
    run("check", shards)
    where = ("--shards", shards, "--run", out, "--cache", cache)
    run("train", "--config", tmp_path / "recipe.yaml", *where)
    run("evaluate", *where)
    run("explain", *where, "--limit", 3)
    run("report", "--run", out)
    run("predict", "--run", out, originals / "Normal", "--out", tmp_path / "predicted.csv")
    metrics = json.loads((out / "test" / "metrics.json").read_text())
    assert metrics["samples"] == np.sum(metrics["confusion_matrix"])
    assert len((tmp_path / "predicted.csv").read_text().splitlines()) == 1 + 12
    assert (out / "report.html").stat().st_size > 50_000


def test_patients_of_real_names_stay_in_one_split(real_data, tmp_path):
    """covid3: 917 images, patients with several images and some in two classes."""
    pack = ("pack", "--source", "folder", "--input", real_data / "covid3", "--out", tmp_path / "s")
    run(*pack, "--size", 32, "--split", "0.7/0.1/0.2", "--patient-pattern", r"^(\d{8})_")
    home, classes = defaultdict(set), defaultdict(set)
    with open(tmp_path / "s" / "samples.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        home[row["patient"]].add(row["split"])
        classes[row["patient"]].add(row["label"])
    assert len(rows) == 917
    assert all(len(splits) == 1 for splits in home.values())
    assert any(len(labels) == 2 for labels in classes.values())


def write_two_sets(folder: Path) -> Path:
    """A ChestX-ray14 of 40 patients and a clinic's table of 40, in a list of sources.

    Effusion is in one of ten of the first and nine of ten of the second, which is darker and of
    another size; half of the second are lateral by the table.
    """
    random = np.random.default_rng(0)

    def save(file: Path, *, bright: bool, size: int) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 100, (size, size), dtype=np.uint8)
        pixels[: size // 2] += 100 * bright
        Image.fromarray(pixels).save(file)

    rows = [["Image Index", "Finding Labels", "Patient ID", "View Position"]]
    for patient in range(1, 41):
        has = patient % 10 == 1
        rows += [[f"{patient:08d}_000.png", "Effusion" if has else "No Finding", patient, "PA"]]
        save(folder / "nih" / "images" / rows[-1][0], bright=has, size=48)
    names = [row[0] for row in rows[1:]]
    (folder / "nih" / "train_val_list.txt").write_text("\n".join(names[10:]))
    (folder / "nih" / "test_list.txt").write_text("\n".join(names[:10]))
    write_table(folder / "nih" / "Data_Entry_2017.csv", rows[0], rows[1:])
    rows = []
    for patient, view in product(range(1, 41), ("Frontal", "Lateral")):
        has = patient % 10 != 1
        labels = "Pleural Effusion|Lung Opacity" if has else "Pacemaker"
        rows.append([f"{patient}-{view[0]}.png", labels, patient, view])
        save(folder / "clinic" / rows[-1][0], bright=has, size=40)
    write_table(folder / "clinic" / "t.csv", ["path", "labels", "patient", "view"], rows)
    (folder / "labels.yaml").write_text("Pleural Effusion: Effusion\nLung Opacity: null\n")
    (folder / "sources.yaml").write_text(
        "nih: {source: chestxray14, input: nih}\n"
        "clinic: {source: csv, input: clinic/t.csv, label_map: labels.yaml}\n"
    )
    return folder / "sources.yaml"


def test_two_data_sets_go_the_whole_way_together(tmp_path, capsys):
    """Official lists stay, lateral images stay out, and the audit says what the source tells."""
    shards, out, cache = (tmp_path / name for name in ("shards", "run", "cache"))
    pack = ("pack", "--source", "several", "--input", write_two_sets(tmp_path), "--out", shards)
    run(*pack, "--size", 32, "--workers", 1, "--split", "0.6/0.2/0.2")
    said = capsys.readouterr().out
    assert "sources: 40 ChestX-ray14, 40 t\n" in said
    assert re.search(r"^label +present +absent +uncertain +missing +assumed absent$", said, re.M)
    assert re.search(r"^Pacemaker +4 +36 +0 +40 +0$", said, re.M)
    assert "left out: lateral view (--views)  40\n" in said
    assert "audit warning: Effusion is associated with the source: Cramér's V is 0.80" in said
    with open(shards / "samples.csv") as file:
        rows = list(csv.DictReader(file))
    nih = [row for row in rows if row["path"].startswith("nih/")]
    assert Counter(row["split"] for row in nih if row["path"] <= "nih/00000010_000.png") == {
        "test": 10
    }
    assert Counter(row["split"] for row in rows if row not in nih) == {
        "train": 24,
        "val": 8,
        "test": 8,
    }
    assert len({row["patient"] for row in rows}) == 80
    assert {row["missing"] for row in nih} == {"Pacemaker"}
    audit = json.loads((shards / "audit.json").read_text())
    assert {
        name: audit["sources"]["counts"][name]["Effusion"] for name in ("ChestX-ray14", "t")
    } == {
        "ChestX-ray14": 4,
        "t": 36,
    }
    index = json.loads((shards / "index.json").read_text())
    assert index["split"] == (
        "given by the source for 40 images, drawn for 40 (0.6/0.2/0.2), val drawn (0.6/0.2/0.2)"
    )
    recipe = {
        "init": "none",
        "global_batch_size": 8,
        "network": {"growth_rate": 4, "block_config": [2, 2, 2, 2]},
        "stages": {"head": {"lr": {"head": 0.01}, "epochs": 1, "patience": 1}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    where = ("--shards", shards, "--run", out, "--cache", cache)
    run("train", "--config", tmp_path / "recipe.yaml", *where)
    run("evaluate", *where)
    run("report", "--run", out)
    assert json.loads((out / "test" / "metrics.json").read_text())["samples"] == 18
    assert "Effusion is associated with the source" in html.unescape(
        (out / "report.html").read_text()
    )
