import json
import os
import signal

import numpy as np
import pytest
import yaml
from support import make_images

from cxrdist import demo as module
from cxrdist.cli import main
from cxrdist.config import DemoConfig
from cxrdist.data.phantom import COVID
from cxrdist.demo import _draw_phantoms, _inside, _planted_boxes, demo
from cxrdist.errors import CxrdistError

SMALL = {"growth_rate": 4, "block_config": [1, 1, 1, 1]}
ONE_EPOCH = {"lr": {"head": 1e-3}, "epochs": 1, "patience": 1}


def test_the_demo_goes_the_whole_way(tmp_path, monkeypatch, capfd):
    """On a few phantoms two CPU ranks train DenseNet121; the figure and the report come out."""
    monkeypatch.setattr(module, "PATIENTS_PER_CLASS", 6)
    monkeypatch.setattr(module, "EXPLAINED_IMAGES", 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    demo(DemoConfig(tmp_path / "demo"))
    said = capfd.readouterr().out
    assert "training on 2 CPU ranks" in said
    assert "positive relevance" in said
    assert said.strip().endswith(f"the report: {tmp_path / 'demo' / 'run' / 'report.html'}")
    assert "smoke test" not in said
    assert "smoke test" not in (tmp_path / "demo" / "run" / "report.html").read_text()
    info = json.loads((tmp_path / "demo" / "run" / "run.json").read_text())
    assert info["world_size"] == 2
    assert list(info["stages"]) == ["all", "fine"]


def test_an_answer_on_other_images_is_marked_as_a_smoke_test(tmp_path, monkeypatch, capfd):
    """On a folder terminal, report and card say that figures mean nothing; not on our own."""
    small = {"optimizer": "adamw", "init": "none", "network": SMALL, "stages": {"one": ONE_EPOCH}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))

    def train_here(_recipe, shards, run, cache):
        places = ("--shards", shards, "--run", run, "--cache", cache)
        assert main(["train", *map(str, ("--config", tmp_path / "small.yaml", *places))]) == 0

    monkeypatch.setattr(module, "_train_on_all_ranks", train_here)
    monkeypatch.setattr(module, "explain", lambda _: None)
    images = make_images(tmp_path / "images", {"a": 16, "b": 16})
    demo(DemoConfig(tmp_path / "demo", "folder", images, r"^(\w+)_"))
    first, *_, last = capfd.readouterr().out.splitlines()
    assert first == last == module.SMOKE_TEST
    run = tmp_path / "demo" / "run"
    assert "A smoke test, not a result" in (run / "report.html").read_text()
    assert "A smoke test, not a result" in (run / "model" / "README.md").read_text()


def test_a_stopped_demo_says_what_makes_the_same_command_work_again(tmp_path, monkeypatch, capsys):
    """It refuses a folder that already exists, so that folder must go."""
    out = tmp_path / "demo"

    def stop(*_):
        out.mkdir()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module, "_draw_phantoms", stop)
    assert main(["demo", "--out", str(out)]) == 75
    remove = f"remove {out}, then run the same command again"
    assert capsys.readouterr().err.endswith(
        f"stopped on SIGTERM; a demo does not resume: {remove}\n"
    )
    assert main(["demo", "--out", str(out)]) == 2


@pytest.mark.parametrize("options", [{"source": "folder"}, {"input": "somewhere"}])
def test_source_and_input_go_together(tmp_path, options):
    """A folder that would be ignored, or one that is missing, is refused."""
    with pytest.raises(CxrdistError, match="go together"):
        demo(DemoConfig(tmp_path / "demo", **options))


def test_lungs_are_those_of_phantoms(tmp_path):
    """A folder has no masks that the demo knows of: refused, with the way to train on it."""
    with pytest.raises(CxrdistError, match="--masks and train with --config lungs"):
        demo(DemoConfig(tmp_path / "demo", "folder", tmp_path, recipe="lungs"))


def test_every_covid_phantom_of_the_lungs_recipe_has_a_word_and_opacities(tmp_path, monkeypatch):
    """Each image has a mask; words stand on all images of COVID-19 and on no others."""
    monkeypatch.setattr(module, "LUNGS_PATIENTS_PER_CLASS", 3)
    images, masks = tmp_path / "images", tmp_path / "masks"
    assert _draw_phantoms("lungs", images, masks) == masks
    drawn = {path.relative_to(images) for path in images.glob("*/*.png")}
    assert {path.relative_to(masks) for path in masks.glob("*/*.png")} == drawn
    covid = {path.as_posix() for path in drawn if path.parts[0] == COVID}
    table = images / "opacities.csv"
    assert set(_planted_boxes(table, "word")) == covid < set(_planted_boxes(table, "opacity"))


def test_an_existing_directory_is_not_touched(tmp_path):
    """The demo never writes into what stands."""
    with pytest.raises(CxrdistError, match="already exists"):
        demo(DemoConfig(tmp_path))


def test_chance_is_the_area_of_the_opacities():
    """Overlapping boxes are counted once; relevance spread evenly has exactly their share."""
    boxes = [np.array([0.0, 0.0, 0.5, 0.5]), np.array([0.25, 0.0, 0.5, 0.5])]
    inside = _inside(boxes, 64)
    assert inside.mean() == pytest.approx(0.75 * 0.5)
    assert np.ones((64, 64))[inside].sum() / 64**2 == inside.mean()
