import re
from pathlib import Path

import pytest
import yaml

from cxrdist.catalogue import FIGURES, summary
from cxrdist.cli import main

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT / "cxrdist" / "recipes", ROOT / "shards")
FILES = [
    file for folder in FOLDERS for file in sorted(folder.glob("*.yaml"), key=lambda file: file.stem)
]


def test_all_recipes_are_listed(capsys):
    """By name, those of train and of pack, with what the packs should count."""
    assert main(["recipes"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^  (\S+)$", said, re.MULTILINE) == [file.stem for file in FILES]
    for file in FILES:
        for name, images in (yaml.safe_load(file.read_text()).get("expect") or {}).items():
            assert f"{name} {images:,}" in " ".join(said.split())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_says_what_it_is_for_and_what_it_reaches(file):
    """In its first sentence; recipes of train have one paragraph of figures of each kind."""
    purpose, *figures = summary(file.read_text())
    assert 20 < len(purpose) < 300
    assert purpose.endswith(".")
    kinds = list(FIGURES) if file.parent.name == "recipes" else []
    assert [line.split()[0] for line in figures] == kinds


def test_the_first_sentence_and_the_figures_are_taken():
    """Dots within a sentence do not end it; a paragraph ends with an empty line of the comment."""
    text = "# Net (Li et al. 2020, v1.2):\n#  good. Else.\n#\n# Expected: a\n# b\n#\n# c\nx: 1\n"
    assert summary(text) == ["Net (Li et al. 2020, v1.2): good.", "Expected: a b"]


def test_one_recipe_is_printed_as_it_is(capsys):
    """So that it can be written to a file and changed."""
    assert main(["recipes", "scratch"]) == 0
    assert capsys.readouterr().out == (ROOT / "cxrdist" / "recipes" / "scratch.yaml").read_text()
    assert main(["recipes", "chexprt"]) == 2
    assert capsys.readouterr().err.endswith("; nearest is chexpert\n")


def test_a_recipe_is_printed_whatever_the_directory_holds(tmp_path, monkeypatch, capsys):
    """A file of the user that has the name of a recipe is not shown in its place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "finetune").write_text("mine\n")
    assert main(["recipes", "finetune"]) == 0
    assert capsys.readouterr().out == (FOLDERS[0] / "finetune.yaml").read_text()
