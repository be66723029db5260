"""Prediction of image files: all are read, prepared as pack does, explained over the original."""

import csv
import hashlib
import platform
import shutil
import sys
from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
import torch
from dicoms import write_dicom
from highdicom.sr import MeasurementReport
from PIL import Image
from support import make_images

from cxrdist import errors
from cxrdist import predict as predicting
from cxrdist.cli import main
from cxrdist.config import Network, PackConfig, PredictConfig
from cxrdist.data.boxes import Box, inside, write_boxes
from cxrdist.data.images import read_square
from cxrdist.data.index import read_index
from cxrdist.data.pack import pack
from cxrdist.data.records import SPLITS
from cxrdist.data.shards import read_shard
from cxrdist.errors import CxrdistError
from cxrdist.explain.relevance import attribute
from cxrdist.files import write_table
from cxrdist.model.densenet import Classifier, Cover, load_model, save_model
from cxrdist.model.description import Calibration
from cxrdist.predict import predict

CASES = Path(__file__).parents[2] / "shared" / "cases"


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    network = Network(growth_rate=4, block_config=(2, 2, 2, 2))
    save_model(Classifier(network, ["a", "b c"], 32, fit="pad"), tmp_path / "run" / "model")
    return tmp_path / "run"


def change_model(run, **fields):
    """Save the model of a run with other attributes."""
    model = load_model(run)
    for name, value in fields.items():
        setattr(model, name, value)
    save_model(model, run / "model")


def rows_of(file):
    with open(file) as content:
        return list(csv.DictReader(content))


@contextmanager
def seen_squares(monkeypatch):
    """What the model is given by predict, uint8 [S, S] each, in order."""
    squares = []

    def load(run):
        model = load_model(run)
        model.register_forward_pre_hook(
            lambda _, images: squares.extend(image[0].numpy().copy() for image in images[0])
        )
        return model

    with monkeypatch.context() as patch:
        patch.setattr(predicting, "load_predictor", load)
        yield squares


def packed_squares(folder, **options):
    """The index and squares by path that pack makes of a folder, with splits in turn."""
    files = sorted(file for file in folder.rglob("*.*") if file.is_file())
    paths = [file.relative_to(folder).as_posix() for file in files]
    rows = [(path, "ab"[i % 2], SPLITS[i // 2 % 3], path) for i, path in enumerate(paths)]
    table, shards = folder / "table.csv", folder / "shards"
    write_table(table, ("path", "label", "split", "patient"), rows)
    settings = {"size": 32, "fit": "pad", "duplicates": "report", "workers": 1}
    settings |= {"anonymise": False, **options}
    pack(PackConfig("csv", table, shards, **settings))
    index, found = read_index(shards), {}
    for shard in index.packed():
        for sample, (pixels, _) in zip(shard.samples, read_shard(shard), strict=True):
            found[sample.path] = pixels
    return index, found


def ramp(top, shape=(40, 60)):
    """16-bit grey rising from left to right to a largest value."""
    return np.tile(np.linspace(0, top, shape[1]).round().astype(np.uint16), (shape[0], 1))


def test_probabilities_are_those_of_the_loaded_model(run, tmp_path):
    """Files and folders, prepared as the training images were, one row each in order."""
    folder = make_images(tmp_path / "in", {"x": 3, "y": 2})
    files = sorted(folder.rglob("*.png"))
    out = tmp_path / "new" / "out.csv"
    predict(PredictConfig(run, [folder / "x", *files[2:]], out, batch_size=2))
    rows = rows_of(out)
    assert [row["path"] for row in rows] == [str(file) for file in files]
    assert [file.name for file in out.parent.iterdir()] == ["out.csv"]
    model = load_model(run)
    for row, file in zip(rows, files, strict=True):
        image = torch.from_numpy(read_square(file, 32, "pad").copy())[None, None]
        expected = torch.sigmoid(model(image))[0]
        found = [float(row["prob_a"]), float(row["prob_b c"])]
        assert np.allclose(found, expected.detach(), atol=1e-6)
        assert row["predicted"] == ["a", "b c"][int(expected.argmax())]


def test_a_published_model_predicts_as_its_run(run, tmp_path):
    """A folder of `cxrdist export --to huggingface` has the files of RUN/model at its top."""
    published = shutil.copytree(run / "model", tmp_path / "published")
    images = make_images(tmp_path / "in", {"x": 2})
    for folder in (run, published):
        predict(PredictConfig(folder, [images], tmp_path / f"{folder.name}.csv"))
    assert rows_of(tmp_path / "run.csv") == rows_of(tmp_path / "published.csv")


def test_the_class_is_that_of_the_larger_logit(run, tmp_path, capsys):
    """Logits 18 and 25: the second class, although float32 gives both the probability 1."""
    model = load_model(run)
    torch.nn.init.zeros_(model.network.classifier.weight)
    model.network.classifier.bias.data = torch.tensor([18.0, 25.0])
    save_model(model, run / "model")
    folder = make_images(tmp_path / "in", {"x": 2})
    predict(PredictConfig(run, [folder], tmp_path / "out.csv"))
    rows = rows_of(tmp_path / "out.csv")
    assert [row["predicted"] for row in rows] == ["b c"] * 2
    assert list(rows[0]) == ["path", "prob_a", "prob_b c", "predicted"]
    assert "not calibrated and no class is called" in capsys.readouterr().out


def test_a_calibrated_model_calls_its_classes(run, tmp_path, capsys):
    """Sigmoid and softmax of divided logits, and 1 from the threshold on; predicted stays argmax.

    A class without a threshold is not called, and one without a temperature takes the softmax.
    """
    model = load_model(run)
    torch.nn.init.zeros_(model.network.classifier.weight)
    model.network.classifier.bias.data = torch.tensor([1.0, -0.5])
    model.calibration = Calibration(
        {"a": 2.0, "b c": 0.5},
        "sensitivity=0.95",
        {"a": 1.5, "b c": -0.5},
        {},
        10,
        "0" * 64,
        90,
        70,
    )
    save_model(model, run / "model")
    folder = make_images(tmp_path / "in", {"x": 1})
    predict(PredictConfig(run, [folder], tmp_path / "out.csv"))
    (row,) = rows_of(tmp_path / "out.csv")
    names = [f"{what}_{n}" for what in ("prob", "calibrated", "softmax") for n in ("a", "b c")]
    assert [*row] == ["path", *names, "predicted", "called_a", "called_b c"]
    # Sigmoids of 1 and -0.5; of 1 / 2 and -0.5 / 0.5; and of their difference, 1.5.
    expected = [0.731058579, 0.377540669, 0.622459331, 0.268941421, 0.817574476, 0.182425524]
    assert [float(row[name]) for name in names] == pytest.approx(expected, rel=1e-7)
    assert (row["predicted"], row["called_a"], row["called_b c"]) == ("a", "0", "1")
    assert "called by sensitivity=0.95, as chosen on the 90 images of 70" in capsys.readouterr().out
    few = replace(model.calibration, temperatures={"a": 2.0}, thresholds={"a": 1.0})
    change_model(run, calibration=replace(few, reasons={"b c": "val has 3 images with it"}))
    predict(PredictConfig(run, [folder], tmp_path / "out.csv"))
    (row,) = rows_of(tmp_path / "out.csv")
    assert [*row] == ["path", *names[:3], "predicted", "called_a"]
    assert row["called_a"] == "1"
    assert "b c: val has 3 images with it" in capsys.readouterr().out
    change_model(run, calibration=replace(few, temperatures={}, thresholds={}))
    predict(PredictConfig(run, [folder], tmp_path / "out.csv"))
    assert "calibrated and no class is called, as the 90 images of 70" in capsys.readouterr().out


def test_heat_maps_lie_over_the_originals(run, tmp_path):
    """--explain: pictures of the original's size, the arrays, and a table of whose they are.

    Two files of one name in two folders have files of their own.
    """
    folder = make_images(tmp_path / "in", {"x": 1, "y": 1})
    same = [folder / name / "xx000_0.png" for name in "xy"]
    (folder / "x" / "x000_0.png").rename(same[0])
    (folder / "y" / "y000_0.png").rename(same[1])
    predict(PredictConfig(run, [folder], tmp_path / "out.csv", explain=True))
    heatmaps = tmp_path / "out-heatmaps"
    rows = rows_of(heatmaps / "relevance.csv")
    assert [(row["path"], row["class"]) for row in rows] == [
        (str(file), name) for file in same for name in ("a", "b c")
    ]
    names = {row["picture"] for row in rows} | {f"{row['key']}.{s}" for row in rows for s in EXTRA}
    assert {file.name for file in heatmaps.iterdir()} == {"relevance.csv"} | names
    assert len(names) == 2 * 4
    for row in rows:
        for name in (row["picture"], f"{row['key']}.png"):
            assert Image.open(heatmaps / name).size == (56, 48)
        square = torch.from_numpy(read_square(Path(row["path"]), 32, "pad").copy())[None, None]
        expected = attribute(load_model(run), square)
        with np.load(heatmaps / f"{row['key']}.npz") as found:
            np.testing.assert_allclose(found["relevance"], expected.relevance[0], atol=1e-6)
        k = ["a", "b c"].index(row["class"])
        assert float(row["logit"]) == pytest.approx(float(expected.logits[0, k]), abs=1e-5)


EXTRA = ("png", "npz")


def test_heat_maps_of_an_earlier_call_are_removed(run, tmp_path, capsys):
    """They may be of another model. The user's own files stay, and images there are rejected."""
    folder, out = make_images(tmp_path / "in", {"x": 2}), tmp_path / "out.csv"
    heatmaps, first = tmp_path / "out-heatmaps", folder / "x" / "x000_0.png"
    predict(PredictConfig(run, [folder], out, explain=True))
    (heatmaps / "mine.png").touch()
    predict(PredictConfig(run, [first], out, explain=True))
    rows = rows_of(heatmaps / "relevance.csv")
    names = {row["picture"] for row in rows} | {f"{row['key']}.{s}" for row in rows for s in EXTRA}
    assert {row["path"] for row in rows} == {str(first)}
    assert {file.name for file in heatmaps.iterdir()} == {"relevance.csv", "mine.png"} | names
    shutil.copy(first, heatmaps / "a-0123456789.png")
    command = ["predict", "--run", run, heatmaps / "a-0123456789.png", "--out", out, "--explain"]
    assert main([*map(str, command)]) == 2
    assert "out-heatmaps, where earlier heat maps are removed" in capsys.readouterr().err
    assert (heatmaps / "a-0123456789.png").is_file()


def test_what_cannot_be_read_is_listed_and_the_rest_predicted(run, tmp_path, capsys):
    """Exit code 1 and one line; 0 with --skip-bad; files that are no images are only listed."""
    folder = make_images(tmp_path / "in", {"x": 3})
    bad = folder / "x" / "x000_1.png"
    data = bad.read_bytes()
    bad.write_bytes(data[:200])
    (folder / "notes.txt").write_text("no image")
    out, rejected = tmp_path / "out.csv", tmp_path / "out-rejected.csv"
    command = ["predict", "--run", str(run), str(folder), "--out", str(out)]
    for arguments, code in ((command, 1), ([*command, "--skip-bad"], 0)):
        capsys.readouterr()
        assert main(arguments) == code
        said = capsys.readouterr()
        assert [Path(row["path"]).name for row in rows_of(out)] == ["x000_0.png", "x001_0.png"]
        first, second = rows_of(rejected)
        assert (first["path"], second["path"]) == (str(bad), str(folder / "notes.txt"))
        assert first["reason"].startswith("is not a readable PNG")
        line = f"1 of 3 images could not be read, the first: {bad}: is not a readable PNG"
        assert line in (said.err if code else said.out)
        assert "predicted 2 images" in said.out
    bad.write_bytes(data)
    (folder / "notes.txt").unlink()
    assert main(command) == 0
    assert not rejected.exists(), "the list of an earlier call"
    assert len(rows_of(out)) == 3


def test_an_image_without_its_heat_maps_is_predicted_and_reported(run, tmp_path, capsys):
    """A directory has the name of its file; exit code 1, and its probabilities are written."""
    folder, out = make_images(tmp_path / "in", {"x": 2}), tmp_path / "out.csv"
    command = ["predict", "--run", str(run), str(folder), "--out", str(out), "--explain"]
    assert main(command) == 0
    blocked = min((tmp_path / "out-heatmaps").glob("*.npz"))
    blocked.unlink()
    (blocked / "in").mkdir(parents=True)
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "1 of 2 images were predicted but lack heat maps or DICOM results, the first: " in error
    assert "could not be read" not in error
    assert len(rows_of(out)) == 2
    (row,) = rows_of(tmp_path / "out-rejected.csv")
    assert row["reason"].endswith("has no heat maps")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lost.png", "lost.png: no such file or folder"),
        ("empty", "empty: has no image among its 1 files"),
        ("bad.png", "1 of 1 images could not be read, the first: .*bad.png: .*"),
    ],
)
def test_without_a_readable_image_nothing_is_written(run, tmp_path, given, message):
    """A missing file, a folder without an image, and nothing readable are named."""
    (tmp_path / "bad.png").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("text")
    with pytest.raises(CxrdistError, match=message):
        predict(PredictConfig(run, [tmp_path / given], tmp_path / "new" / "out.csv", explain=True))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (".", "is not a regular file; name a CSV"),
        ("in", "is not a regular file; name a CSV"),
        ("in/x/x000_0.png", "is one of the files given"),
        ("in/x/x000_0.png/out.csv", "x000_0.png is not a directory; name another place"),
    ],
)
def test_a_bad_out_is_refused_before_any_work(run, tmp_path, monkeypatch, out, message):
    """A folder, a path through a file, and an image, which would be lost."""
    make_images(tmp_path / "in", {"x": 1})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CxrdistError, match=message):
        predict(PredictConfig(run, [Path("in")], Path(out)))


def test_predict_and_pack_make_the_same_squares(run, tmp_path, monkeypatch):
    """Of all kinds of files the square that the model sees is the one that is packed, byte by byte.

    Bit depths are mixed, so that both must scale by one depth for all.
    """
    folder = tmp_path / "in"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    for name, top in (("g12", 4095), ("dark", 1000), ("hot", 300)):
        Image.fromarray(ramp(top)).save(folder / "a" / f"{name}.png")
        Image.fromarray(ramp(top, (70, 50))).save(folder / "b" / f"{name}.tif")
    noise = np.random.default_rng(0).integers(0, 255, (900, 700, 3), np.uint8)
    Image.fromarray(noise).resize((1000, 1400)).save(folder / "a" / "large.jpg")
    write_dicom(folder / "b" / "IMG.001", ramp(3000).astype(np.uint16), 12)
    for i, file in enumerate(sorted(CASES.rglob("*.dcm"))):
        shutil.copy(file, folder / "ab"[i % 2])
    index, packed = packed_squares(folder)
    assert index.depth == 12
    with seen_squares(monkeypatch) as squares:
        predict(PredictConfig(run, [folder], tmp_path / "out.csv", batch_size=64))
    paths = [
        Path(row["path"]).relative_to(folder).as_posix() for row in rows_of(tmp_path / "out.csv")
    ]
    assert sorted(paths) == sorted(packed)
    again = [path for path in paths if Path(path).stem in ("dark", "hot")]
    assert len(squares) == len(paths) + len(again)
    seen = dict(zip(paths, squares, strict=False)) | dict(zip(again, squares[-4:], strict=True))
    for path, pixels in packed.items():
        np.testing.assert_array_equal(seen[path], pixels, err_msg=path)


def test_of_an_image_that_is_predicted_again_nothing_remains(monkeypatch):
    """Neither the rows of its ledger nor the reason why its heat maps were not drawn."""
    monkeypatch.setattr(predicting.Predictor, "run", lambda _, inputs, how: ran.append(inputs))
    ran, inputs = [], {n: predicting.Input(Path(f"{n}.png"), f"{n}.png") for n in (0, 1)}
    predictor = predicting.Predictor(*[None] * 5, batch_size=1)
    for number, depth in enumerate((8, 12)):
        predictor.prepared[number] = predicting.Prepared(np.empty((0, 0)), depth, (), "")
        predictor.logits[number], predictor.ledgers[number] = np.zeros(2), [["row"]]
        predictor.reasons[number] = "has no heat maps"
    how = predicting.Preparation(32, "crop", None, "black", False)
    assert predictor.share_depth(inputs, how) == 12
    assert ran == [{0: inputs[0]}]
    assert {*predictor.logits} == {*predictor.ledgers} == {*predictor.reasons} == {1}


def test_what_an_image_lacks_is_all_named():
    """Not only the last of what could not be drawn."""
    predictor = predicting.Predictor(*[None] * 5, batch_size=1)
    predictor.ledgers[3] = [["row"]]
    late = SimpleNamespace(results=lambda: [CxrdistError("x.dcm: was slow")])
    made = [predicting.Made(3, what, late) for what in ("heat maps", "DICOM results")]
    predictor._finish_drawings(deque(made), 0)
    assert predictor.reasons == {3: "x.dcm: was slow; has no heat maps and no DICOM results"}


def test_the_depth_is_that_of_the_training_images_unless_told(run, tmp_path, monkeypatch, capsys):
    """A value of 1000 in 16 bits is 255 * 1000 / (2 ** depth - 1): by option, model, images."""
    change_model(run, depth=14)
    files = [tmp_path / "low.png", tmp_path / "high.png"]
    for file, top in zip(files, (1000, 4000), strict=True):
        Image.fromarray(ramp(top, (32, 32))).save(file)

    def brightest(depth=None):
        with seen_squares(monkeypatch) as squares:
            predict(PredictConfig(run, files, tmp_path / "out.csv", depth=depth))
        return [int(square.max()) for square in squares]

    assert brightest(depth=16) == [round(255 * v / 65535) for v in (1000, 4000)]
    assert brightest() == [round(255 * v / 16383) for v in (1000, 4000)]
    assert "bits" not in capsys.readouterr().out
    assert brightest(depth=10) == [round(255 * 1000 / 1023), 255]
    assert "1 images use more than the 10 bits" in capsys.readouterr().out
    change_model(run, depth=None)
    assert brightest()[1:] == [round(255 * v / 4095) for v in (4000, 1000)], "the low one again"
    assert "are scaled by 12 bits" in capsys.readouterr().out


WORD = Box(10, 4, 12, 6, "R")


@pytest.fixture
def marked(tmp_path):
    """Six images with a white word each, and the table of the words by `FOLDER/NAME`."""
    folder = make_images(tmp_path / "in", {"x": 3, "y": 3})
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.png"))
    for name in names:
        pixels = np.array(Image.open(folder / name))
        pixels[inside([WORD], *pixels.shape)] = 255
        Image.fromarray(pixels).save(folder / name)
    write_boxes(tmp_path / "boxes.csv", {name: [WORD] for name in names})
    return folder


def test_text_is_covered_as_in_the_training_images(run, tmp_path, marked, monkeypatch, capsys):
    """Boxes of a table are covered in the model's way: the bytes of a pack that covers them so."""
    change_model(run, cover=Cover("fill", "all"))
    boxes = tmp_path / "boxes.csv"
    _, packed = packed_squares(marked, text_boxes=boxes, cover="fill")
    with seen_squares(monkeypatch) as squares:
        config = PredictConfig(run, [marked], tmp_path / "out.csv", True, text_boxes=boxes)
        predict(config)
    for path, square in zip(sorted(packed), squares, strict=True):
        np.testing.assert_array_equal(square, packed[path])
    assert "covered 6 boxes of text in 6 of 6 images (fill)" in capsys.readouterr().out
    for xray in (tmp_path / "out-heatmaps").glob("*[0-9a-f].png"):
        assert np.asarray(Image.open(xray))[inside([WORD], 48, 56)].max() < 255


def test_what_the_model_learned_with_is_left_as_it_is(run, tmp_path, marked, monkeypatch, capsys):
    """Without covered training images text stays; where only test images were covered, it says so.

    Boxes that are given are covered in any case.
    """
    change_model(run, cover=Cover("black", "test"))
    file = marked / "x" / "x000_0.png"
    plain = read_square(file, 32, "pad")
    with seen_squares(monkeypatch) as squares:
        predict(PredictConfig(run, [file], tmp_path / "out.csv"))
        assert "only test images were covered" in capsys.readouterr().out
        change_model(run, cover=None)
        predict(PredictConfig(run, [file], tmp_path / "out.csv"))
        assert "cover" not in capsys.readouterr().out
        boxes = tmp_path / "own.csv"
        write_boxes(boxes, {str(file): [WORD]})
        predict(PredictConfig(run, [file], tmp_path / "out.csv", text_boxes=boxes))
    assert [np.array_equal(square, plain) for square in squares] == [True, True, False]


def test_a_model_of_covered_images_needs_boxes_or_the_finder(run, tmp_path, marked, monkeypatch):
    """One line says both ways out; a table that leaves all as it is counts as boxes."""
    change_model(run, cover=Cover("black", "train"))

    def without(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    with monkeypatch.context() as patch:
        patch.setattr(errors, "import_module", without)
        with pytest.raises(CxrdistError, match=r"cxrdist\[text\].*or give the boxes with --text"):
            predict(PredictConfig(run, [marked], tmp_path / "out.csv"))
        write_boxes(tmp_path / "none.csv", {})
        predict(
            PredictConfig(run, [marked], tmp_path / "out.csv", text_boxes=tmp_path / "none.csv")
        )
    assert len(rows_of(tmp_path / "out.csv")) == 6


def test_words_are_found_and_covered(run, tmp_path, monkeypatch, capsys):
    """With the finder, a word on an X-ray is gone from the square, and from the picture."""
    pytest.importorskip("rapidocr")
    from cxrdist.data.phantom import burn_text, draw_patient

    change_model(run, cover=Cover("black", "all"), image_size_px=128)
    image = Image.fromarray(next(draw_patient("Normal", 1, 512, 0)).pixels.copy())
    image.paste(60, (0, 0, 512, 150))
    burn_text(image, "SEDUTO", (0.3, 0.06), 0.1)
    image.save(tmp_path / "x.png")
    with seen_squares(monkeypatch) as squares:
        predict(PredictConfig(run, [tmp_path / "x.png"], tmp_path / "out.csv"))
    assert "covered 1 boxes of text in 1 of 1 images (black)" in capsys.readouterr().out
    assert read_square(tmp_path / "x.png", 128, "pad")[:20].max() > 150
    assert squares[0][:20].max() < 100


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"x/lost.png": [WORD]}, "has none of the images"),
        ({"x000_0.png": [WORD]}, "is both .* write the whole path"),
    ],
)
def test_boxes_of_no_image_or_of_two_are_refused(run, tmp_path, table, message):
    """A table of other images covers nothing, and a name that fits two images is not guessed."""
    folder = make_images(tmp_path / "in", {"x": 1})
    shutil.copytree(folder / "x", folder / "again")
    write_boxes(tmp_path / "boxes.csv", table)
    given = [folder / "x", folder / "again"]
    with pytest.raises(CxrdistError, match=message):
        predict(PredictConfig(run, given, tmp_path / "out.csv", text_boxes=tmp_path / "boxes.csv"))


def test_too_large_a_batch_is_one_line(run, tmp_path, monkeypatch, capsys):
    """Memory that runs out ends with the option that mends it, and nothing is written."""

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Classifier, "forward", fail)
    folder = make_images(tmp_path / "in", {"x": 4})
    command = ["predict", "--run", str(run), str(folder), "--out", str(tmp_path / "out.csv")]
    assert main([*command, "--batch-size", "3"]) == 1
    assert "out of memory with 3 images in a pass; try --batch-size 1" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def test_lateral_images_are_predicted_and_named(run, tmp_path, capsys):
    """By their tag, which goes before the name, or by their name; frontal ones are not named."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    folder = tmp_path / "in"
    folder.mkdir()
    for name, tag in (("a.dcm", "LL"), ("b-lateral.dcm", "PA"), ("c.dcm", "RAO"), ("d.dcm", "")):
        write_dicom(folder / name, pixels, ViewPosition=tag)
    for name in ("e-lateral.png", "f.png", "g-PA.png"):
        Image.fromarray(pixels).save(folder / name)
    predict(PredictConfig(run, [folder], tmp_path / "out.csv"))
    assert len(rows_of(tmp_path / "out.csv")) == 7
    names = ", ".join(str(folder / name) for name in ("a.dcm", "c.dcm", "e-lateral.png"))
    assert (
        "not frontal views by their tag or name, but predicted, too: 3 images (2 lateral, "
        f"1 other): {names}\n"
    ) in capsys.readouterr().out
    predict(PredictConfig(run, [folder / "c.dcm"], tmp_path / "one.csv"))
    said = capsys.readouterr().out
    assert "predicted 1 image: " in said
    assert "predicted, too: 1 image (1 other): " in said
    predict(PredictConfig(run, [folder / "f.png", folder / "d.dcm"], tmp_path / "other.csv"))
    assert "frontal" not in capsys.readouterr().out


@pytest.fixture
def patients(tmp_path):
    """Radiographs of two patients, of which only the first uses 12 bits."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number, top in ((1, 4095), (2, 1000)):
        tags = {"PatientID": f"ID-{number}", "StudyInstanceUID": f"1.2.{number}"}
        write_dicom(folder / f"{number}.dcm", ramp(top), 16, SeriesInstanceUID="", **tags)
    return folder


def test_dicom_results_say_what_the_table_says(run, tmp_path, patients, capsys):
    """A report and two heat maps for each image in its study, with the probabilities of the CSV.

    The darker image is scaled by 12 bits once the other is known, and has results only once. What
    a killed call has left is removed.
    """
    calibration = Calibration({"a": 2.0}, "youden", {}, {}, 10, "0" * 64, 90, 70)
    change_model(run, calibration=calibration)
    killed = tmp_path / f".dicom.{platform.node().replace('.', '-')}.{2**22 + 1}.partial"
    killed.mkdir()
    (killed / "1.2.dcm").write_text("half")
    out, folder = tmp_path / "out.csv", tmp_path / "dicom"
    predict(PredictConfig(run, [patients], out, dicom=folder))
    said = capsys.readouterr().out
    assert f"DICOM results, for research only: {folder}\n" in said
    assert "2 images have no SeriesInstanceUID; their results have a new one: " in said
    assert "StudyInstanceUID" not in said
    assert not list(tmp_path.glob(".*.partial"))
    assert not (tmp_path / "out-heatmaps").exists(), "without --explain"
    results = [pydicom.dcmread(file) for file in folder.iterdir()]
    assert len(results) == 2 * 3
    for number, row in enumerate(rows_of(out), start=1):
        own = [result for result in results if result.PatientID == f"ID-{number}"]
        assert {result.StudyInstanceUID for result in own} == {f"1.2.{number}"}
        assert sorted(result.Modality for result in own) == ["OT", "OT", "SR"]
        (report,) = (result for result in own if result.Modality == "SR")
        (heatmap, _) = (result for result in own if result.Modality == "OT")
        # The 200 px below the caption; colours have a dark channel, so the lightest grey is left.
        lightest = heatmap.pixel_array[-200:].min(-1).max()
        assert lightest > 120 if number == 1 else 40 < lightest < 80  # 1000 of 4095 is 62 of 255
        content = MeasurementReport.from_sequence([report])
        values = {
            group.tracking_identifier: group.get_measurements()[0].value
            for group in content.get_image_measurement_groups()
        }
        expected = {"a": float(row["calibrated_a"]), "b c": float(row["prob_b c"])}
        assert values == pytest.approx(expected, rel=1e-8)
        sha256 = hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()
        assert report.DeviceSerialNumber == sha256
    with pytest.raises(CxrdistError, match=r"--dicom .*dicom: already exists; name a new or empty"):
        predict(PredictConfig(run, [patients], out, dicom=folder))


def test_images_that_are_no_dicom_are_refused_by_dicom(run, tmp_path, patients, monkeypatch):
    """In one line before anything is written; so is highdicom where it is not installed."""
    Image.fromarray(ramp(200)).save(patients / "x.png")
    config = PredictConfig(run, [patients], tmp_path / "new" / "out.csv", dicom=tmp_path / "dicom")
    with pytest.raises(CxrdistError, match=r"--dicom: 1 of 3 images .* the first: .*x.png"):
        predict(config)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(CxrdistError, match=r'--dicom: .*highdicom.*pip install "cxrdist\[dicom\]"'):
        predict(config)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in", "run"]


@pytest.mark.parametrize("folder", ["new", "new/out.csv", "new/out-heatmaps", "."])
def test_a_folder_of_dicom_results_holds_nothing_else(run, tmp_path, patients, folder):
    """It is refused where the table or the heat maps go, which it would replace."""
    config = PredictConfig(run, [patients], tmp_path / "new" / "out.csv", dicom=tmp_path / folder)
    with pytest.raises(CxrdistError, match=r"--dicom .*: (--out writes there|already exists)"):
        predict(config)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in", "run"]


def test_dicom_results_of_no_image_leave_no_folder(run, tmp_path):
    """If no image can be read there is neither a table nor a folder, or a half of one."""
    (tmp_path / "bad.dcm").write_bytes(b"\0" * 128 + b"DICM")
    with pytest.raises(CxrdistError, match="1 of 1 images could not be read"):
        predict(
            PredictConfig(run, [tmp_path / "bad.dcm"], tmp_path / "o.csv", dicom=tmp_path / "d")
        )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.dcm", "run"]
