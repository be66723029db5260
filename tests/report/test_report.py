import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from cxrdist.config import Network, ReportConfig
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.measure import Settings, measure
from cxrdist.evaluate.scored import Prediction, read_scored
from cxrdist.model.densenet import Classifier, save_model
from cxrdist.report import mistakes, pictures
from cxrdist.report.files import read_calibration
from cxrdist.report.html import report
from cxrdist.report.scores import check_same_evaluation, roc_charts
from cxrdist.report.values import MEASURES, moment, number, percent
from cxrdist.report.verdict import external_lines, gap_lines
from cxrdist.run import RunDirectory

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
DASH = "\N{EM DASH}"
PREDICTED = "key,patient,label,prob_a,logit_a\n"


class Text(HTMLParser):
    """The words of a page, without scripts and styles, and the names of its elements."""

    def __init__(self, page: str):
        super().__init__()
        self.words: list[str] = []
        self.elements: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    def __str__(self) -> str:
        return " ".join(self.words)


def write(run: Path) -> str:
    """Write the report and give back its text."""
    return report(ReportConfig(run=run)).read_text(encoding="utf-8")


def change_json(path: Path, change: Any) -> None:
    """Let a function change what a JSON file holds."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# Without a browser.


def test_same_run_directory_gives_the_same_bytes(run: Path) -> None:
    """Two reports of one run are the same bytes, and later than the first is no difference."""
    first = report(ReportConfig(run=run)).read_bytes()
    assert report(ReportConfig(run=run)).read_bytes() == first


def test_ids_are_unique(run: Path) -> None:
    """No two elements of the page share an id, though matplotlib names them alike."""
    ids = re.findall(r'\sid="([^"]*)"', write(run))
    assert len(ids) == len(set(ids)) > 100
    assert set(re.findall(r'(?:url\(|href=")#([^)"]*)', write(run))) <= set(ids)


def test_names_from_files_are_escaped(run: Path, made: SimpleNamespace) -> None:
    """A class named like an HTML tag, a hostile stage and a hostile key are shown as text."""
    hostile = '<script>alert("1")</script><img src=x onerror=alert(1)>'
    log, table = run / "log.jsonl", run / "test" / "predictions.csv"
    log.write_text(log.read_text().replace('"unfreeze"', json.dumps(hostile)))
    with open(table, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    wrong = wrong_rows(run, made)[0]["key"]
    with open(table, "w", newline="", encoding="utf-8") as file:
        changed = [[hostile if value == wrong else value for value in row] for row in rows]
        csv.writer(file).writerows([header, *changed])
    with pytest.raises(CxrdistError, match="is not the name of a file"):
        write(run)  # the key has a slash in it: no picture may be read from elsewhere
    table.write_text(table.read_text().replace("/script", "script"))
    page = write(run)
    text = Text(page)
    assert made.ODD_CLASS not in page
    assert made.ODD_CLASS in str(text)
    assert hostile in str(text)
    assert "script" not in text.elements
    assert "onerror" not in {
        name for tag in re.findall(r"<img[^>]*>", page) for name in tag.split()
    }


def wrong_rows(run: Path, made: SimpleNamespace) -> list[dict[str, str]]:
    """The wrong rows of predictions.csv in falling order of their largest logit."""
    with open(run / "test" / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    wrong = []
    for row in rows:
        logits = [float(row[f"logit_{name}"]) for name in made.CLASSES]
        if made.CLASSES[int(np.argmax(logits))] != row["label"]:
            wrong.append((-max(logits), row["key"], row))
    return [row for _, _, row in sorted(wrong, key=lambda entry: entry[:2])]


def mistakes_of(page: str) -> str:
    """The section of the mistakes, as text."""
    a = page.index('aria-labelledby="split0-mistakes"')
    return str(Text(page[a : page.index("</section>", a)]))


def test_all_mistakes_are_in_the_page(run: Path, made: SimpleNamespace) -> None:
    """The wrong rows of predictions.csv and no others, the surest first, with what is known."""
    wrong = wrong_rows(run, made)
    section = mistakes_of(write(run))
    places = [section.index(f" {row['key']} Truth {row['label']} ") for row in wrong]
    assert len(places) == len(wrong) == section.count("Predicted ") - 1 > 5
    assert places == sorted(places)
    patients = len({row["patient"] for row in wrong})
    assert f"{len(wrong)} of 180 images, of {patients} patients, are classified wrongly." in section
    for row in wrong:
        known = [f"{name} {row[name]}" for name in ("source", "view", "sex", "age") if row[name]]
        assert f"{' '.join(known)} patient {row['patient']}" in section


def test_each_mistake_has_its_pictures(run: Path, made: SimpleNamespace) -> None:
    """Its X-ray, the maps of what it is and of what it was taken for, and what is nearest."""
    page = write(run)
    a = page.index('aria-labelledby="split0-mistakes"')
    section = page[a : page.index("</section>", a)]
    wrong = wrong_rows(run, made)
    assert "no picture" not in section
    assert section.count('alt="X-ray ') >= len(wrong)
    explained = {path.stem for path in (run / "test" / "nearest").iterdir()}
    with_maps = [row for row in wrong if f"train {row['key']}" in explained]
    assert len(with_maps) == section.count("Nearest training image") > 5
    assert section.count('alt="Heat map of ') == 2 * len(with_maps)
    assert section.count("similarity 0.988") == section.count(">same patient<") == len(with_maps)
    (run / "test" / "nearest" / f"train {with_maps[0]['key']}.png").unlink()
    assert mistakes_of(write(run)).count("Nearest training image") == len(with_maps) - 1
    shutil.rmtree(run / "test" / "mistakes")  # an older evaluate wrote none
    assert "no picture" not in mistakes_of(write(run))
    for row in wrong[:2]:
        (run / "test" / "heatmaps" / f"{row['key']}.png").unlink()
    assert "2 of these have no picture." in mistakes_of(write(run))


def test_mistakes_beyond_the_bound_are_rows_and_then_a_number(
    run: Path, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page says how many have no picture and how many are not on it, and where they stand."""
    num = len(wrong_rows(run, made))
    monkeypatch.setattr(mistakes, "MOST_PICTURED", 3)
    monkeypatch.setattr(mistakes, "MOST_LISTED", 2)
    section = mistakes_of(write(run))
    assert "The first 3 have pictures here, the next 2 a row in the table below" in section
    assert f"{num - 5} are not on this page , only in test/predictions.csv" in section
    assert section.count("Predicted ") - 1 == 3 + 1  # three cards, a column


def test_sure_predictions_are_those_of_their_logits(run: Path, made: SimpleNamespace) -> None:
    """Of logits 18 and 25 the second class is predicted, as in metrics.json, and no mistake."""
    rows = made.make_predictions()
    row = next(row for row in rows if row["label"] == "COVID-19")
    row |= {"key": "sure"} | made.with_logits([18, 25, -40])
    assert row["p"][:2] == [1, 1]
    made.write_evaluation(run / "test", rows)
    assert " sure Truth" not in mistakes_of(write(run))


def test_thresholds_of_an_ensemble_are_read(tmp_path: Path) -> None:
    """An ensemble's model.json, which lists its members, has a calibration as a network's does."""
    chosen = {"temperatures": {"a": 2.0}, "rule": "youden", "thresholds": {"a": 0.5}}
    chosen |= {"reasons": {}, "fewest": 10, "index_sha256": "0" * 64, "images": 30, "patients": 20}
    ensemble = {"format": "cxrdist-ensemble-1", "members": ["member-0", "member-1"]}
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "model.json"
    for calibration, thresholds in ((chosen, {"a": 0.5}), (None, {})):
        file.write_text(json.dumps({**ensemble, "calibration": calibration}))
        read = read_calibration(RunDirectory(tmp_path))
        assert (read.thresholds if read else {}) == thresholds


def test_the_curve_ranks_by_logits(run: Path, made: SimpleNamespace) -> None:
    """Of images that all have the probability 1 in float32 the ROC curve still has its corners."""
    logits = {"k0": 18, "k1": 19, "k2": 25, "k3": 26}
    samples = [
        Prediction(key, label, {"a": 1.0}, {"a": logit}, "multilabel")
        for (key, logit), label in zip(logits.items(), ("", "", "a", "a"), strict=True)
    ]
    ((_, _, chart),) = roc_charts("x", samples, {"classes": {"a": {}}})
    sharp = pictures.roc_chart("x-roc0", np.array([0, 0, 1, 1], bool), np.array([0, 1, 2, 3]))
    assert chart == sharp


def test_the_curve_of_many_images_is_thinned_unseen() -> None:
    """100,000 images draw a curve of few corners, each where the sorted images have it."""
    rng = np.random.default_rng(0)
    is_class = rng.random(100_000) < 0.3
    score = rng.normal(is_class, 1)
    chart = pictures.roc_chart("x", is_class, score)
    longest = max(re.findall(r'd="([^"z]*)"', chart), key=len)
    drawn = np.array(re.findall(r"[ML] (\S+) (\S+)", longest), float).T
    assert 100 < drawn.shape[1] <= 801
    x, y = np.abs(drawn - drawn[:, :1]) / np.ptp(drawn, axis=1, keepdims=True)
    ranked = is_class[np.argsort(-score)]
    false_rate, true_rate = np.cumsum(~ranked) / (~ranked).sum(), np.cumsum(ranked) / ranked.sum()
    assert np.abs(y - np.interp(x, false_rate, true_rate)).max() < 0.003


def test_undefined_numbers_are_dashes_with_a_reason(run: Path) -> None:
    """A null is shown as a dash, and the page says which number and why."""

    def undefine(metrics: dict[str, Any]) -> None:
        metrics["classes"]["COVID-19"].update(precision=None, f1=None)
        metrics["macro"].update(precision=None)

    assert "not defined" not in write(run)
    change_json(run / "test" / "metrics.json", undefine)
    text = str(Text(write(run)))
    recall, auroc = (
        number(json.loads((run / "test" / "metrics.json").read_text())["classes"]["COVID-19"][name])
        for name in ("recall", "auroc")
    )
    assert f"COVID-19 {recall} {DASH} {DASH} {auroc}" in text
    assert "Precision of COVID-19: it needs an image predicted as this" in text
    assert "Mean Precision: it needs the value of every class" in text
    assert "Recall of" not in text


def test_every_number_has_its_interval_and_of_how_many(run: Path) -> None:
    """In the headline and the table of classes; what metrics of older versions lack is left out."""
    path = run / "test" / "metrics.json"
    assert "Specificity" not in write(run)
    images = read_scored(run / "test" / "predictions.csv", "multiclass")
    metrics = measure(images, Settings(replicates=200))
    path.write_text(json.dumps(metrics))
    text = str(Text(write(run)))
    low, high = map(percent, metrics["accuracy_interval"])
    patients = metrics["intervals"]["patients"]
    correct = int(np.trace(metrics["confusion_matrix"]))
    of_all = f"{correct} of {len(images)} images correct; 95 % interval"
    assert " ".join(f"{of_all} {low} to {high}, {patients} patients".split()) in text
    for name, scores in metrics["classes"].items():
        cells = [f"{scores['positives']} of {len(images)}"]
        cells.append(f"{scores['positive_patients']} of {patients}")
        for score in MEASURES["multiclass"]:
            low, high = scores[f"{score}_interval"]
            cells.append(f"{scores[score]:.3f} {low:.3f} to {high:.3f}")
        assert f"{name} {' '.join(cells)}" in text
    low, high = metrics["macro"]["auroc_interval"]
    assert f"AUROC {metrics['macro']['auroc']:.3f} 95 % interval {low:.3f} to {high:.3f}" in text


def test_a_headline_of_too_few_images_is_not_a_number(run: Path) -> None:
    """All classes have fewer images than are asked for, and so has the split."""
    images = read_scored(run / "test" / "predictions.csv", "multiclass")
    metrics = measure(images, Settings(replicates=50, fewest=1000))
    (run / "test" / "metrics.json").write_text(json.dumps(metrics))
    text = str(Text(write(run)))
    assert f"Accuracy too few to say {len(images)} images" in text
    assert "AUROC too few to say mean of 0 of 3 classes" in text
    few = metrics["classes"]["COVID-19"]["too_few"]
    assert f"COVID-19 too few to say: {few} " in text


def test_one_image_of_one_patient_is_told_in_the_singular(run: Path) -> None:
    """On the first page: the verdict, the tile of the accuracy, and what intervals rest on."""
    table = run / "test" / "predictions.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:2]))
    images = read_scored(table, "multiclass")
    metrics = measure(images, Settings(replicates=50, fewest=1))
    (run / "test" / "metrics.json").write_text(json.dumps(metrics))
    text = str(Text(write(run)))
    assert re.search(r"Right on \S+ % of 1 test image of 1 patient;", text.replace("\xa0", " "))
    assert re.search(r"[01] of 1 image correct; .* 1 patient\b", text)
    assert "by a bootstrap over 1 patient, each" in text


@pytest.mark.filterwarnings("ignore:No positive samples")
def test_class_without_images_has_no_curve(run: Path, made: SimpleNamespace) -> None:
    """A class that the split lacks gets a sentence where its ROC curve would be."""
    rows = [row for row in made.make_predictions() if row["label"] != "COVID-19"]
    made.write_evaluation(run / "test", rows)
    change_json(
        run / "test" / "metrics.json",
        lambda metrics: metrics["classes"]["COVID-19"].update(auroc=None, recall=None),
    )
    page = write(run)
    assert page.count("No curve: it needs images of this") == 1
    assert "AUROC of COVID-19: it needs images of this class and of others." in page


@pytest.mark.parametrize(
    ("missing", "command", "times"),
    [
        ("test", "cxrdist evaluate --run RUN --shards SHARDS --split test", 1),
        ("test/relevance.csv", "cxrdist explain --run RUN --shards SHARDS --split test", 3),
        ("test/predictions.csv", "cxrdist evaluate --run RUN --shards SHARDS --split test", 1),
        ("test/metrics.json", "cxrdist evaluate --run RUN --shards SHARDS --split test", 2),
        ("log.jsonl", "cxrdist train --config RECIPE --shards SHARDS --run RUN", 2),
        ("test/text.json", "cxrdist probe-text --run RUN --shards SHARDS --split test", 1),
        ("audit.json", "cxrdist check --audit SHARDS", 1),
        ("recipe.yaml", "cxrdist train --config RECIPE --shards SHARDS --run RUN", 1),
    ],
)
def test_absent_files_leave_a_line_with_the_command(
    run: Path, missing: str, command: str, times: int
) -> None:
    """What was not made yet is replaced by the command that makes it; the rest stands."""
    path = run / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    text = str(Text(write(run)))
    assert text.count(command) == times
    assert "How it was split" in text


def test_a_network_without_rules_has_no_heat_maps(run: Path) -> None:
    """The page and the checklist say why, and no command is named that would be refused."""
    classes = json.loads((run / "run.json").read_text())["shards"]["classes"]
    (run / "model").mkdir()
    save_model(Classifier(Network(architecture="convnext_atto"), classes, 32), run / "model")
    for path in ("relevance.csv", "relevance.json", "text.json"):
        (run / "test" / path).unlink()
    text = str(Text(write(run)))
    assert "Heat maps There are none: no relevance rules are proven for ConvNeXt-Atto" in text
    for command in ("explain", "localise", "probe-text"):
        assert f"cxrdist {command}" not in text
    checklist = (run / "checklist.html").read_text()
    assert "No heat maps: no relevance rules are proven for ConvNeXt-Atto." in checklist


def test_run_that_is_not_finished(run: Path) -> None:
    """A run in its first stage has a report; a row cut off by a kill is no obstacle."""

    def back(info: dict[str, Any]) -> None:
        info.update(finished=None)
        del info["stages"]["unfreeze"]

    change_json(run / "run.json", back)
    lines = (run / "log.jsonl").read_text().splitlines()
    (run / "log.jsonl").write_text("\n".join(lines[:6]) + '\n{"kind": "epo')
    text = str(Text(write(run)))
    assert "Duration not finished" in text
    assert "Stage 2: unfreeze This stage is not done." in text


def test_epochs_done_again_count_once(run: Path) -> None:
    """Of an epoch that was logged twice, by a run that was resumed, the last one is shown."""
    log = run / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    again = next(row for row in rows if row["kind"] == "epoch" and row["epoch"] == 2)
    log.write_text(log.read_text() + json.dumps({**again, "loss": 0.987654}) + "\n")
    page = write(run)
    assert f"<td>{number(again['loss'])}</td><td>{number(again['val_loss'])}</td>" not in page
    assert page.count("<td>0.988</td><td>") == 1


@pytest.mark.parametrize(
    ("file", "content", "mend"),
    [
        ("run.json", None, "give the directory of a `cxrdist train`"),
        ("run.json", "{", "copy the run directory again, or train in a new one"),
        ("run.json", '{"format": "cxrdist-run-2"}', "copy the run directory again"),
        ("run.json", '{"format": "cxrdist-run-1"}', "started: is missing"),
        ("recipe.yaml", "a: [", "or remove the file if the training is finished"),
        ("recipe.yaml", "copies: 3", "copies: is 3, expected an object"),
        ("audit.json", '{"format": "cxrdist-audit-9"}', "run `cxrdist check --audit` again"),
        ("audit.json", '{"format": "cxrdist-audit-1"}', "task: is missing"),
        ("log.jsonl", "not json\n", "or remove the file if the training is finished"),
        ("log.jsonl", '{"kind": "epoch", "stage": "head", "epoch": 1}\n', "val_loss: is missing"),
        ("test/metrics.json", "[]", "run `cxrdist evaluate` again"),
        ("test/metrics.json", '{"format": "cxrdist-metrics-9"}', "run `cxrdist evaluate` again"),
        ("test/predictions.csv", "key,label\n1,2\n", "no column prob_CLASS"),
        ("test/predictions.csv", "key,patient,label,prob_a\nk,p,a,0.5\n", "no column logit_a"),
        ("test/predictions.csv", f"{PREDICTED}k,p,b,0.5,0\n", "line 2: there is no column prob_b"),
        ("test/predictions.csv", f"{PREDICTED}k,p,a,nan,0\n", "not within 0 and 1"),
        ("test/predictions.csv", f"{PREDICTED}k,p,a,0.5,nan\n", "nan is not a finite number"),
        ("test/predictions.csv", f"{PREDICTED}k,p,a,0.5\n", "run `cxrdist evaluate` again"),
        ("test/predictions.csv", f"{PREDICTED}k,p,a,0.5,0,0\n", "expected 5 fields"),
        ("test/predictions.csv", f"key,{PREDICTED}j,k,p,a,0.5,0\n", "two columns have the same"),
        ("test/predictions.csv", f"{PREDICTED}k,p,a,0.5,0\n", "expected the classes of"),
        ("test/relevance.csv", "key,class\nk,a\n", "misses 'logit'"),
        ("test/text.json", "{", "run `cxrdist probe-text` again"),
        ("test/text.json", '{"format": "cxrdist-text-1"}', "split: is missing"),
        ("test/text.json", '{"format": "cxrdist-text-9"}', "run `cxrdist probe-text` again"),
        ("test/relevance.json", "{}", "run `cxrdist explain` again"),
        ("test/relevance.json", '{"how": {}, "sanity": null}', "how.preset: is missing"),
        (
            "test/relevance.csv",
            "key,class,logit,relevance_sum,bias_share,epsilon_share,picture\nk,a,1,1,0,0,../p\n",
            "'../p' is not the name of a file",
        ),
    ],
)
def test_broken_files_are_named_in_one_line(
    run: Path, file: str, content: str | None, mend: str
) -> None:
    """A broken file gives one line with its name and the mend, and no half-written report."""
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_text(content)
    with pytest.raises(CxrdistError) as caught:
        write(run)
    message = str(caught.value)
    assert "\n" not in message
    assert mend in message
    assert Path(file).name in message
    assert not list(run.glob("*report.html*"))


def test_each_number_of_ranks_is_shown_with_its_steps(run: Path) -> None:
    """A run that was resumed on one process was not trained on that alone."""
    info = json.loads((run / "run.json").read_text())
    launches = [(2, "cuda: A", 0), (1, "cpu", 1200)]
    names = ("world_size", "device", "from_step")
    info["launches"] = [dict(zip(names, launch, strict=True)) for launch in launches]
    (run / "run.json").write_text(json.dumps(info))
    shown = " ".join(write(run).split())
    expected = "2 processes on cuda: A from step 1, 1 process on cpu from step 1,201"
    assert shown.count(expected) == 2


@pytest.mark.parametrize(("tf32", "shown"), [(False, "off"), (True, "allowed"), (None, "not rec")])
def test_the_precision_of_the_training_is_shown(run: Path, tf32: bool | None, shown: str) -> None:
    """TensorFloat-32 is said beside mixed precision; older runs did not record it."""
    info = json.loads((run / "run.json").read_text())
    info |= {"mixed_precision": "no", "tf32": tf32}
    if tf32 is None:
        del info["tf32"]
    (run / "run.json").write_text(json.dumps(info))
    assert f"fp32; TensorFloat-32 {shown}" in " ".join(write(run).split())


def test_maps_are_shown_with_their_test(run: Path) -> None:
    """Areas, ledger residual and rules stand in the page; maps that fail the test get a warning."""
    page = write(run)
    for shown in ("<b>0.625</b>", "<b>0.075</b>", "closes to 2.5e-07", "canonical"):
        assert shown in page
    assert 'aria-label="Probability while the image is covered"' in page
    assert "do not\n  read single places" not in page
    file = run / "test" / "relevance.json"
    info = json.loads(file.read_text())
    info["pixel_flipping"]["area_over_relevant_first"] = 0.1
    file.write_text(json.dumps(info))
    assert "do not\n  read single places" in write(run)


def test_maps_without_a_ledger_are_shown(run: Path) -> None:
    """Rules without a ledger leave its columns empty; nothing is made up for them."""
    table = run / "test" / "relevance.csv"
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    with open(table, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([rows[0], *([*row[:4], "", "", row[6]] for row in rows[1:])])
    page = write(run)
    assert "no ledger" in page
    assert "The rules of these maps keep no ledger" in page


def test_broken_picture_is_named(run: Path) -> None:
    """A heat map that is no image gives one line with its name."""
    picture = next(iter(sorted((run / "test" / "heatmaps").glob("*.class-0.png"))))
    picture.write_bytes(b"no image")
    with pytest.raises(CxrdistError, match=re.escape(picture.name)):
        write(run)


def test_metrics_of_another_evaluation_are_refused(run: Path) -> None:
    """Predictions and metrics that do not belong together make no report."""

    def swap(metrics: dict[str, Any]) -> None:
        metrics["confusion_matrix"][0][0] -= 1
        metrics["confusion_matrix"][0][1] += 1

    change_json(run / "test" / "metrics.json", swap)
    with pytest.raises(CxrdistError, match="confusion matrices differ"):
        write(run)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *(("a", "positives", 1), ("a", "recall", 0.51), ("a", "recall", None), ("a", "known", 2)),
        *(("b", "positives", 1), ("b", "recall", 0.0), ("b", "known", 3), ("", "samples", 4)),
    ],
)
def test_metrics_of_other_labels_are_refused(
    tmp_path: Path, name: str, field: str, value: float | None
) -> None:
    """Counted by hand: a is found on one of its two images; b is on none, and unknown on one."""
    samples = [
        Prediction("1", "a", {}, {"a": 2.0, "b": -1.0}, "multilabel"),
        Prediction("2", "a", {}, {"a": -2.0, "b": 1.0}, "multilabel", missing="b"),
        Prediction("3", "", {}, {"a": 3.0, "b": -2.0}, "multilabel"),
    ]
    classes = {
        "a": {"known": 3, "positives": 2, "recall": 0.5},
        "b": {"known": 2, "positives": 0, "recall": None},
    }
    metrics: Any = {"task": "multilabel", "samples": 3, "classes": classes}
    check_same_evaluation(RunDirectory(tmp_path), "test", metrics, samples)
    fewer = {**metrics, "classes": {"a": classes["a"]}}
    with pytest.raises(CxrdistError, match=r"expected the classes of predictions\.csv beside it;"):
        check_same_evaluation(RunDirectory(tmp_path), "test", fewer, samples)
    (classes[name] if name else metrics)[field] = value
    with pytest.raises(CxrdistError, match="but the counts of the labels differ; run `cxrdist"):
        check_same_evaluation(RunDirectory(tmp_path), "test", metrics, samples)


def test_the_audit_stands_before_the_results(run: Path, made: SimpleNamespace) -> None:
    """Its warnings, tables and the pictures of each pair are those of audit.json."""
    found = json.loads((run / "audit.json").read_text())
    page = write(run)
    text = str(Text(page))
    assert len(found["duplicates"]["pairs"]) == 2
    assert [pair["kind"] for pair in found["duplicates"]["pairs"]] == ["exact", "near"]
    assert all(f"data:image/jpeg;base64,{code}" in page for code in found["thumbnails"].values())
    assert all(" ".join(line.split()) in text for line in found["warnings"])
    assert text.index(found["warnings"][0]) < text.rindex("Results on test")
    assert f"The audit of the data has {len(found['warnings'])} warnings" in text
    for pair in found["duplicates"]["pairs"]:
        assert all(image["path"] in text for image in pair["images"])
    for name in made.CLASSES:
        counts = found["sources"]["counts"]["images"]
        assert f"{name} {counts[name]} 0.0 %" in text
        score = found["shortcut"]["auroc"][name]
        assert f"{name} {score['value']:.3f} {score['low']:.3f} to {score['high']:.3f}" in text
    assert "1 patient has images in several classes" in text


def test_masks_are_counted_where_the_shards_have_some(run: Path) -> None:
    """Images with a mask by split and the shares covered; not a word where there are none."""
    assert "mask" not in str(Text(write(run)))
    path = run / "audit.json"
    classes = json.loads(path.read_text())["classes"]
    both = {
        "with a mask": dict.fromkeys((*classes, "all"), 3),
        "without a mask": dict.fromkeys((*classes, "all"), 1),
    }
    splits = {name: {"with a mask": 1203, "without a mask": 4} for name in ("train", "val", "test")}
    masks = {"images": 3609, "least": 0.0924, "median": 0.3622, "most": 0.6152}
    masks |= {"empty": 2, "full": 0, "splits": splits, "counts": both}
    masks |= {"association": dict.fromkeys(classes, 0.5), "own": dict.fromkeys(classes, 0.0)}
    change_json(path, lambda found: found.update({"masks": masks}))
    text = str(Text(write(run))).replace("\N{NO-BREAK SPACE}", " ")
    assert "1,203 of 1,207 in train, 1,203 of 1,207 in val, 1,203 of 1,207 in test." in text
    assert "cover 9.2 % to 61.5 % of the square, median 36.2 %; 2 cover nothing." in text
    assert "Images of each class by mask" in text


def test_parts_of_the_audit_that_were_not_made_are_named(run: Path) -> None:
    """The page gives the reason in place of the part, and never says that nothing was found."""
    path = run / "audit.json"
    found = json.loads(path.read_text()) | {"warnings": [], "thumbnails": {}}
    parts = ("duplicates", "sources", "views", "statistics", "shortcut", "in_pre_training")
    found |= dict.fromkeys(parts) | {"not_made": {name: f"why {name}" for name in parts}}
    path.write_text(json.dumps(found))
    page = write(run)
    for name in parts:
        assert f"<code>{name}</code>: why {name}" in page
    assert "Nothing was found" not in page


def test_hostile_audits_are_refused_or_escaped(run: Path) -> None:
    """A picture that is no base64 is refused, a name is text."""
    path = run / "audit.json"
    change_json(path, lambda found: found["warnings"].append("<script>alert(1)</script>"))
    page = write(run)
    assert "script" not in Text(page).elements
    key = next(iter(json.loads(path.read_text())["thumbnails"]))
    change_json(path, lambda found: found["thumbnails"].update({key: 'x" onerror="alert(1)'}))
    with pytest.raises(CxrdistError, match=r"audit\.json"):
        write(run)


def test_the_probe_for_words_stands_after_the_results(run: Path, made: SimpleNamespace) -> None:
    """Its numbers are shown as they are, hostile names as text, what is undefined as a dash."""
    page = write(run)
    text = str(Text(page))
    section = text[text.index("Does the network read the words? X-rays") :]
    assert text.index("are classified wrongly") < text.index(section)
    assert "7 of 180 images have text, in 9 boxes. They are in <i>boxes & more.csv" in section
    assert f"{made.ODD_CLASS} 60 7 <b>R (4), AP (1)" in section
    assert "Likeliest class changes \N{EM DASH} 3 5" in section
    assert (
        "NORMAL 60 98.51 % \u2192 98.45 % 10.00 % \u2192 10.00 % 0.4471 % \u2192 0.4595 % 2"
        in section
    )
    assert "its letters 10 of 224 px high" in section
    assert f"{made.ODD_CLASS} 0 {DASH} {DASH} {DASH} 0" in section
    assert f"{made.ODD_CLASS} 7 21.4 % 2.1 % 10.190" in section
    assert f"COVID-19 0 {DASH} {DASH} {DASH}" in section
    assert section.count("said <nothing>") == 3
    change_json(run / "test" / "text.json", lambda found: found["pictures"][0].update(map="../x"))
    with pytest.raises(CxrdistError, match="is not the name of a file"):
        write(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["covering"]["fill"]["classes"].pop("NORMAL"), "covering.fill: lacks a class"),
        (lambda f: f["paste"]["classes"][0]["after"].pop(), "expected 3 probabilities before and"),
        (lambda f: f["pictures"][0]["before"].append(0.5), "expected 3 probabilities before and"),
    ],
)
def test_a_probe_for_words_that_lacks_a_class_is_refused(
    run: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    """Its tables have a column or a row for each class."""
    change_json(run / "test" / "text.json", change)
    with pytest.raises(CxrdistError, match=message):
        write(run)


def test_other_shards_are_pointed_out(run: Path) -> None:
    """An evaluation on other shards than the training's is marked as one."""
    path = run / "test" / "metrics.json"
    own = json.loads((run / "run.json").read_text())["shards"]["index_sha256"]
    change_json(path, lambda metrics: metrics.update(index_sha256=own))
    assert "other shards" not in write(run)
    change_json(path, lambda metrics: metrics.update(index_sha256="f" * 64))
    text = str(Text(write(run)))
    assert f"other shards than those of the training: sha256 of the index {'f' * 64}" in text


def test_percent_agrees_with_three_decimals() -> None:
    """A share reads the same in percent and with three decimals, whatever its binary value."""
    for thousandths in range(0, 20001):
        value = thousandths / 20000
        assert float(percent(value)[:-2]) == pytest.approx(float(number(value)) * 100, abs=1e-9)
    assert percent(None) == number(None) == number(float("nan")) == DASH


def test_zero_has_no_sign() -> None:
    """A share of a ledger that rounds to 0 is 0.000, whatever its sign."""
    assert number(-0.0004) == number(-0.0) == "0.000"
    assert number(-0.0006) == "\u22120.001"


def test_a_time_has_its_zone() -> None:
    """Runs of several sites are compared; a time without a zone gets none."""
    assert moment("2026-03-01T09:00:59+00:00") == "2026-03-01 09:00 UTC"
    assert moment("2026-03-01T09:00:00+05:30") == "2026-03-01 09:00 UTC+05:30"
    assert moment("2026-03-01T09:00:00") == "2026-03-01 09:00"
    assert moment(None) == DASH


def test_charts_do_not_depend_on_the_users_settings() -> None:
    """The user's matplotlib settings change nothing and are left as they were."""
    import matplotlib as mpl

    before = pictures.score_chart("a", [1, 2], [0.5, 0.6], 2, "accuracy")
    with mpl.rc_context({"axes.linewidth": 9, "font.size": 33}):
        assert pictures.score_chart("a", [1, 2], [0.5, 0.6], 2, "accuracy") == before
        assert mpl.rcParams["font.size"] == 33
    assert "currentColor" in before
    assert pictures.INK not in before
    assert "DejaVu" not in before


def test_the_verdict_names_gaps_and_external_sets() -> None:
    """Flagged gaps with their corrected interval, at most five; each external set in a line."""
    gap = {"column": "sex", "label": "Mass", "measure": "auroc", "higher": "M", "lower": "F"}
    gap |= {"difference": 0.2, "interval": [0.05, 0.35], "flagged": True}
    small = {**gap, "label": None, "measure": "accuracy", "flagged": False}
    lines = gap_lines({"groups": {"gaps": [gap, small]}})
    assert lines == [
        "AUROC of Mass differs by sex: F is 0.200 below M (95 % interval 0.050 to 0.350, "
        "corrected for all comparisons)."
    ]
    assert len(gap_lines({"groups": {"gaps": [gap] * 7}})) == 6
    assert gap_lines({}) == []
    metrics = {"task": "multiclass", "samples": 40, "accuracy": 0.75, "classes": {}}
    info = {"name": "rural", "seen": "report", "seen_images": 3, "not_known": None}
    metrics |= {"accuracy_interval": [0.6, 0.9], "external": info}
    external = {"name": "external set rural", "metrics": metrics, "samples": None}
    (line,) = external_lines([{"metrics": None}, {"metrics": {}}, external])
    said = "External set rural: right on 75.0 % of 40 images{}; 95 % interval 60.0 % to 90.0 %."
    assert line.replace("\u00a0", " ") == said.format(" (the network has seen 3 of them)")
    info["seen"] = "drop"
    (line,) = external_lines([external])
    assert line.replace("\u00a0", " ") == said.format("")
    (line,) = external_lines([{**external, "metrics": {**metrics, "fewest": 50}}])
    assert line == "External set rural: too few to say (40 images)."
    alone = metrics | {"samples": 1, "fewest": 50, "intervals": {"patients": 1}}
    (line,) = external_lines([{**external, "metrics": alone}])
    assert line == "External set rural: too few to say (1 image of 1 patient)."


# In a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def whole_page(whole_run: Path) -> Path:
    return report(ReportConfig(run=whole_run))


def show(browser: webdriver.Chrome, page: Path, width: int, theme: str) -> None:
    """Open a page at a width (px) in a theme (light, dark), with the logs emptied before."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": theme}]},
    )
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.as_uri())


def requests(browser: webdriver.Chrome) -> list[str]:
    """The addresses that the page asked for since the log was read last."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
    return [event["params"]["request"]["url"] for event in sent]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375, 360])
def test_page_opens_whole(
    browser: webdriver.Chrome, whole_page: Path, width: int, theme: str, made: SimpleNamespace
) -> None:
    """Every picture is drawn, nothing is fetched, nothing complains, nothing is wider."""
    show(browser, whole_page, width, theme)
    images = browser.find_elements(By.TAG_NAME, "img")
    assert len(images) > 40
    assert {image.get_property("naturalWidth") for image in images} == {224, 96}
    assert all(image.get_attribute("alt") for image in images)
    assert browser.get_log("browser") == []
    assert [url for url in requests(browser) if not url.startswith("data:")] == [
        whole_page.as_uri()
    ]
    wide = "return [document.documentElement.scrollWidth, window.innerWidth]"
    scroll, inner = browser.execute_script(wide)
    assert inner == width
    assert scroll <= width
    ink, paper = browser.execute_script(
        "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    )
    assert (brightness(ink) < brightness(paper)) == (theme == "light")
    charts = browser.find_elements(By.CSS_SELECTOR, ".charts svg")
    assert len(charts) == 2 * 2 + len(made.CLASSES) + 1
    label = charts[0].find_element(By.CSS_SELECTOR, "text").value_of_css_property("fill")
    assert label == ink
    assert all(chart.get_attribute("aria-label") for chart in charts)


def brightness(colour: str) -> int:
    """Sum of the channels of rgb(r, g, b)."""
    return sum(map(int, re.findall(r"\d+", colour)[:3]))


def test_numbers_are_those_of_the_metrics(browser: webdriver.Chrome, whole_page: Path) -> None:
    """The tables in the browser hold the numbers of metrics.json, and the headline agrees."""
    show(browser, whole_page, 1280, "light")
    metrics = json.loads((whole_page.parent / "test" / "metrics.json").read_text())
    measures = ["recall", "precision", "f1", "auroc"]
    rows = [
        [cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td")]
        for row in browser.find_elements(By.CSS_SELECTOR, ".metrics tbody tr")
    ]
    named = {**metrics["classes"], "Mean of all classes": metrics["macro"]}
    assert rows == [[k, *(f"{v[name]:.3f}" for name in measures)] for k, v in named.items()]
    cells = browser.find_elements(By.CSS_SELECTOR, ".confusion td:not(.total)")
    counts = [int(cell.text.split()[0]) for cell in cells]
    assert counts == np.array(metrics["confusion_matrix"]).ravel().tolist()
    shares = [float(cell.text.split()[1]) for cell in cells]
    confusion = np.array(metrics["confusion_matrix"])
    expected = 100 * confusion / confusion.sum(axis=1, keepdims=True)
    assert shares == pytest.approx(expected.ravel().tolist(), abs=0.05001)
    tiles = [tile.text for tile in browser.find_elements(By.CSS_SELECTOR, ".tiles li")]
    assert f"{metrics['accuracy']:.1%}" in tiles[0].replace(" ", "")
    assert f"{np.trace(confusion)} of {metrics['samples']} images" in tiles[0]
    assert [tile.splitlines()[1] for tile in tiles[1:]] == rows[-1][1:]


def test_headings_step_by_one(browser: webdriver.Chrome, whole_page: Path) -> None:
    """No heading skips a level, and every table says what its rows and columns are."""
    show(browser, whole_page, 1280, "light")
    levels = [
        int(heading.tag_name[1])
        for heading in browser.find_elements(By.CSS_SELECTOR, "h1, h2, h3, h4, h5, h6")
    ]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert not browser.find_elements(By.CSS_SELECTOR, "th:not([scope])")


def test_page_without_results_opens(browser: webdriver.Chrome, run: Path) -> None:
    """A run that was only trained has a page that fits the phone and says what comes next."""
    shutil.rmtree(run / "test")
    show(browser, report(ReportConfig(run=run)), 360, "dark")
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    assert "cxrdist evaluate" in browser.find_element(By.TAG_NAME, "main").text


def test_long_names_do_not_widen_the_page(browser: webdriver.Chrome, run: Path) -> None:
    """A class name of 150 letters without a space stays inside the phone's width."""
    for file in ("run.json", "test/metrics.json", "test/predictions.csv", "test/relevance.csv"):
        path = run / file
        path.write_text(path.read_text().replace("COVID-19", "pneumonoultra" * 12))
    show(browser, report(ReportConfig(run=run)), 360, "light")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360


def shown_mistakes(browser: webdriver.Chrome) -> list[str]:
    """Keys of the mistakes that can be seen."""
    cards = browser.find_elements(By.CSS_SELECTOR, ".filtered .case .key")
    return [card.text for card in cards if card.is_displayed()]


def test_filters_narrow_the_mistakes(
    browser: webdriver.Chrome, whole_page: Path, made: SimpleNamespace
) -> None:
    """By class and by group, both at once, with the keyboard too; print and reset show all."""
    show(browser, whole_page, 1280, "light")
    wrong = wrong_rows(whole_page.parent, made)
    assert shown_mistakes(browser) == [row["key"] for row in wrong]

    def click(legend: str, value: str) -> None:
        path = f"//fieldset[legend='{legend}']/label[starts-with(normalize-space(), '{value}')]"
        browser.find_element(By.XPATH, path).click()

    click("Truth", "COVID-19")
    assert shown_mistakes(browser) == [r["key"] for r in wrong if r["label"] == "COVID-19"]
    click("Sex", "F")
    both = [row["key"] for row in wrong if row["label"] == "COVID-19" and row["sex"] == "F"]
    assert 0 < len(both) < len(wrong)
    assert shown_mistakes(browser) == both
    count = browser.find_element(By.CSS_SELECTOR, ".shown")
    after = "return getComputedStyle(arguments[0], '::after').content"
    assert browser.execute_script(after, count) == "counter(shown)"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert len(shown_mistakes(browser)) == len(wrong)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen"})
    browser.find_element(By.CSS_SELECTOR, ".filters [type=reset]").click()
    assert len(shown_mistakes(browser)) == len(wrong)
    first = browser.find_element(By.CSS_SELECTOR, ".filters fieldset:first-child input")
    first.send_keys(Keys.ARROW_RIGHT)  # the next class, as a screen reader's user chooses it
    assert shown_mistakes(browser) == [r["key"] for r in wrong if r["label"] == made.ODD_CLASS]
    first.send_keys(Keys.ENTER)  # no form is sent
    assert browser.current_url == whole_page.as_uri()
    assert browser.get_log("browser") == []


def test_mistakes_can_be_read(browser: webdriver.Chrome, whole_page: Path) -> None:
    """An X-ray of 224 px is shown at twice its size on a desktop, and as wide as a phone allows."""
    for width, least in ((1280, 448), (390, 330)):
        show(browser, whole_page, width, "light")
        images = browser.find_elements(By.CSS_SELECTOR, ".filtered .views img")
        assert len(images) > 10
        assert all(image.size["width"] >= least for image in images)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_the_verdict_comes_first(browser: webdriver.Chrome, run: Path) -> None:
    """The figure, its interval, images and patients, then what size and border alone give."""
    change_json(
        run / "test" / "metrics.json", lambda metrics: metrics.update(accuracy_interval=[0.8, 0.9])
    )
    show(browser, report(ReportConfig(run=run)), 1280, "light")
    section = browser.find_element(By.CSS_SELECTOR, "main > section").text.replace("\u00a0", " ")
    metrics = json.loads((run / "test" / "metrics.json").read_text())
    figure = f"{metrics['accuracy']:.1%}".replace("%", " %")
    said = f"Right on {figure} of 180 test images of 60 patients; 95 % interval 80.0 % to 90.0 %."
    assert said in section
    assert "size, border and brightness alone, without the lungs, give an accuracy of" in section
    assert "thumbnails of 32 px alone" in section
    warnings = json.loads((run / "audit.json").read_text())["warnings"]
    assert all(" ".join(line.split()) in section for line in warnings)
    titles = [heading.text for heading in browser.find_elements(By.CSS_SELECTOR, "h2")]
    assert titles[:2] == ["Verdict on test", "Results on test"]
    assert titles.index("Mistakes on test") < titles.index("Heat maps") < titles.index("Training")
    change_json(run / "test" / "metrics.json", lambda metrics: metrics.pop("accuracy_interval"))
    assert "Run cxrdist evaluate again for intervals by patient" in " ".join(write(run).split())


@pytest.mark.parametrize("width", [1280, 360])
def test_checklist_and_foreign_predictions_open_whole(
    browser: webdriver.Chrome, run: Path, tmp_path: Path, width: int
) -> None:
    """These pages fetch nothing, nothing complains, nothing is wider, and headings step by one."""
    report(ReportConfig(run=run))
    predictions = run / "test" / "predictions.csv"
    page = report(ReportConfig(predictions=predictions, out=tmp_path / "out"))
    for path in (run / "checklist.html", page):
        show(browser, path, width, "dark")
        assert browser.get_log("browser") == []
        assert [url for url in requests(browser) if not url.startswith("data:")] == [path.as_uri()]
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert not browser.find_elements(By.CSS_SELECTOR, "th:not([scope])")
        headings = browser.find_elements(By.CSS_SELECTOR, "h1, h2, h3, h4, h5, h6")
        levels = [int(heading.tag_name[1]) for heading in headings]
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
