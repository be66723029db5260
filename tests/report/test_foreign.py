"""Predictions of any program get the page and the figures of a run's split."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    f1_score,
    roc_auc_score,
    roc_curve,
)

from cxrdist.cli import main
from cxrdist.config import ReportConfig
from cxrdist.errors import CxrdistError
from cxrdist.report.html import report

CLASSES = ["Normal", "COVID-19", "<b>Other"]


def make_table(file: Path, several: bool = False, columns: dict[str, str] | None = None) -> dict:
    """Write predictions of 90 images with ties and probabilities of exactly 0 and 1.

    Returns:
        Truth, bool [90, 3], and probabilities as they are written, float [90, 3].
    """
    random = np.random.default_rng(5)
    truth = np.eye(3, dtype=bool)[np.arange(90) % 3]
    if several:
        truth |= random.random((90, 3)) < 0.2
        truth[::10] = False
    p = np.round(np.clip(random.normal(0.35, 0.25, (90, 3)) + 0.3 * truth, 0, 1), 1)
    lines = [",".join(["key", "label", *(columns or {}), *(f"prob_{name}" for name in CLASSES)])]
    for i, (has, values) in enumerate(zip(truth, p, strict=True)):
        label = "|".join(name for name, yes in zip(CLASSES, has, strict=True) if yes)
        more = [text.format(i=i, half=i // 2) for text in (columns or {}).values()]
        lines.append(",".join([f"folder/{i:02d}.png", label, *more, *map(str, values)]))
    file.write_text("\n".join(lines))
    return {"truth": truth, "p": p}


def write(tmp_path: Path, **options) -> tuple[dict, dict, str]:
    """Write the report of a table: what it was made of, its metrics.json and its page."""
    made = make_table(tmp_path / "theirs.csv", **options)
    page = report(ReportConfig(predictions=tmp_path / "theirs.csv", out=tmp_path / "out"))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    return made, metrics, " ".join(re.sub("<[^>]*>", " ", page.read_text()).split())


def test_scores_are_those_of_scikit_learn(tmp_path):
    """Of one class per image: argmax of the probabilities as given, ties to the first class."""
    made, metrics, page = write(tmp_path, columns={"patient": "p{half}"})
    truth, predicted = made["truth"].argmax(1), made["p"].argmax(1)
    assert metrics["confusion_matrix"] == confusion_matrix(truth, predicted).tolist()
    for i, name in enumerate(CLASSES):
        auroc = roc_auc_score(made["truth"][:, i], made["p"][:, i])
        assert metrics["classes"][name]["auroc"] == pytest.approx(auroc, abs=1e-6)
    assert "90 Patients 45; intervals are by patient" in page
    assert metrics["intervals"]["unit"] == "patient"
    assert metrics["intervals"]["patients"] == 45
    assert "There are no operating points" in page
    assert "add up to 1" not in page


def test_scores_of_several_labels_are_those_of_scikit_learn(tmp_path):
    """A label counts as predicted from 0.5 on; without patients the page says what that means."""
    made, metrics, page = write(tmp_path, several=True)
    for i, name in enumerate(CLASSES):
        truth, p = made["truth"][:, i], made["p"][:, i]
        scores = metrics["classes"][name]
        assert scores["auroc"] == pytest.approx(roc_auc_score(truth, p), abs=1e-6)
        average = average_precision_score(truth, p)
        assert scores["average_precision"] == pytest.approx(average, abs=1e-6)
        assert scores["f1"] == pytest.approx(f1_score(truth, p >= 0.5), abs=1e-6)
    assert "Intervals are by image" in page
    assert metrics["intervals"]["unit"] == "image"
    assert metrics["intervals"]["patients"] == 90


def test_only_the_test_split_is_scored(tmp_path):
    """Images of train and val are counted and not scored."""
    made = make_table(tmp_path / "all.csv", columns={"split": "test"})
    lines = (tmp_path / "all.csv").read_text().splitlines()
    lines[1:31] = [line.replace(",test,", ",train,") for line in lines[1:31]]
    (tmp_path / "all.csv").write_text("\n".join(lines))
    page = report(ReportConfig(predictions=tmp_path / "all.csv", out=tmp_path / "out"))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["samples"] == 60
    right = (made["truth"].argmax(1) == made["p"].argmax(1))[30:].mean()
    assert metrics["accuracy"] == pytest.approx(right, abs=1e-6)
    assert "30 of other splits are not scored" in page.read_text()


def test_thresholds_come_from_the_images_of_val(tmp_path):
    """Youden's threshold of scikit-learn on val gives the sensitivity on test, and ties too."""
    made = make_table(tmp_path / "all.csv", several=True, columns={"split": "val"})
    lines = (tmp_path / "all.csv").read_text().splitlines()
    lines[46:] = [line.replace(",val,", ",test,") for line in lines[46:]]
    (tmp_path / "all.csv").write_text("\n".join(lines))
    page = report(ReportConfig(predictions=tmp_path / "all.csv", out=tmp_path / "out"))
    points = json.loads((tmp_path / "out" / "metrics.json").read_text())["operating_points"]
    assert points["chosen_on"]["images"] == 45
    for i, name in enumerate(CLASSES):
        truth, p = made["truth"][:, i], made["p"][:, i]
        false_rate, true_rate, thresholds = roc_curve(truth[:45], p[:45], drop_intermediate=False)
        threshold = thresholds[np.argmax(np.round(true_rate - false_rate, 12))]
        called = p[45:] >= threshold
        point = points["classes"][name]
        assert point["sensitivity"] == pytest.approx(called[truth[45:]].mean(), abs=1e-6)
        assert point["specificity"] == pytest.approx(1 - called[~truth[45:]].mean(), abs=1e-6)
    assert "45 images of the split val" in page.read_text()


@pytest.mark.parametrize("several", [False, True])
def test_the_predictions_of_a_report_give_the_same_report(tmp_path, several):
    """What was read is written with all digits, as a run's predictions.csv."""
    columns = {"patient": "p{half}", "sex": "F", "age": "{i}"}
    make_table(tmp_path / "a.csv", several, columns)
    report(ReportConfig(predictions=tmp_path / "a.csv", out=tmp_path / "a"))
    report(ReportConfig(predictions=tmp_path / "a" / "predictions.csv", out=tmp_path / "b"))
    for name in ("metrics.json", "predictions.csv"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_predictions_of_a_run_give_the_figures_of_the_run(whole_run, tmp_path):
    """The same scores from RUN/test/predictions.csv as torchmetrics gave for the run."""
    predictions = whole_run / "test" / "predictions.csv"
    report(ReportConfig(predictions=predictions, out=tmp_path / "out"))
    of_run = json.loads((whole_run / "test" / "metrics.json").read_text())
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["confusion_matrix"] == of_run["confusion_matrix"]
    for name, scores in of_run["classes"].items():
        for score, value in scores.items():
            assert found["classes"][name][score] == pytest.approx(value, abs=1e-6)


def test_nothing_is_written_where_something_is(tmp_path):
    """A directory with content is left alone, an empty one is used, a bad table leaves none."""
    make_table(tmp_path / "a.csv")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    config = ReportConfig(predictions=tmp_path / "a.csv", out=out)
    with pytest.raises(CxrdistError, match=r"--out .*: already exists; name a new or empty"):
        report(config)
    (out / "mine").unlink()
    report(config)
    assert sorted(file.name for file in out.iterdir()) == [
        "metrics.json",
        "predictions.csv",
        "report.html",
    ]
    bad = tmp_path / "bad.csv"
    bad.write_text((tmp_path / "a.csv").read_text().replace("folder/01", "folder/00"))
    with pytest.raises(CxrdistError, match="row 3: key"):
        report(ReportConfig(predictions=bad, out=tmp_path / "none"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "bad.csv", "out"]


@pytest.mark.parametrize(
    "options",
    [[], ["--predictions", "a.csv"], ["--out", "x"], ["--run", "r", "--predictions", "a.csv"]],
)
def test_a_run_or_predictions_are_given(capsys, options):
    """Neither, both, or half of the second way is one line and exit code 2."""
    assert main(["report", *options]) == 2
    assert "expected --run RUN, or --predictions FILE.csv with --out DIR" in capsys.readouterr().err
