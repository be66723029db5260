"""Pictures and the document that names them: both are of one command, or the document is absent."""

import json
import shutil

import pytest

from cxrdist.cli import main
from cxrdist.data.boxes import Box, write_boxes
from cxrdist.data.index import read_index
from cxrdist.explain import pictures

COMMANDS = {"localise": "localisation", "probe-text": "text"}
NAMES = {"localise": ("xray", "lrp", "contrast"), "probe-text": ("xray", "map")}


@pytest.fixture
def probed(small_run, tmp_path):
    """A copy of the small run, and a table of boxes on other images than those of its results."""
    shutil.copytree(small_run / "run", tmp_path / "run")
    samples = [s for s in read_index(small_run / "shards").samples if s.split == "test"]
    rows = [f"{sample.path},{sample.label},9,11,14,8" for sample in samples[3:7]]
    table = "\n".join(["image,label,x,y,width,height", *rows])
    (tmp_path / "localise.csv").write_text(table + "\n")
    boxes = {sample.path: [Box(9, 11, 14, 8, "L", 0.8)] for sample in samples[3:7]}
    write_boxes(tmp_path / "probe-text.csv", boxes)
    return tmp_path


def run_on(small_run, probed, command):
    paths = ["--shards", small_run / "shards", "--cache", small_run / "cache"]
    paths += ["--run", probed / "run", "--boxes", probed / f"{command}.csv"]
    return main([command, *map(str, paths)])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_document_is_never_beside_pictures_of_another_command(
    small_run, probed, monkeypatch, command
):
    """A command killed at its second picture leaves no document; the next one names all files."""
    directory = probed / "run" / "test" / COMMANDS[command]
    document = directory.with_suffix(".json")
    before, save = document.read_bytes(), pictures.save_picture
    saved = []

    def stop_at_second(path, picture):
        if saved:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, picture)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "save_picture", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            run_on(small_run, probed, command)
    assert saved
    assert not document.exists()
    (directory / "notes.png").touch()
    assert run_on(small_run, probed, command) == 0
    assert document.read_bytes() != before
    shown = json.loads(document.read_text())["pictures"]
    names = {picture[what] for picture in shown for what in NAMES[command]}
    assert {file.name for file in directory.iterdir()} == names | {"notes.png"}
