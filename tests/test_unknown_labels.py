"""A table of 14 labels with 1, 0, -1 and empty cells, by the real commands, against plain sums.

The reference reads the table itself, drops what is not known and leaves masks to nobody.
"""

import csv
import json
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from recorder import record_again
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)
from support import LOG_EACH_STEP, RUN_CXRDIST, run_ranks
from torch.nn.functional import binary_cross_entropy_with_logits

from cxrdist.cli import main
from cxrdist.config import Augmentation, Network, Stage, TrainConfig
from cxrdist.data.index import Index, read_index
from cxrdist.data.plan import plan_epoch
from cxrdist.distributed import start
from cxrdist.evaluate.metrics import SCORES
from cxrdist.explain.targets import choose_samples
from cxrdist.files import read_log
from cxrdist.model.augment import sampling_matrices, warp
from cxrdist.run import RunDirectory
from cxrdist.train import loop
from cxrdist.train import stage as stage_module
from cxrdist.train.stages import build_optimizer, freeze, parameter_groups, set_modes
from cxrdist.train.training import build_training

# The 14 of CheXpert, in its order.
LABELS = [
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion"),
    *("Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion"),
    *("Pleural Other", "Fracture", "Support Devices"),
]
NEVER_KNOWN, ONE_KIND = "Fracture", "Pleural Other"
NETWORK = Network(growth_rate=4, block_config=(2, 2, 2, 2), dropout=0.0)
LATE = Stage({"denseblock4": 0.02, "head": 0.1}, epochs=1, patience=1)
HEAD = Stage({"head": 0.1}, epochs=1, patience=1)
STILL = Augmentation(degrees=5)
U_ONES = "positive,Edema=negative"
ONES = dict.fromkeys(LABELS, 1.0) | {"Edema": 0.0}


def write_table(folder: Path, num_images: int = 72) -> Path:
    """Noise, brighter with more labels; half of the images have only cells that are not known."""
    random = np.random.default_rng(0)
    cells = ["1.0", "0.0", "-1.0", "1", "0", "U", ""]
    rows = [["Path", "Sex", "Age", "AP/PA", *LABELS]]
    for i in range(num_images):
        row = random.choice(cells if i % 2 else ["", "-1.0"], len(LABELS))
        row[LABELS.index(NEVER_KNOWN)] = ""
        row[LABELS.index(ONE_KIND)] = "1.0" if i % 2 else ""
        bright = 10 * sum(cell.startswith("1") for cell in row)
        pixels = random.integers(0, 100, (36, 36), dtype=np.uint8) + np.uint8(bright)
        Image.fromarray(pixels).save(folder / f"p{i // 2}_{i}.png")
        rows.append([f"p{i // 2}_{i}.png", "Female", "60", "AP", *row])
    with open(folder / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "train.csv"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A table, and shards made of it."""
    folder = tmp_path_factory.mktemp("unknown")
    where = ("--input", write_table(folder), "--out", folder / "shards", "--size", 32)
    options = ("--split", "0.4/0.3/0.3", "--patient-pattern", r"^p(\d+)_")
    assert main([*map(str, ("pack", "--source", "csv", *where, *options))]) == 0
    fields = {
        **{"init": "none", "global_batch_size": 2, "augmentation": {"degrees": 5}},
        **{"network": {"growth_rate": 4, "block_config": [2, 2, 2, 2], "dropout": 0.0}},
    }
    for name, stage in (("late", LATE), ("head", HEAD)):
        recipe = fields | {"stages": {name: vars(stage)}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def truth_of(folder: Path, index: Index, ways: dict[str, float]) -> np.ndarray:
    """The cells of the table by sample, float [samples, 14]; NaN where they are not to be counted.

    Args:
        folder: of the table.
        index: of the shards.
        ways: by label what -1 and U stand for; NaN for labels that it does not name.
    """
    rows = {row["Path"]: row for row in read_csv(folder / "train.csv")}
    value = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0}
    return np.array(
        [
            [
                ways.get(name, np.nan) if cell in ("-1.0", "U") else value.get(cell, np.nan)
                for name, cell in ((name, rows[sample.path][name]) for name in LABELS)
            ]
            for sample in index.samples
        ]
    )


def kept_loss(logits: torch.Tensor, truth: np.ndarray) -> torch.Tensor:
    """The mean binary cross-entropy of the cells that are left when the others are dropped."""
    known = torch.from_numpy(~np.isnan(truth))
    if not known.any():
        return logits.sum() * 0
    left = torch.from_numpy(truth).float()[known]
    return binary_cross_entropy_with_logits(logits[known], left)


def plain_losses(
    folder: Path, scratch: Path, name: str, uncertain: str, ways: dict[str, float]
) -> Iterator[float | None]:
    """Train with a plain loop; the loss of each step, None without a known cell, then of val."""
    index, stage = read_index(folder / "shards"), {"late": LATE, "head": HEAD}[name]
    config = TrainConfig(
        *(folder / "shards", scratch / "plain", {name: stage}, "none"),
        **{"global_batch_size": 2, "augmentation": STILL, "network": NETWORK},
        **{"cache": scratch / "cache", "uncertain": uncertain},
    )
    training = build_training(start(), RunDirectory(scratch / "plain"), config, index)
    model, images = training.model, training.data.images
    freeze(model, set(stage.lr))
    optimizer = build_optimizer("sgd", parameter_groups(model, stage))

    def forward(samples: np.ndarray, draws: object) -> torch.Tensor:
        squares = torch.from_numpy(np.asarray(images[samples]))[:, None]
        return model.logits(warp(squares, sampling_matrices(draws, 32, torch.device("cpu"))))

    set_modes(model, set(stage.lr))
    plan, truth = training.plan(name, 1), truth_of(folder, index, ways)
    for first, last in zip(plan.bounds, plan.bounds[1:], strict=False):
        for group in optimizer.param_groups:
            group["lr"] = stage.lr[group["name"]]
        samples = plan.samples[first:last]
        loss = kept_loss(forward(samples, plan.draws.rows(slice(first, last))), truth[samples])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield float(loss.detach()) if not np.isnan(truth[samples]).all() else None
    model.eval()
    val = np.array(index.numbers("val"))
    plan = plan_epoch(val, np.ones(len(val), np.int64), STILL, 1, (0, "validation", 0))
    with torch.no_grad():
        logits = forward(plan.samples, plan.draws)
    yield float(kept_loss(logits, truth_of(folder, index, {})[plan.samples]))


WAYS = {
    "one rank in micro-batches": ("head", U_ONES, ONES),
    "one rank, captured": ("late", "ignore", {}),
    "two ranks": ("late", "ignore", {}),
}


def train_command(whole: Path, way: str) -> list[str]:
    """The command that trains in a way, in a directory of its name."""
    recipe, uncertain, _ = WAYS[way]
    return [
        *("train", "--config", str(whole / f"{recipe}.yaml"), "--shards", str(whole / "shards")),
        *("--run", str(whole / way), "--cache", str(whole / "cache"), "--uncertain", uncertain),
        *(["--max-images-per-rank", "1"] if "micro" in way else []),
    ]


@pytest.fixture(scope="module")
def two_ranks(whole) -> Path:
    """A run on two ranks with a row in its log for each step."""
    done = run_ranks(2, "-c", LOG_EACH_STEP + RUN_CXRDIST, *train_command(whole, "two ranks"))
    assert done.returncode == 0, done.stderr
    return whole / "two ranks"


@pytest.mark.parametrize("way", WAYS)
def test_losses_are_those_of_the_known_cells(whole, two_ranks, tmp_path, monkeypatch, way):
    """Of each step and of the validation, to 1e-6; a step without a known cell has none.

    Uncertain cells of train count as the recipe says, those of val never.
    """
    recipe, uncertain, ways = WAYS[way]
    expected = list(plain_losses(whole, tmp_path, recipe, uncertain, ways))
    assert (None in expected) == (uncertain == "ignore")
    monkeypatch.setattr(loop, "STEPS_PER_LOG_ROW", 1)
    if "captured" in way:
        set_up = stage_module.StageRun._set_up
        monkeypatch.setattr(
            stage_module.StageRun, "_set_up", lambda run: (set_up(run), run.capture(record_again))
        )
    if way != two_ranks.name:
        assert main(train_command(whole, way)) == 0
    rows = list(read_log(whole / way / "log.jsonl"))
    found = [row["loss"] for row in rows if row["kind"] == "step"]
    *steps, val = expected
    assert [loss is None for loss in found] == [loss is None for loss in steps]
    known = [loss for loss in steps if loss is not None]
    assert [loss for loss in found if loss is not None] == pytest.approx(known, rel=0, abs=1e-6)
    (epoch,) = (row for row in rows if row["kind"] == "epoch" and row["epoch"] == 1)
    assert epoch["loss"] == pytest.approx(np.mean(known), abs=1e-6)
    assert epoch["val_loss"] == pytest.approx(val, abs=1e-6)


@pytest.fixture(scope="module")
def evaluated(whole, two_ranks) -> Path:
    """The run, evaluated; what the terminal has shown is beside it."""
    where = ("--shards", whole / "shards", "--run", two_ranks, "--cache", whole / "cache")
    with redirect_stdout(StringIO()) as said:
        assert main([*map(str, ("evaluate", *where))]) == 0
    (whole / "said").write_text(said.getvalue())
    return two_ranks


@pytest.fixture(scope="module")
def page(evaluated) -> str:
    """The report of the run."""
    assert main(["report", "--run", str(evaluated)]) == 0
    return (evaluated / "report.html").read_text()


def test_scores_are_scikit_learns_of_the_known_cells(whole, evaluated):
    """Each label over the images of which the table knows it."""
    metrics = json.loads((evaluated / "test" / "metrics.json").read_text())
    index = read_index(whole / "shards")
    table = dict(zip((s.key for s in index.samples), truth_of(whole, index, {}), strict=True))
    rows = read_csv(evaluated / "test" / "predictions.csv")
    truth = np.array([table[row["key"]] for row in rows])
    aurocs = []
    for i, name in enumerate(LABELS):
        known, found = ~np.isnan(truth[:, i]), metrics["classes"][name]
        is_so, logit = truth[known, i], np.array([float(r[f"logit_{name}"]) for r in rows])[known]
        assert (found["known"], found["positives"]) == (known.sum(), is_so.sum())
        if len(set(is_so)) < 2:
            assert found["auroc"] is None is found["average_precision"]
            assert found["reason"]
            continue
        guess, options = logit >= 0, {"zero_division": np.nan}
        expected = {
            "auroc": roc_auc_score(is_so, logit),
            "average_precision": average_precision_score(is_so, logit),
            "f1": f1_score(is_so, guess),
            "recall": recall_score(is_so, guess),
            "precision": precision_score(is_so, guess, **options),
        }
        aurocs.append(expected["auroc"])
        for score, value in expected.items():
            shown = np.nan if found[score] is None else found[score]
            assert shown == pytest.approx(value, abs=1e-6, nan_ok=True), (name, score)
        assert found["reason"] is None
    assert len(aurocs) == metrics["macro_labels"]["auroc"] >= 11
    assert metrics["macro"]["auroc"] == pytest.approx(np.mean(aurocs), abs=1e-6)


def test_a_label_without_a_known_cell_has_no_score_and_a_reason(whole, evaluated, page):
    """In metrics.json, in the terminal and on the page; and so has one that all images have."""
    classes = json.loads((evaluated / "test" / "metrics.json").read_text())["classes"]
    assert [classes[NEVER_KNOWN][score] for score in SCORES] == [None] * 6
    assert [classes[NEVER_KNOWN][f"{score}_interval"] for score in SCORES] == [None] * 6
    nothing = "the label is known for no image"
    assert classes[NEVER_KNOWN]["reason"] == nothing
    known = classes[ONE_KIND]["known"]
    assert classes[ONE_KIND]["reason"] == f"all of the {known} known images have the label"
    said = (whole / "said").read_text()
    page = re.sub(r">\s+<", "><", page)
    assert f"{NEVER_KNOWN}: no AUROC, {nothing}" in said
    assert f"<li>{NEVER_KNOWN}: {nothing}.</li>" in page
    assert f"No curve: {nothing}." in page
    assert re.search(rf">{NEVER_KNOWN}</th><td>0</td><td>\u2014</td><td>\u2014</td>", page)
    assert not re.search(rf">[^<]* of [^<]*{NEVER_KNOWN}[^<]*: it needs", page)
    plain = re.sub("<small>[^<]*</small>", "", page)
    assert re.search(rf">{NEVER_KNOWN}</th><td>0</td><td>0</td>(<td>\u2014</td>){{6}}", plain)


def test_the_headline_says_how_many_labels_are_known(whole, evaluated, page):
    """Of all cells of the split; in the terminal and on the page."""
    index = read_index(whole / "shards")
    truth = truth_of(whole, index, {})[index.numbers("test")]
    known = (~np.isnan(truth)).mean()
    said = (whole / "said").read_text()
    assert f" ({len(truth)} images, {known:.0%} of their labels are known" in said
    page = " ".join(page.split())
    images = f"{len(truth)} images, which may have several labels or none; "
    assert f"{images}{100 * known:.1f} % of their labels are known." in page


def test_images_of_which_nothing_is_known_are_explained_last(whole):
    """With a limit; without one all are, and the page does not call them free of labels."""
    index = read_index(whole / "shards")
    nothing = np.isnan(truth_of(whole, index, {})).all(axis=1)
    test = index.numbers("test")
    num_known = int((~nothing[test]).sum())
    assert 0 < num_known < len(test)
    assert not nothing[choose_samples(index, "test", num_known)].any()
    assert nothing[choose_samples(index, "test", num_known + 2)].sum() == 2
    assert choose_samples(index, "test", None).tolist() == test


def test_the_probe_for_words_scores_the_known_cells(whole, evaluated, capsys):
    """As `evaluate` does; a label that no image has keeps its row of the table."""
    index = read_index(whole / "shards")
    boxes = [f"{index.samples[n].path},2,2,9,6,AP,1" for n in index.numbers("test")]
    (whole / "boxes.csv").write_text("\n".join(["path,x,y,width,height,text,score", *boxes]))
    where = ("--shards", whole / "shards", "--run", evaluated, "--cache", whole / "cache")
    command = ("probe-text", *where, "--boxes", whole / "boxes.csv")
    assert main([*map(str, command)]) == 0
    metrics = json.loads((evaluated / "test" / "metrics.json").read_text())
    text = json.loads((evaluated / "test" / "text.json").read_text())
    assert text["covering"]["as_it_is"]["classes"] == metrics["classes"]
    (row,) = re.findall(rf"^{NEVER_KNOWN} +((?:- +){{3,}}.*)$", capsys.readouterr().out, re.M)
    assert row.split() == ["-"] * len(LABELS) + ["0"]


def test_what_is_not_known_is_counted_and_kept(whole, evaluated, page):
    """In samples.csv, predictions.csv, run.json and the page, by split and label."""
    table = {row["Path"]: row for row in read_csv(whole / "train.csv")}
    samples = {row["key"]: row for row in read_csv(whole / "shards" / "samples.csv")}
    counts = json.loads((evaluated / "run.json").read_text())["shards"]["counts"]
    for name in LABELS:
        for split in ("train", "val", "test"):
            cells = [table[s["path"]][name] for s in samples.values() if s["split"] == split]
            found = counts[split][name]
            assert found["uncertain"] == sum(cell in ("-1.0", "U") for cell in cells)
            assert found["missing"] == sum(cell == "" for cell in cells)
            assert found["images"] == sum(cell in ("1", "1.0") for cell in cells)
    columns = ("label", "uncertain", "missing")
    for row in read_csv(evaluated / "test" / "predictions.csv"):
        assert [row[c] for c in columns] == [samples[row["key"]][c] for c in columns]
        named = {name for c in columns for name in row[c].split("|")} - {""}
        assert named == {n for n in LABELS if table[samples[row["key"]]["path"]][n][:1] != "0"}
    page = re.sub(r">\s+<", "><", page)
    cells = "".join(
        f"<td>{counts[split]['Edema'][what]}</td>"
        for split in ("train", "val", "test")
        for what in ("uncertain", "missing", "assumed_absent")
    )
    assert f">Edema</th>{cells}" in page
    assert "In training uncertain labels counted as <b>ignore</b>" in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maybe", "expected ignore, positive or negative"),
        ("positive,negative", "expected ignore, positive or negative, and for single labels"),
        ("ignore,Edema=perhaps", "expected ignore, positive or negative"),
        ("ignore,Oedema=positive", "no class 'Oedema' in the shards"),
    ],
)
def test_a_way_that_is_none_is_refused(whole, tmp_path, capsys, text, message):
    """One line, and nothing is begun."""
    where = ["--shards", whole / "shards", "--run", tmp_path / "run", "--uncertain", text]
    command = ["train", "--config", whole / "late.yaml", *where, "--cache", tmp_path / "cache"]
    assert main([*map(str, command)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "uncertain: " in error
    assert message in error
    assert not (tmp_path / "run" / "run.json").exists()
