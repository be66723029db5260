"""External sets: a directory of their own, seen images out of the scores, the model's classes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import contents, make_images, make_shards
from test_predictions import make_run, read_rows

from cxrdist.config import (
    Augmentation,
    EvaluateConfig,
    ExplainConfig,
    Network,
    PackConfig,
    ProbeTextConfig,
    ReportConfig,
    Stage,
    TrainConfig,
)
from cxrdist.data.boxes import Box, write_boxes
from cxrdist.data.chestxray14 import LABELS
from cxrdist.data.index import read_index
from cxrdist.data.pack import pack
from cxrdist.data.phantom import PATIENT_PATTERN, write_phantoms
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.external import (
    keep_seen,
    map_labels,
    seen_before,
    started_from_chexnet,
)
from cxrdist.evaluate.predictions import evaluate
from cxrdist.evaluate.seen import read_seen
from cxrdist.explain.export import explain
from cxrdist.probe_text import probe_text
from cxrdist.report.html import report
from cxrdist.run import RunDirectory
from cxrdist.train.loop import train

SIZE_PX = 48


def pack_phantoms(folder: Path, name: str, seed: int) -> Path:
    """Pack the phantoms of a folder with a seed of their splits."""
    options = {"size": SIZE_PX, "seed": seed, "workers": 1, "split": "0.5/0.1/0.4"}
    out = folder / name
    pack(PackConfig("folder", folder / "images", out, patient_pattern=PATIENT_PATTERN, **options))
    return out


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A small run on phantoms, evaluated, and the same phantoms packed with another seed."""
    folder = tmp_path_factory.mktemp("external")
    write_phantoms(folder / "images", 8, image_size_px=96)
    shards = pack_phantoms(folder, "shards", seed=0)
    pack_phantoms(folder, "again", seed=1)
    blocks = ("denseblock4", "head")
    train(
        TrainConfig(
            shards,
            folder / "run",
            {"all": Stage(dict.fromkeys(blocks, 0.003), epochs=1, patience=1)},
            init="none",
            global_batch_size=12,
            augmentation=Augmentation(degrees=5),
            network=Network(growth_rate=4, block_config=(2, 2, 2, 2)),
            cache=folder / "cache",
        )
    )
    evaluate(EvaluateConfig(folder / "run", shards, cache=folder / "cache"))
    return folder


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    """A copy of the run to write in."""
    return shutil.copytree(home / "run", tmp_path / "run")


def metrics_of(run: Path, subset: str) -> dict:
    return json.loads((run / subset / "metrics.json").read_text())


def keys_of(shards: Path, *splits: str) -> list[str]:
    return [sample.key for sample in read_index(shards).samples if sample.split in splits]


def test_a_run_keeps_what_it_has_seen_of_train_and_val(home):
    """Every train and val image once, by the hash of its pixels."""
    seen, index = read_seen(home / "run" / "seen.npz"), read_index(home / "shards")
    expected = {s.key: s.sha256 for s in index.samples if s.split != "test"}
    found = {key: bytes(digest).hex() for key, digest in zip(seen.keys, seen.sha256, strict=True)}
    assert found == expected
    assert seen.index_sha256 == index.sha256


def test_a_run_that_goes_on_keeps_what_it_has_and_takes_what_its_weights_have_seen(home, tmp_path):
    """seen.npz is written once; a run from another run's weights has seen the images of both."""
    index = read_index(home / "shards")
    images = np.load(home / "cache" / f"{index.sha256[:32]}.npy", mmap_mode="r")
    later = RunDirectory(tmp_path / "later")
    later.root.mkdir()
    keep_seen(later, index, images, seen_before(str(home / "run")))
    own = read_seen(home / "run" / "seen.npz").keys
    assert read_seen(later.seen).keys == own * 2
    before = later.seen.stat().st_mtime_ns
    keep_seen(later, index, images, seen_before("none"))
    assert later.seen.stat().st_mtime_ns == before


def test_images_packed_anew_are_found_and_the_score_is_of_the_others(home, run, capsys):
    """The demo with another seed: who was trained on is named and left out; RUN/test stays."""
    before = contents(run / "test")
    evaluate(EvaluateConfig(run, home / "again", cache=home / "cache"))
    tests, trained = keys_of(home / "again", "test"), {*keys_of(home / "shards", "train", "val")}
    seen = read_rows(run / "external" / "again" / "seen.csv")
    assert [row["key"] for row in seen] == [key for key in tests if key in trained]
    assert 0 < len(seen) < len(tests)
    assert all(row["key"] == row["of"] and row["why"] == "equal image" for row in seen)
    rows = read_rows(run / "external" / "again" / "predictions.csv")
    assert [row["key"] for row in rows] == [key for key in tests if key not in trained]
    metrics = metrics_of(run, "external/again")
    right = sum(
        row["label"] == max(metrics["classes"], key=lambda name: float(row[f"logit_{name}"]))
        for row in rows
    )
    assert metrics["samples"] == len(rows)
    assert metrics["accuracy"] == pytest.approx(right / len(rows), abs=1e-6)
    info = metrics["external"]
    assert (info["images"], info["seen_images"]) == (len(tests), len(seen))
    assert info["reasons"] == {"equal image": len(seen)}
    assert contents(run / "test") == before
    assert f"the network has seen {len(seen)} of {len(tests)} images" in capsys.readouterr().out


def test_seen_images_can_be_scored_and_are_marked(home, run):
    """--seen report: all images are in the scores, with a column that says which were seen."""
    evaluate(EvaluateConfig(run, home / "again", name="all", seen="report", cache=home / "cache"))
    rows = read_rows(run / "external" / "all" / "predictions.csv")
    trained = {*keys_of(home / "shards", "train", "val")}
    assert [row["key"] for row in rows] == keys_of(home / "again", "test")
    assert all((row["seen"] == "equal image") == (row["key"] in trained) for row in rows)
    assert metrics_of(run, "external/all")["samples"] == len(rows)


def test_own_shards_are_own_wherever_they_lie_and_take_no_name(home, run, tmp_path):
    """The sha256 of the index tells; a name or another option of external sets is refused."""
    moved = shutil.copytree(home / "shards", tmp_path / "moved")
    before = contents(run / "test")
    evaluate(EvaluateConfig(run, moved, cache=home / "cache"))
    assert contents(run / "test") == before
    assert not (run / "external").exists()
    with pytest.raises(CxrdistError, match=r"--name x: .* are the run's own"):
        evaluate(EvaluateConfig(run, moved, name="x", cache=home / "cache"))
    with pytest.raises(CxrdistError, match="--seen report: is for an external set"):
        evaluate(EvaluateConfig(run, moved, seen="report", cache=home / "cache"))


def test_another_split_has_another_name_and_no_place_is_overwritten(home, run):
    """The default name of val has -val; results of another split or other shards stay."""
    evaluate(EvaluateConfig(run, home / "again", split="val", seen="report", cache=home / "cache"))
    assert metrics_of(run, "external/again-val")["split"] == "val"
    before = contents(run / "external")
    with pytest.raises(CxrdistError, match="of another split; choose another name"):
        evaluate(EvaluateConfig(run, home / "again", name="again-val", cache=home / "cache"))
    with pytest.raises(CxrdistError, match=r"--name '\.\./x': expected letters"):
        evaluate(EvaluateConfig(run, home / "again", name="../x", cache=home / "cache"))
    assert contents(run / "external") == before


def test_an_older_run_takes_its_shards_or_says_that_it_cannot_know(home, run, capsys):
    """Without seen.npz the shards are read where run.json names them; gone, that is said."""
    (run / "seen.npz").unlink()
    evaluate(EvaluateConfig(run, home / "again", cache=home / "cache"))
    assert "holds no seen.npz; its train and val images are read again" in capsys.readouterr().out
    info = metrics_of(run, "external/again")["external"]
    assert info["seen_images"] == len(read_rows(run / "external" / "again" / "seen.csv")) > 0
    about = json.loads((run / "run.json").read_text())
    about["shards"]["path"] = "/nowhere"
    (run / "run.json").write_text(json.dumps(about))
    evaluate(EvaluateConfig(run, home / "again", cache=home / "cache"))
    said = "it is not known which of its images the network has seen, because the run holds no"
    assert said in capsys.readouterr().out
    info = metrics_of(run, "external/again")["external"]
    assert (info["seen_images"], info["not_known"][: len(said)]) == (0, said)


def test_a_set_of_which_all_was_seen_is_refused(home, run, tmp_path):
    """The train split under an index of another hash leaves nothing to score."""
    same = shutil.copytree(home / "shards", tmp_path / "same")
    (same / "index.json").write_text((same / "index.json").read_text() + " ")
    with pytest.raises(CxrdistError, match=r"has seen all \d+ images of train, so nothing"):
        evaluate(EvaluateConfig(run, same, split="train", cache=home / "cache"))
    assert not (run / "external").exists()


def test_explain_and_report_take_an_external_set(home, run):
    """Heat maps lie in its directory, of images that are not seen; the page has both results."""
    evaluate(EvaluateConfig(run, home / "again", cache=home / "cache"))
    before = contents(run / "test")
    explain(ExplainConfig(run, home / "again", limit=2, cache=home / "cache"))
    place = run / "external" / "again"
    explained = {row["key"] for row in read_rows(place / "relevance.csv")}
    assert explained <= {row["key"] for row in read_rows(place / "predictions.csv")}
    assert contents(run / "test") == before
    page = report(ReportConfig(run)).read_text()
    assert "external set again" in page
    assert "External validation" in page


def test_the_probe_for_words_takes_an_external_set_without_what_was_seen(home, run):
    """Its scores are of the images of predictions.csv, in the directory of the set."""
    evaluate(EvaluateConfig(run, home / "again", cache=home / "cache"))
    paths = [sample.path for sample in read_index(home / "again").samples]
    boxes = run.parent / "boxes.csv"
    write_boxes(boxes, {path: [Box(4, 4, 20, 9, "R", 0.9)] for path in paths})
    probe_text(ProbeTextConfig(run, home / "again", boxes=boxes, limit=1, cache=home / "cache"))
    found = json.loads((run / "external" / "again" / "text.json").read_text())
    rows = read_rows(run / "external" / "again" / "predictions.csv")
    assert found["covering"]["as_it_is"]["samples"] == len(rows)
    assert found["text"]["with_text"] == len(rows)
    assert not (run / "test" / "text.json").exists()


def label_map(folder: Path, text: str) -> Path:
    (folder / "labels.yaml").write_text(text)
    return folder / "labels.yaml"


def test_their_labels_become_the_models_and_others_are_left_out(tmp_path, capsys):
    """`x` is `a`, `b c` stays, nobody knows `z`; the prediction is among all classes."""
    shards = make_shards(tmp_path, {"x": 6, "b c": 6, "z": 4}, split="0/0/1")
    run = make_run(tmp_path / "run", logits=[1.0, 3.0, 2.0])
    labels = label_map(tmp_path, "x: a\n")
    evaluate(EvaluateConfig(run, shards, name="other", label_map=labels, cache=tmp_path / "cache"))
    place = run / "external" / "other"
    assert {row["label"] for row in read_rows(place / "predictions.csv")} == {"a", "b c"}
    assert {row["label"] for row in read_rows(place / "left_out.csv")} == {"z"}
    metrics = metrics_of(run, "external/other")
    assert metrics["external"]["classes"] == ["a", "b c"]
    assert metrics["external"]["other_classes"] == {"z": 4}
    assert metrics["confusion_matrix"] == [[0, 6, 0], [0, 6, 0], [0, 0, 0]]
    assert metrics["classes"]["d"]["recall"] is None
    assert "4 of z (listed in left_out.csv)" in capsys.readouterr().out


def test_a_set_of_one_class_has_its_recall_and_no_auroc(tmp_path):
    """All of 6 images are of a class that is never predicted."""
    shards = make_shards(tmp_path, {"a": 6}, split="0/0/1")
    run = make_run(tmp_path / "run", logits=[1.0, 3.0, 2.0])
    evaluate(EvaluateConfig(run, shards, name="one", cache=tmp_path / "cache"))
    scores = metrics_of(run, "external/one")["classes"]["a"]
    assert (scores["recall"], scores["auroc"]) == (0, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nobody: a\n", "'nobody' is not a class of --shards"),
        ("x: nobody\n", "'nobody' is not a class of the model, which has a, b c, d"),
        ("x: null\n", "the model a, b c, d; none is in both"),
    ],
)
def test_label_maps_that_fit_neither_side_are_refused(tmp_path, text, message):
    """The line says which names there are, before an image is decoded."""
    shards = make_shards(tmp_path, {"x": 4, "y": 4}, split="0/0/1")
    run = make_run(tmp_path / "run")
    labels = label_map(tmp_path, text)
    with pytest.raises(CxrdistError, match=message):
        evaluate(EvaluateConfig(run, shards, name="o", label_map=labels, cache=tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_another_size_or_fit_says_how_to_pack(tmp_path):
    """Squares of another cut are other images to the network."""
    shards = make_shards(tmp_path, {"a": 4, "b c": 4}, split="0/0/1", fit="pad")
    run = make_run(tmp_path / "run", size=64)
    with pytest.raises(CxrdistError, match="pack with --size 64 --fit crop"):
        evaluate(EvaluateConfig(run, shards, name="o", cache=tmp_path / "cache"))


def test_labels_that_a_set_does_not_have_are_missing(tmp_path):
    """Of several labels per image: no score counts a label that the set says nothing of."""
    table = tmp_path / "table.csv"
    files = sorted(make_images(tmp_path / "images", {"a": 4}).glob("a/*.png"))
    rows = [
        f"{file.relative_to(tmp_path)},{'Edema' if i % 2 else 'Edema|Lesion'}"
        for i, file in enumerate(files)
    ]
    table.write_text("\n".join(["path,labels", *rows, ""]))
    pack(PackConfig("csv", table, tmp_path / "s", size=32, split="0/0/1", workers=1))
    index = read_index(tmp_path / "s")
    mapped = map_labels(index, ["Hernia", "Oedema"], {"Edema": "Oedema"})
    assert mapped.classes == ["Hernia", "Oedema"]
    assert np.array_equal(mapped.targets(), [[-2, 1]] * 4)
    assert all(sample.split == "test" for sample in mapped.samples)


def test_a_published_chexnet_in_the_chain_is_known_by_its_outputs():
    """Also behind a run; a run that was trained on shards keeps what it has seen itself."""
    chexnet = {"source": "file", "labels": [*LABELS]}
    assert started_from_chexnet({"source": "run", "labels": ["a"], "started_from": chexnet})
    own = {"source": "run", "labels": [*LABELS], "trained_on": {"index_sha256": "0"}}
    assert not started_from_chexnet(own)
    assert not started_from_chexnet({"source": "imagenet"})
