import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest
from support import contents, make_images

from cxrdist.cli import COMMANDS, parse
from cxrdist.config import PackConfig, SourceName

SHARDS = Path(__file__).parents[2] / "shards"
RECIPES = sorted(SHARDS.glob("*.yaml"))


PUBLIC = sorted({*get_args(SourceName)} - {"folder", "csv", "several"})


def read_recipe(recipe: Path) -> PackConfig:
    arguments = ["--config", str(recipe), "--input", "in", "--out", "out"]
    return parse(COMMANDS["pack"], arguments)


def module_name(source: str) -> str:
    return f"cxrdist.data.{source.replace('-', '_')}"


def known_classes(config: PackConfig) -> list[set[str]]:
    """The sets of classes that a reader can give; none where these are the labels that it meets."""
    reader = import_module(module_name(config.source))
    if config.label_map:
        return []
    if config.against_rest:
        return [{config.against_rest, reader.REST}]
    if config.source == "covid19-radiography":
        return [{*release.classes} for release in reader.RELEASES]
    if config.source == "covidx":
        return [{*classes} for classes in reader.CLASSES]
    names = ("CLASSES", "LABELS", "KAGGLE_LABELS")
    return [{*getattr(reader, name)} for name in names if hasattr(reader, name)]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_each_recipe_is_read_and_names_its_data_set(recipe):
    """Its fields are pack's, its command names it, and it tells source, licence and flaws."""
    config, text = read_recipe(recipe), recipe.read_text()
    assert re.search(rf"--config {recipe.stem}\s", text)
    for word in ("Source:", "Licence:", "Get it:", "Run:", "Known:"):
        assert f"# {word}" in text
    of_the_paper = recipe.stem in ("covid19-radiography-first", "covid19-radiography-middle")
    assert (config.split == "paper") == of_the_paper


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_expects_classes_that_its_reader_gives(recipe):
    """Of one release or version; a label that the reader does not know would never be counted."""
    config = read_recipe(recipe)
    known = known_classes(config)
    assert not known or any({*config.expect} <= classes for classes in known)
    assert all(number > 0 for number in config.expect.values())


def test_there_is_a_recipe_for_each_data_set():
    """Each public data set that is read has one, and the README's table names it."""
    assert {read_recipe(recipe).source for recipe in RECIPES} == {*PUBLIC}
    table = (SHARDS.parent / "README.md").read_text()
    for recipe in RECIPES:
        assert f"`{recipe.stem}`" in table


def test_the_slurm_script_packs_parts_and_joins_them(tmp_path):
    """Four array tasks, one of them again by itself, and the last job: the bytes of one pack."""
    images = make_images(tmp_path / "images", {"a": 30, "b": 30})
    options = ["--source", "folder", "--input", images, "--size", 32, "--split", "0.5/0.2/0.3"]

    def submit(out: str, *more: str, **environment: str) -> None:
        command = ["bash", SHARDS / "pack.sbatch", *options, "--out", tmp_path / out, *more]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [str(word) for word in command],
            env=os.environ | {"PATH": path, "SLURM_CPUS_PER_TASK": "1"} | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    (tmp_path / "modules").write_text("export CXRDIST_SOURCED=yes\n")
    submit("whole", CXRDIST_ENV=str(tmp_path / "modules"))
    for task in "012":
        submit("parts", SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_COUNT="4")
    submit("parts", SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_TASK_COUNT="1", NUM_TASKS="4")
    submit("parts", "--merge")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
