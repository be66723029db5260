"""Files and arrays for a model: the bytes of pack, the numbers of `cxrdist predict`."""

import csv

import numpy as np
import pytest
import torch
from dicoms import write_dicom
from PIL import Image

from cxrdist import read_image
from cxrdist.config import Network, PackConfig, PredictConfig
from cxrdist.data.index import read_index
from cxrdist.data.pack import pack
from cxrdist.data.shards import read_shard
from cxrdist.errors import CxrdistError
from cxrdist.model.densenet import Classifier, load_model, save_model
from cxrdist.model.description import Calibration
from cxrdist.predict import predict


def ramp(top: int, kind: type = np.uint16) -> np.ndarray:
    """Grey rising from left to right to a largest value, [40, 60]."""
    return np.tile(np.linspace(0, top, 60).round().astype(kind), (40, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose images are padded, and X-rays of each kind; three do not declare their depth."""
    folder = tmp_path_factory.mktemp("reading")
    torch.manual_seed(0)  # some random networks give all images the same logits
    classes = ["a", "b"]
    model = Classifier(Network(growth_rate=4, block_config=(1, 1, 1, 1)), classes, 32, fit="pad")
    for module in model.network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    model.calibration = Calibration(
        {"a": 2.0, "b": 0.5}, "youden", {"a": 0.0}, {}, 10, "0" * 64, 9, 9
    )
    (folder / "run" / "model").mkdir(parents=True)
    save_model(model, folder / "run" / "model")
    for number in range(3):
        name = folder / "in" / "xy"[number % 2] / f"{number}"
        name.mkdir(parents=True)
        noise = np.random.default_rng(number).integers(0, 256, (40, 60), np.uint8)
        Image.fromarray(noise).save(name / "grey.png")
        Image.fromarray(noise).convert("RGB").save(name / "colour.jpg")
        Image.fromarray(ramp(4095 if number else 900)).save(name / "bits.png")
        write_dicom(name / "study.dcm", ramp(4000), bits=12)
    return folder


@pytest.fixture
def model(folder):
    return load_model(folder / "run")


def files_of(folder):
    return sorted(file for file in (folder / "in").rglob("*.*") if file.is_file())


def test_an_image_has_the_bytes_that_pack_makes_of_it(folder, model):
    """PNG, JPEG and DICOM, grey, colour, 12 bits; with the depth of the source as pack found it."""
    config = PackConfig(
        *("folder", folder / "in", folder / "shards"),
        **{"size": 32, "fit": "pad", "split": "1/0/0", "workers": 1, "anonymise": False},
        **{"duplicates": "report"},
    )
    pack(config)
    index = read_index(folder / "shards")
    packed = {
        sample.path: pixels
        for shard in index.packed()
        for sample, (pixels, _) in zip(shard.samples, read_shard(shard), strict=True)
    }
    assert index.depth == 12
    assert len(packed) == len(files_of(folder)) == 12
    model.depth = index.depth
    for path, expected in packed.items():
        file = folder / "in" / path
        assert np.array_equal(read_image(file, model), expected)
        assert np.array_equal(read_image(str(file), size_px=32, fit="pad", depth=12), expected)
    model.fit = "crop"
    grey = folder / "in/x/0/grey.png"
    assert np.array_equal(read_image(grey, model, fit="pad"), packed["x/0/grey.png"])
    assert not np.array_equal(read_image(grey, model), packed["x/0/grey.png"])
    assert read_image(grey).shape == (40, 60)
    assert read_image(folder / "in/x/0/bits.png").max() == 224  # 900 of 1023


def test_predictions_are_those_of_the_command(folder, model):
    """The same numbers in all columns, also where another file gives the depth of the source.

    Squares that were read before give the same logits.
    """
    files = files_of(folder)
    predict(PredictConfig(folder / "run", files, folder / "out.csv"))
    with open(folder / "out.csv") as content:
        rows = list(csv.DictReader(content))
    found = model.predict(files)
    for kind, columns in (
        ("prob", found.probabilities),
        ("calibrated", found.calibrated),
        ("softmax", found.softmax),
        ("called", {k: v.astype(int) for k, v in found.called.items()}),
    ):
        for name, values in columns.items():
            written = [float(row[f"{kind}_{name}"]) for row in rows]
            # Batches of other images round otherwise, in the last bits.
            assert written == pytest.approx(values, rel=0, abs=1e-6)
    assert found.called.keys() == {"a"}
    assert [row["predicted"] for row in rows] == [name for (name,) in found.predicted]
    assert len({*map(tuple, found.logits.tolist())}) > 6
    model.depth = 12
    squares = [read_image(file, model) for file in files]
    for images in (squares, np.stack(squares), [files[0], *squares[1:]]):
        assert np.array_equal(model.predict(images).logits, found.logits)
    alone = model.predict(str(files[0]), batch_size=1).logits
    np.testing.assert_allclose(alone, found.logits[:1], rtol=0, atol=1e-6)
    assert len(model.predict(squares[0])) == 1


def test_what_cannot_be_read_is_refused_in_one_line(folder, model):
    """Files, arrays and settings; the line says what was expected."""
    grey = folder / "in/x/0/grey.png"
    square = read_image(grey, model)
    cases = [
        (lambda: read_image("none.png"), r"none\.png: no such file; name an image.*DICOM"),
        (lambda: read_image(folder), r"is a folder; name an image"),
        (lambda: read_image(grey, size_px=32, fit="centre"), r"fit is 'centre': expected crop"),
        (lambda: read_image(folder / "out-of.txt"), r"no such file"),
        (lambda: read_image(grey, model, size_px=32), r"size_px is 32: the model determines"),
        (lambda: read_image(grey, size_px=10**9), r"size_px is 1000000000: expected 1 to 4500"),
        (lambda: read_image(grey, depth=40), r"depth is 40: expected 8 to 16 bits"),
        (lambda: model.predict([]), r"images is empty"),
        (lambda: model.predict([square, square[:9]]), r"image 1 is uint8 \[9, 32\]: expected"),
        (lambda: model.predict([square / 255]), r"image 0 is float64 \[32, 32\].*read_image"),
        (lambda: model.predict(torch.from_numpy(square)[None]), r"image 0 is a Tensor.*model\("),
        (lambda: model.predict([square], batch_size=0), r"batch_size is 0"),
        (lambda: model.train().predict([square]), r"training mode; call model\.eval\(\)"),
    ]
    for use, line in cases:
        with pytest.raises(CxrdistError, match=line) as raised:
            use()
        assert "\n" not in str(raised.value)
    model.eval().lungs_only = True
    assert len(model.predict([square])) == 1
    for use in (lambda: model.predict([grey]), lambda: read_image(grey, model)):
        with pytest.raises(CxrdistError, match=r"lungs only, but new images have no masks"):
            use()
