"""One command after the other on real X-rays."""

import csv
import json
from collections import defaultdict

import numpy as np
import yaml

from cxrdist.cli import main


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
