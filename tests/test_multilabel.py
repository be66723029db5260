"""Images with several labels, or none, the whole way by the real commands."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from support import contents, run_command, run_ranks
from torch import nn

from cxrdist.cli import main
from cxrdist.config import Augmentation
from cxrdist.data.plan import plan_epoch
from cxrdist.distributed import start
from cxrdist.report.values import MEASURES
from cxrdist.train.step import Batches, TrainingData, validate

LABELS = ["Edema", "Hernia", "Mass"]


def write_recipe(path: Path, **options: object) -> Path:
    """A small network, all of it trained at once."""
    blocks = ("stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "head")
    stage = {"lr": dict.fromkeys(blocks, 0.003), "epochs": 8, "patience": 8}
    recipe = {
        "init": "none",
        "global_batch_size": 8,
        "optimizer": "adamw",
        "network": {"growth_rate": 8, "block_config": [2, 2, 2, 2]},
        "augmentation": {"degrees": 0, "shift_x": 0.02, "shift_y": 0, "flip": True},
        "stages": {"all": stage | options},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_bands(folder: Path, num_images: int = 120) -> Path:
    """Noise with a bright band for each label; a table whose labels are drawn one by one."""
    random = np.random.default_rng(0)
    rows = ["path,labels,patient"]
    for i in range(num_images):
        has = random.random(len(LABELS)) < (0.5, 0.3, 0.4)
        pixels = random.integers(0, 100, (48, 48), dtype=np.uint8)
        for place in np.flatnonzero(has):
            pixels[16 * place : 16 * place + 16] += 100
        Image.fromarray(pixels).save(folder / f"{i}.png")
        labels = "|".join(name for name, value in zip(LABELS, has, strict=True) if value)
        rows.append(f"{i}.png,{labels},p{i // 2}")
    table = folder / "images.csv"
    table.write_text("\n".join(rows) + "\n")
    return table


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Shards and a run, trained on two ranks."""
    folder = tmp_path_factory.mktemp("multilabel")
    pack = ("pack", "--source", "csv", "--input", write_bands(folder), "--out", folder / "shards")
    done = run_command(*pack, "--size", 32, "--split", "0.5/0.2/0.3")
    assert done.returncode == 0, done.stderr
    recipe = write_recipe(folder / "recipe.yaml")
    where = ("--shards", folder / "shards", "--run", folder / "run", "--cache", folder / "cache")
    for command in (("train", "--config", recipe), ("evaluate",), ("explain",)):
        done = run_ranks(2, "-m", "cxrdist", *command, *where)
        assert done.returncode == 0, done.stderr
    return folder


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_scores_are_scikit_learns(whole):
    """Each label is learnt, and metrics.json is what scikit-learn says of predictions.csv."""
    rows = read_csv(whole / "run" / "test" / "predictions.csv")
    metrics = json.loads((whole / "run" / "test" / "metrics.json").read_text())
    assert (metrics["task"], metrics["samples"]) == ("multilabel", len(rows))
    truth_of = {row["key"]: row["label"] for row in read_csv(whole / "shards" / "samples.csv")}
    assert all(row["label"] == truth_of[row["key"]] for row in rows)
    assert "" in {row["label"] for row in rows}
    for name in LABELS:
        truth = np.array([name in row["label"].split("|") for row in rows])
        score = np.array([float(row[f"logit_{name}"]) for row in rows])
        found = metrics["classes"][name]
        assert found["positives"] == truth.sum()
        assert found["auroc"] == pytest.approx(roc_auc_score(truth, score), abs=1e-6)
        assert found["auroc"] > 0.8  # labels in another order would be guessed
        average = average_precision_score(truth, score)
        assert found["average_precision"] == pytest.approx(average, abs=1e-6)
        assert found["f1"] == pytest.approx(f1_score(truth, score >= 0), abs=1e-6)
    means = [scores["auroc"] for scores in metrics["classes"].values()]
    assert metrics["macro"]["auroc"] == pytest.approx(np.mean(means), abs=1e-6)


class Brightness(nn.Module):
    """A network whose only logit is the mean grey value."""

    def logits(self, images):
        return images.mean((2, 3))


def test_validation_tells_sure_predictions_apart():
    """Logits 18 without and 25 with the label: the AUROC of early stopping is 1 and no tie."""
    images = np.stack([np.full((8, 8), value, np.uint8) for value in (18, 25)])
    still = Augmentation(degrees=0, shift_x=0, shift_y=0, flip=False)
    plan = plan_epoch(np.arange(2), np.ones(2, np.int64), still, 1, (0, "validation", 0))
    material = TrainingData(images, np.array([[0], [1]], np.int8), "multilabel")
    batches = Batches(material, plan, torch.device("cpu"))
    scores = validate(start(), Brightness(), batches, lambda: None, None)
    assert scores["val_auroc"] == 1


def test_one_rank_gives_the_bytes_of_two(whole, tmp_path):
    """predictions.csv, metrics.json and all heat maps do not depend on the number of ranks."""
    before = contents(whole / "run" / "test")
    shutil.rmtree(whole / "run" / "test")  # explain would keep the maps that are there
    for command in ("evaluate", "explain"):
        done = run_command(command, "--shards", whole / "shards", "--run", whole / "run")
        assert done.returncode == 0, done.stderr
    assert contents(whole / "run" / "test") == before


def test_heat_maps_are_of_every_label(whole):
    """Each explained image has a map of each label and a contrast; parts sum to the logit."""
    rows = read_csv(whole / "run" / "test" / "relevance.csv")
    truth = {r["key"]: r["label"] for r in read_csv(whole / "run" / "test" / "predictions.csv")}
    assert len(rows) == len(truth) * (len(LABELS) + 1)
    for row in rows:
        parts = sum(float(row[name]) for name in ("relevance_sum", "bias_share", "epsilon_share"))
        assert parts == pytest.approx(float(row["logit"]), abs=1e-4)
    assert {row["key"] for row in rows} == set(truth)  # images without a label are shown too
    assert "" in truth.values()


def test_predicted_labels_are_those_above_the_threshold(whole, tmp_path):
    """`predict` names every label whose probability is at least one half."""
    out = tmp_path / "new.csv"
    images = [whole / f"{i}.png" for i in range(40)]
    assert main(list(map(str, ["predict", "--run", whole / "run", *images, "--out", out]))) == 0
    rows = read_csv(out)
    for row in rows:
        expected = [name for name in LABELS if float(row[f"prob_{name}"]) >= 0.5]
        assert row["predicted"] == "|".join(expected)
    assert {row["predicted"].count("|") for row in rows} >= {0, 1}


def test_the_report_shows_labels_and_no_confusion_matrix(whole):
    """Mean AUROC instead of accuracy, a row for each label, images without a label too."""
    assert main(["report", "--run", str(whole / "run")]) == 0
    page = re.sub(r">\s+<", "><", (whole / "run" / "report.html").read_text())
    metrics = json.loads((whole / "run" / "test" / "metrics.json").read_text())
    assert "Confusion matrix" not in page
    assert "Worst mistakes" not in page
    assert "ccuracy" not in page
    mean = metrics.get("macro_enough", metrics["macro"])["auroc"]
    shown = "too few to say" if mean is None else f"{mean:.3f}"
    assert f"Mean AUROC <b>{shown}</b>:" in page
    plain = re.sub("<small>[^<]*</small>", "", page)
    for name, scores in metrics["classes"].items():
        shown = [scores[s] for s in MEASURES["multilabel"]]
        cells = "".join(f"<td>{value:.3f}</td>" for value in shown)
        images = f"<td>{scores['positives']}</td><td>{scores['positive_patients']}</td>"
        assert f'"name">{name}</th>{images}{cells}' in plain
    assert ">No label</h4>" in page
    assert "Validation mean AUROC" in page
    assert contents(whole / "run")["audit.json"] == contents(whole / "shards")["audit.json"]


def test_predictions_of_another_evaluation_are_refused(whole, tmp_path):
    """The report compares the labels of predictions.csv with those of metrics.json."""
    run = tmp_path / "run"
    (run / "test").mkdir(parents=True)
    for name in ("run.json", "recipe.yaml", "log.jsonl", "test/metrics.json"):
        (run / name).write_bytes((whole / "run" / name).read_bytes())
    text = (whole / "run" / "test" / "predictions.csv").read_text()
    (run / "test" / "predictions.csv").write_text(text.replace("Hernia|", "", 1))
    assert main(["report", "--run", str(run)]) == 2


def test_a_model_of_one_label_an_image_is_refused(whole, tmp_path, capfd):
    """Shards of the same classes and another task are no shards of this model."""
    rows = [row for row in read_csv(whole / "images.csv") if row["labels"] in LABELS]
    lines = [f"{whole / row['path']},{row['labels']},{row['patient']}" for row in rows]
    (tmp_path / "one.csv").write_text("\n".join(["path,label,patient", *lines]))
    pack = ["pack", "--source", "csv", "--input", tmp_path / "one.csv", "--out", tmp_path / "s"]
    options = ["--allow-outside", "--size", 32, "--split", "0.5/0.2/0.3"]
    assert main(list(map(str, [*pack, *options]))) == 0
    where = ["--shards", tmp_path / "s", "--run", whole / "run"]
    assert main(list(map(str, ["evaluate", *where]))) == 2
    assert "are multiclass, the model is multilabel" in capfd.readouterr().err


def test_chestxray14_goes_the_whole_way(real_data, tmp_path):
    """Real X-rays with 14 labels: packed, trained a few steps on two ranks, shown in a report."""
    shards, run = tmp_path / "shards", tmp_path / "run"
    source = ("--source", "chestxray14", "--input", real_data / "nih14")
    recipe = write_recipe(tmp_path / "recipe.yaml", epochs=1, patience=1)
    where = ("--shards", shards, "--run", run, "--cache", tmp_path / "cache")
    assert main(list(map(str, ["pack", *source, "--out", shards, "--size", 32]))) == 0
    for command in (("train", "--config", recipe), ("evaluate",), ("explain", "--limit", 15)):
        done = run_ranks(2, "-m", "cxrdist", *command, *where)
        assert done.returncode == 0, done.stderr
    assert main(["report", "--run", str(run)]) == 0
    metrics = json.loads((run / "test" / "metrics.json").read_text())
    assert len(metrics["classes"]) == 14
    assert metrics["macro_labels"]["auroc"] == 14
    assert len(read_csv(run / "test" / "relevance.csv")) == 15 * (14 + 1)  # and the contrast


def test_what_is_covered_costs_its_label_alone(whole):
    """Covering the band of one label takes its AUROC, and the report shows that of each label."""
    with open(whole / "boxes.csv", "w") as file:
        file.write("path,x,y,width,height\n")
        file.writelines(f"{i}.png,0,16,48,16\n" for i in range(120))
    where = ("--run", whole / "run", "--shards", whole / "shards", "--cache", whole / "cache")
    assert main([*map(str, ("probe-text", *where, "--boxes", whole / "boxes.csv"))]) == 0
    found = json.loads((whole / "run" / "test" / "text.json").read_text())
    before, after = (
        {name: found["covering"][how]["classes"][name]["auroc"] for name in LABELS}
        for how in ("as_it_is", "fill")
    )
    assert before["Hernia"] > 0.8
    assert after["Hernia"] < 0.7 < min(after["Edema"], after["Mass"])
    assert found["relevance"]["all"]["area"] == 12 / 32  # rows 10.7 to 21.3 of the square
    assert main(["report", "--run", str(whole / "run")]) == 0
    page = (whole / "run" / "report.html").read_text()
    section = page[page.index('aria-labelledby="text"') :]
    assert f"<td>{after['Hernia']:.3f}</td>" in section
