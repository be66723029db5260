"""Where relevance lies, on maps whose places are known."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import make_images, make_masks

from cxrdist.config import ExplainConfig, Network, PackConfig
from cxrdist.data.index import read_index
from cxrdist.data.pack import pack
from cxrdist.explain.export import explain
from cxrdist.explain.heatmap import overlay
from cxrdist.explain.maps import decode
from cxrdist.explain.outside import Sums, look, summarise
from cxrdist.model.densenet import Classifier, save_model

SIZE = 100


def spot(row: int, column: int, size: int = 5) -> np.ndarray:
    """A map whose relevance lies in one square, half of it against the class."""
    relevance = np.zeros((SIZE, SIZE), np.float32)
    relevance[row : row + size, column : column + size] = -2
    relevance[row, column : column + size] = 2
    return relevance


def test_relevance_in_a_corner_is_in_the_border_too():
    """Of 100 px the corner has 20; the centre is in neither, and lungs hold what they hold."""
    lungs = np.zeros((SIZE, SIZE), bool)
    lungs[30:70, 30:70] = True
    corner, centre = look(3, 1, spot(2, 2), lungs), look(4, 0, spot(40, 40), lungs)
    assert {name: found[0] for name, found in corner.regions.items()} == {
        "border": 1,
        "corners": 1,
        "beside_lungs": 1,
    }
    assert {name: found[1:] for name, found in centre.regions.items()} == {
        "border": (0.36, False),
        "corners": (0.16, False),
        "beside_lungs": (0.84, False),
    }
    assert all(share == 0 for share, _, _ in centre.regions.values())
    assert all(is_peak for _, _, is_peak in corner.regions.values())
    both = look(5, 0, spot(2, 2) + spot(40, 40), None)
    assert both.regions["border"][0] == pytest.approx(0.5)
    assert "beside_lungs" not in both.regions
    assert look(6, 0, np.zeros((SIZE, SIZE), np.float32), lungs) is None


def test_means_are_of_images_and_intervals_of_patients():
    """Two of four images look at the corner; the two of class b look at the same place."""
    places = [(0, (40, 40)), (0, (60, 20)), (1, (2, 2)), (1, (4, 3))]
    looks, sums = [], Sums()
    for number, (target, place) in enumerate(places):
        looks.append(look(number, target, spot(*place), None))
        sums.add(target, spot(*place), np.full((SIZE, SIZE), 10 * number, np.uint8))
    found = summarise(looks, sums, ["a", "b", "c"], {0: "p", 1: "q", 2: "r", 3: "r"})
    border = found["all"]["regions"]["border"]
    assert (border["images"], border["patients"]) == (4, 3)
    assert (border["share"], border["peaks"], border["area"]) == (0.5, 0.5, 0.36)
    low, high = border["share_interval"]
    assert 0 <= low < 0.5 < high <= 1
    assert found["classes"].keys() == {"a", "b"}
    assert found["classes"]["b"]["regions"]["corners"]["share"] == 1
    assert (found["classes"]["a"]["alike"], found["classes"]["b"]["alike"]) == (0.5, 1)
    assert found["classes"]["b"]["alike_area"] < 0.05
    assert found["classes"]["b"]["patients"] == 1
    expected = (spot(2, 2) + spot(4, 3)) / (2 * np.abs(spot(2, 2)).sum())
    np.testing.assert_allclose(sums.mean_map(1, 2), expected, atol=1e-11)


def test_sums_do_not_depend_on_their_order():
    """As sums of floats would: ranks may add up their images in any order, bit for bit."""
    random = np.random.default_rng(0)
    maps = random.normal(size=(9, 8, 8)).astype(np.float32)
    image = np.zeros((8, 8), np.uint8)
    forward, backward, others = Sums(), Sums(), Sums()
    for values in maps:
        forward.add(0, values, image)
    for values in maps[:4:-1]:
        backward.add(0, values, image)
    for values in maps[:5]:
        others.add(0, values, image)
    backward.merge(others)
    assert np.array_equal(forward.maps[0], backward.maps[0])


def test_a_run_says_where_its_maps_lie(tmp_path):
    """The shares are those of the files, with masks of a part; kept maps give the same."""
    files = sorted(make_images(tmp_path / "images", {"a": 12, "b": 12}).glob("*/*.png"))
    masks = make_masks(tmp_path / "images", tmp_path / "masks")
    for number, file in enumerate(files[::3]):  # of nothing or of everything: no mask
        mask = np.full((48, 56), 255 * (number % 2), np.uint8)
        Image.fromarray(mask).save(masks / file.relative_to(tmp_path / "images"))
    outlined = {f"{file.parent.name}/{file.name}" for i, file in enumerate(files) if i % 3}
    shards, run = tmp_path / "shards", tmp_path / "run"
    settings = {"size": 32, "split": "0.5/0.2/0.3", "masks": masks, "workers": 1}
    pack(PackConfig("folder", tmp_path / "images", shards, **settings))
    write_model(run)
    config = ExplainConfig(run, shards, cache=tmp_path / "cache", limit=6, format="webdataset")
    explain(config)
    place = run / "test"
    info = json.loads((place / "relevance.json").read_text())
    masked = {sample.key for sample in read_index(shards).samples if sample.path in outlined}
    shares, of_class, num_masked = [], {}, 0
    for key, data in members_of(place / "relevance"):
        found = decode(key, data)
        likeliest = found.ledger[:, 0].argmax()
        relevance = found.relevance[likeliest].astype(np.float64)
        shares.append(1 - np.abs(relevance[3:29, 3:29]).sum() / np.abs(relevance).sum())
        xray = np.array(Image.open(place / "heatmaps" / f"{key}.png"))
        of_class.setdefault(found.classes[likeliest], []).append((relevance, xray))
        num_masked += key in masked
    regions = info["outside"]["all"]["regions"]
    assert regions["border"]["share"] == pytest.approx(np.mean(shares), abs=1e-6)
    assert regions["border"]["images"] == len(shares) == 6
    assert 0 < regions["beside_lungs"]["images"] == num_masked < 6
    assert info["outside"]["classes"].keys() == of_class.keys()
    for name, pairs in of_class.items():
        mean = np.mean([values / np.abs(values).sum() for values, _ in pairs], axis=0)
        xray = np.rint(np.mean([image for _, image in pairs], axis=0)).astype(np.uint8)
        drawn = np.array(Image.open(place / "mean_maps" / f"{name}.png"), np.int16)
        assert np.abs(drawn - np.array(overlay(xray, mean), np.int16)).max() <= 1
    before = (place / "relevance.json").read_bytes()
    under_way = dict.fromkeys(("outside", "pixel_flipping", "randomisation", "ledger_residual"))
    (place / "relevance.json").write_text(json.dumps(info | under_way))
    kept = {file: file.stat().st_mtime_ns for file in (place / "relevance").iterdir()}
    explain(config)
    assert {file: file.stat().st_mtime_ns for file in (place / "relevance").iterdir()} == kept
    assert (place / "relevance.json").read_bytes() == before


def write_model(run: Path) -> None:
    """A random network that has seen some images."""
    (run / "model").mkdir(parents=True)
    torch.manual_seed(0)
    model = Classifier(Network(growth_rate=4, block_config=(2, 2, 2, 2)), ["a", "b"], 32)
    model(torch.randint(0, 256, (16, 1, 32, 32), dtype=torch.uint8))
    save_model(model, run / "model")


def members_of(directory: Path) -> list[tuple[str, bytes]]:
    """Keys and npz of shards of maps."""
    found = []
    for file in sorted(directory.glob("*.tar")):
        with tarfile.open(file) as tar:
            found += [(m.name.removesuffix(".npz"), tar.extractfile(m).read()) for m in tar]
    return found
