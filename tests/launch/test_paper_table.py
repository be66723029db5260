"""The table of launch/paper.sh and its thumbnails, against scikit-learn."""

import json
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from support import claim_shards
from table import Row, differ, interval, pool, seconds, table2, write_table
from thumbnails import thumbnails

from cxrdist.config import Network
from cxrdist.data.index import read_index
from cxrdist.data.shards import read_shard
from cxrdist.evaluate.scored import Scored, read_scored
from cxrdist.files import write_json
from cxrdist.model.densenet import Classifier, save_model
from cxrdist.run import RunDirectory

CLASSES = ["a", "b c", "d"]


@pytest.fixture(scope="module")
def drawn(shards, tmp_path_factory):
    """What the thumbnails of a draw leave in a folder of runs."""
    out = tmp_path_factory.mktemp("out") / "paper"
    thumbnails(shards, out, 1, out.parent / "cache")
    return out


def read_squares(shards):
    """Thumbnails of all samples by PIL, float64 [N, 1024], and the samples."""
    index = read_index(shards)
    squares = [pixels for shard in index.packed() for pixels, _ in read_shard(shard)]
    small = [Image.fromarray(p).resize((32, 32), Image.Resampling.BOX) for p in squares]
    return np.array([np.asarray(image).ravel() for image in small], float), index.samples


def test_thumbnails_are_told_apart_as_by_scikit_learn(drawn, shards):
    """predictions.csv of test, from models trained on train alone."""
    values, samples = read_squares(shards)
    labels = np.array([sample.label for sample in samples])
    of = {name: [i for i, s in enumerate(samples) if s.split == name] for name in ("train", "test")}
    for name, model in (
        ("logistic_regression", LogisticRegression(C=0.01, max_iter=1000)),
        ("perceptron", MLPClassifier((128,), alpha=1.0, max_iter=30, random_state=1)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = make_pipeline(StandardScaler(), model).fit(
                values[of["train"]].astype(np.float32), labels[of["train"]]
            )
        expected = fitted.predict_proba(values[of["test"]].astype(np.float32))
        run = RunDirectory(drawn / f"{name}-1")
        found = read_scored(run.predictions("test"), "multiclass")
        assert found.keys == [samples[i].key for i in of["test"]]
        assert 1 / (1 + np.exp(-found.logits)) == pytest.approx(expected, abs=1e-4)


def test_thumbnails_that_are_there_are_left_as_they_are(drawn, shards):
    """The same call again writes nothing."""
    files = {file: file.stat().st_mtime_ns for file in drawn.rglob("*") if file.is_file()}
    thumbnails(shards, drawn, 1)
    assert files == {f: f.stat().st_mtime_ns for f in drawn.rglob("*") if f.is_file()}


def make_scored(seed: int, images: int = 90, wrong: float = 0.2) -> Scored:
    """Images of three to a patient; a share of them is predicted wrongly."""
    random = np.random.default_rng(seed)
    truth = np.arange(images) // 3 % 3
    guess = np.where(random.random(images) < wrong, (truth + 1) % 3, truth)
    return Scored(
        "multiclass",
        CLASSES,
        [f"k{i}" for i in range(images)],
        [f"p{i // 3}" for i in range(images)],
        np.eye(3, dtype=np.int8)[truth],
        np.eye(3)[guess] + random.normal(0, 0.1, (images, 3)),
        {},
    )


def row_of(*tests: Scored) -> Row:
    """A row whose draws have these predictions."""
    row = Row({draw: RunDirectory(None) for draw in range(len(tests))})
    row.__dict__["tests"] = dict(enumerate(tests))
    return row


def truth_and_guess(*tests: Scored):
    return (
        np.concatenate([test.targets.argmax(1) for test in tests]),
        np.concatenate([test.logits.argmax(1) for test in tests]),
    )


def test_the_papers_table_2_is_of_all_draws_together():
    """Counts, recall, precision and F1 score are scikit-learn's of the pooled images."""
    tests = make_scored(0), make_scored(1)
    truth, guess = truth_and_guess(*tests)
    counts = confusion_matrix(truth, guess)
    precision, recall, f1, _ = precision_recall_fscore_support(truth, guess)
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table2(row_of(*tests)).splitlines()[2:]
    ]
    for i, name in enumerate(CLASSES):
        scores = [f"{score[i]:.3f}" for score in (recall, precision, f1)]
        assert lines[i] == [name, *map(str, counts[i]), *scores]
    assert lines[3][-3:] == [f"{score.mean():.3f}" for score in (recall, precision, f1)]


def test_a_class_that_is_never_predicted_has_no_precision():
    """A dash, also for the mean; its recall is 0."""
    test = make_scored(0)
    test.logits[:, 2] = -9
    lines = [line.split("|")[-4:-1] for line in table2(row_of(test)).splitlines()]
    assert [cell.strip() for cell in lines[4]] == ["0.000", "-", "0.000"]
    assert [cell.strip() for cell in lines[5]][1] == "-"


def test_a_patient_of_two_draws_counts_once():
    """The same images in two draws make no interval narrower, other patients do."""
    test = make_scored(0)
    alone, twice = (interval(pool(tests)) for tests in ({0: test}, {0: test, 1: test}))
    assert twice == pytest.approx(alone, abs=1e-9)
    others = make_scored(1)
    others = Scored(**{**vars(others), "patients": [f"other {p}" for p in others.patients]})
    low, high = interval(pool({0: test, 1: others}))
    assert high - low < 0.8 * (alone[1] - alone[0])


def test_the_difference_is_of_the_draws_that_both_have():
    """Paired by image; a network with fewer draws is compared on these alone."""
    first = {0: make_scored(0), 1: make_scored(1)}
    second = {1: make_scored(2, wrong=0.05)}
    accuracy = [accuracy_score(*truth_and_guess(tests[1])) for tests in (first, second)]
    found = differ(first, second)
    assert found["difference"] == pytest.approx(accuracy[1] - accuracy[0], abs=1e-6)
    low, high = found["interval"]
    assert low < found["difference"] < high


def test_the_interval_of_one_draw_is_that_of_evaluate(drawn):
    """accuracy_interval of its metrics.json."""
    run = RunDirectory(drawn / "perceptron-1")
    metrics = json.loads(run.metrics("test").read_text())
    found = read_scored(run.predictions("test"), "multiclass")
    assert interval(found) == metrics["accuracy_interval"]


def cells(page: str, run: str) -> list[str]:
    """The cells of a row of table.md by the run's name."""
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line]
    return next(row for row in rows if row[1:2] == [run])


def test_the_time_of_the_14_labels_is_read_from_their_log(tmp_path, shards):
    """Their rows have an AUROC and no accuracy."""
    run = claim_shards(tmp_path / "run", shards)
    info = json.loads((run / "run.json").read_text())
    info["shards"]["task"] = "multilabel"
    write_json(run / "run.json", info)
    scores = {"kind": "epoch", "stage": "all", "epoch": 1, "val_loss": 1.0, "val_auroc": 0.5}
    speed = {"kind": "speed", "stage": "all", "epoch": 1, "images_per_second": 1, "seconds": 90.0}
    (run / "log.jsonl").write_text(f"{json.dumps(scores)}\n{json.dumps(speed)}\n")
    assert seconds(RunDirectory(run)) == 90


def test_the_page_shows_what_was_run_and_says_what_was_not(drawn, shards):
    """Parameters, time and commit are those of the run's documents; the rest says "not run"."""
    run = claim_shards(drawn / "resnet18-1", shards)
    shutil.copytree(drawn / "perceptron-1" / "test", run / "test")
    info = json.loads((run / "run.json").read_text()) | {"git_revision": "0123456789ab+"}
    write_json(run / "run.json", info)
    network = Classifier(Network(4, (1, 1, 1, 1)), CLASSES, 32)
    (run / "model").mkdir()
    save_model(network, run / "model")
    about = {"kind": "epoch", "stage": "all", "val_loss": 1.0, "val_accuracy": 0.5}
    speed = {"kind": "speed", "stage": "all", "images_per_second": 1.0, "seconds": 90.0}
    rows = [{**kind, "epoch": epoch} for epoch in (1, 2) for kind in (about, speed)]
    (run / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    page = write_table(drawn.parent).read_text()
    found = cells(page, "resnet18")
    right = accuracy_score(
        *truth_and_guess(read_scored(run / "test/predictions.csv", "multiclass"))
    )
    count = sum(p.numel() for p in network.parameters())
    assert found[:5] == [
        "`paper/resnet18`",
        "resnet18",
        f"{count:,}",
        f"1: {100 * right:.1f}",
        found[4],
    ]
    assert found[7].startswith("+0.0 (")
    assert found[-3:] == ["3.0", "1 cpu", "012345678+"]
    sizes = [3 * (1024 + 1), 1024 * 128 + 128 + 128 * 3 + 3]
    assert [cells(page, name)[2] for name in ("logistic_regression", "perceptron")] == [
        f"{size:,}" for size in sizes
    ]
    assert cells(page, "alexnet")[2] == "not run"
    assert [line.split("|")[3].strip() for line in page.splitlines() if "`covid3/" in line] == [
        "not run"
    ] * 4
    assert "### paper/resnet18" in page
