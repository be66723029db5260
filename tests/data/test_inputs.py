"""Image files that are given to a trained model."""

from pathlib import Path

from cxrdist.data.found import LeftOut
from cxrdist.data.inputs import find_inputs


def test_each_file_is_found_once_whatever_its_names(tmp_path, monkeypatch):
    """Given by itself, by its folder, by a folder below, relative, and around a corner."""
    for name in ("in/a.png", "in/b.png", "in/note.txt", "in/sub/c.png", "in/sub/note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    given = ["in/b.png", "in/sub/../b.png", "in/sub", f"{tmp_path}/in", "in", "in/sub/note.txt"]
    inputs, left_out = find_inputs([Path(path) for path in given], tmp_path / "heatmaps")
    assert [(str(item.file), item.name) for item in inputs] == [
        ("in/b.png", "b.png"),
        ("in/sub/c.png", "c.png"),
        (f"{tmp_path}/in/a.png", "a.png"),
        ("in/sub/note.txt", "note.txt"),
    ]
    assert left_out == [LeftOut(f"{tmp_path}/in/note.txt", "not an image")]
