"""`cxrdist compare` on the documents of two runs, from the command to the page."""

import csv
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from cxrdist.cli import main
from cxrdist.evaluate.compare import Comparison
from cxrdist.files import read_document, read_json, write_json, write_table
from cxrdist.run import RunDirectory

CLASSES = ["a", "<b>"]
RECIPE = {"stages": {"head": {"lr": {"head": 0.1}, "epochs": 2}}, "seed": 0, "copies": {}}


def make_run(folder, seed, recipe=RECIPE, subset="test"):
    """A run of which 60 images of 20 patients were evaluated; the first 30 are of the class a."""
    run, random = RunDirectory(folder), np.random.default_rng(seed)
    of_a = np.arange(60) < 30
    logits = np.round(np.stack([of_a, ~of_a], 1) + random.normal(size=(60, 2)), 3)
    probabilities = 1 / (1 + np.exp(-logits))
    rows = [
        [f"k{i:02d}", f"p{i // 3}", CLASSES[not of_a[i]], *probabilities[i], *logits[i]]
        for i in range(60)
    ]
    columns = [f"{what}_{name}" for what in ("prob", "logit") for name in CLASSES]
    write_table(run.predictions(subset), ["key", "patient", "label", *columns], rows)
    scores = dict.fromkeys(("recall", "precision", "f1", "auroc"))
    metrics = {"samples": 60, "task": "multiclass", "classes": {}, "macro": scores}
    write_json(run.metrics(subset), metrics)
    run.recipe.write_text(yaml.safe_dump(recipe))
    return folder, logits


@pytest.fixture
def pair(tmp_path):
    """Two runs, and the logits of both."""
    other = {**RECIPE, "seed": 1}
    return make_run(tmp_path / "one", 1), make_run(tmp_path / "two", 2, other)


def read_flipped(out):
    with open(out / "flipped.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_two_runs_are_compared_by_one_command(pair, tmp_path, capsys):
    """comparison.json, flipped.csv and the table agree with the logits; flips are all there."""
    (one, first), (two, second) = pair
    out = tmp_path / "out"
    assert main(["compare", str(one), str(two), "--out", str(out)]) == 0
    found = read_document(out / "comparison.json", Comparison)
    truth = (np.arange(60) >= 30).astype(int)
    right = [logits.argmax(1) == truth for logits in (first, second)]
    difference = found["accuracy"]["difference"]
    assert difference == pytest.approx(right[1].mean() - right[0].mean(), abs=1e-6)
    assert found["mcnemar"]["only_a"] == (right[0] & ~right[1]).sum()
    assert (found["intervals"]["patients"], found["intervals"]["unit"]) == (20, "patient")
    rows = read_flipped(out)
    flipped = np.flatnonzero(first.argmax(1) != second.argmax(1))
    assert sorted(row["key"] for row in rows) == [f"k{i:02d}" for i in flipped]
    changes = [row["change"] for row in rows]
    assert changes == sorted(changes)
    assert changes.count("right->wrong") == found["mcnemar"]["only_a"]
    row = rows[0]
    place = int(row["key"][1:])
    expected = 1 / (1 + np.exp(-second[place, truth[place]]))
    assert float(row["prob_b"]) == pytest.approx(expected, abs=1e-6)
    assert (row["class"], row["predicted_a"]) == (row["label"], row["label"])
    printed = capsys.readouterr().out
    (figures,) = (line.split() for line in printed.splitlines() if line.startswith("Accuracy "))
    accuracies = [f"{of_run.mean():.3f}" for of_run in right]
    assert figures[1:4] == [*accuracies, f"{difference:+.3f}"]
    assert "- seed: 0\n  + seed: 1" in printed
    assert "60 images of 20 patients" in printed


def test_the_page_needs_nothing_else_and_escapes_names(pair, tmp_path):
    """No script, no address, the same bytes again; a class named like a tag is text."""
    arguments = [str(run) for run, _ in pair]
    for name in ("out", "again"):
        assert main(["compare", *arguments, "--out", str(tmp_path / name)]) == 0
    page = (tmp_path / "out" / "page.html").read_text()
    assert page == (tmp_path / "again" / "page.html").read_text()
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(page)
    assert "script" not in {tag for tag, _ in tags}
    links = [a.get("src", a.get("href", "#")) for tag, a in tags if tag in ("a", "img", "link")]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "<h3>&lt;b&gt;</h3>" in page
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert page.count("<svg") == 1
    assert "+ seed: 1" in page


def test_external_sets_are_compared_by_name(tmp_path):
    """--name reads RUN/external/NAME of both runs."""
    runs = [str(make_run(tmp_path / n, i, subset="external/x")[0]) for i, n in enumerate("ab")]
    assert main(["compare", *runs, "--name", "x", "--out", str(tmp_path / "out")]) == 0
    found = read_document(tmp_path / "out" / "comparison.json", Comparison)
    assert found["place"] == "external/x"


def test_what_cannot_be_compared_is_one_line(pair, tmp_path, capsys):
    """Not evaluated there, or a directory that is there already: exit 2, nothing written."""
    one, two = (str(run) for run, _ in pair)
    out = str(tmp_path / "out")
    for arguments, message in (
        ([one, two, "--split", "val", "--out", out], "one: has no val/predictions.csv"),
        ([one, two, "--name", "y", "--out", out], "--shards SHARDS --name y"),
        ([one, two, "--out", one], "already exists; name a new or empty directory"),
        ([one, f"{two}s", "--out", out], f"{two}s: no such directory; give that of a finished"),
        ([one, two, "--name", "../x", "--out", out], "expected letters, digits"),
    ):
        assert main(["compare", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not (tmp_path / "out").exists()


def test_recipes_are_compared_field_by_field(tmp_path, capsys):
    """Each line has the whole name of the field; a stage that only one has, and their order."""
    stages = {"all": {"lr": {"head": 0.1}, "epochs": 1}, **RECIPE["stages"]}
    one, _ = make_run(tmp_path / "one", 1)
    two, _ = make_run(tmp_path / "two", 1, {**RECIPE, "stages": stages})
    assert main(["compare", str(one), str(two), "--out", str(tmp_path / "out")]) == 0
    found = read_document(tmp_path / "out" / "comparison.json", Comparison)
    assert found["recipe"] == [
        "- stages: head",
        "+ stages: all, head",
        "+ stages.all.epochs: 1",
        "+ stages.all.lr.head: 0.1",
    ]
    assert "decided differently: 0" in capsys.readouterr().out


def test_too_few_images_are_those_of_the_runs(pair, tmp_path, capsys):
    """One was evaluated with --fewest 31, more than the 30 of each class: no mean, and why."""
    runs = [run for run, _ in pair]
    metrics = read_json(runs[1] / "test" / "metrics.json")
    write_json(runs[1] / "test" / "metrics.json", {**metrics, "fewest": 31})
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    found = read_document(tmp_path / "out" / "comparison.json", Comparison)
    assert (found["fewest"], found["macro"]["auroc"]["a"]) == (31, None)
    said = "he means leave out classes with too few images: "
    assert f"{said}a (30 negatives), <b> (30 negatives)" in capsys.readouterr().out
    page = " ".join((tmp_path / "out" / "page.html").read_text().split())
    assert f"{said}a (30 negatives), &lt;b&gt; (30 negatives)</caption>" in page
