"""Pictures and the document that names them: both are of one command, or the document is absent."""

import json
import shutil
import subprocess

import pytest
from support import small_disk

from cxrdist.cli import main
from cxrdist.data.boxes import Box, write_boxes
from cxrdist.data.index import read_index
from cxrdist.explain import pictures
from cxrdist.explain.relevance import Explainer
from cxrdist.files import locked

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
    assert {file.name for file in directory.iterdir()} == names | {"notes.png", ".lock"}


@pytest.mark.parametrize("command", COMMANDS)
def test_two_at_once_do_not_mix_their_files(small_run, probed, monkeypatch, capsys, command):
    """The second one is refused before it explains an image; the document stays as it is."""
    document = probed / "run" / "test" / f"{COMMANDS[command]}.json"
    before, explained = document.read_bytes(), []
    monkeypatch.setattr(Explainer, "attribute", lambda *_: explained.append(1))
    with locked(document.with_suffix("")):
        assert run_on(small_run, probed, command) == 2
    assert "another cxrdist process is writing here" in capsys.readouterr().err
    assert document.read_bytes() == before
    assert not explained


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_run_is_refused_before_any_image_is_explained(
    small_run, probed, monkeypatch, capsys, command
):
    """One line with the disk's name, as other commands say it; the results are as before."""
    explained = []
    monkeypatch.setattr(Explainer, "attribute", lambda *_: explained.append(1))
    with small_disk(probed / "disk", "5m"):
        shutil.copytree(probed / "run", probed / "disk" / "run")
        subprocess.run(["mount", "-o", "remount,ro", probed / "disk"], check=True)
        (probed / "run").rename(probed / "before")
        (probed / "run").symlink_to(probed / "disk" / "run")
        assert run_on(small_run, probed, command) == 1
    assert not explained
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"{probed / 'run' / 'test'} is read-only; name another place")
