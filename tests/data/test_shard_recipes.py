import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import contents, make_images

from cxrdist.cli import COMMANDS, parse
from cxrdist.data.chestxray14 import LABELS
from cxrdist.data.covid19_radiography import RELEASES

SHARDS = Path(__file__).parents[2] / "shards"
RECIPES = sorted(SHARDS.glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_each_recipe_is_read_and_names_its_data_set(recipe):
    """Its fields are pack's, its command names it, and it tells source, licence and counts."""
    arguments = ["--config", str(recipe), "--input", "in", "--out", "out"]
    config = parse(COMMANDS["pack"], "pack", arguments)
    text = recipe.read_text()
    assert f"--config shards/{recipe.name}" in text
    for word in ("Source:", "Licence:", "Get it:", "Known:"):
        assert f"# {word}" in text
    if config.source == "chestxray14":
        known = [{config.against_rest, "rest"}] if config.against_rest else [set(LABELS)]
    else:
        known = [set(release.classes) for release in RELEASES]
    assert set(config.expect) in known
    of_the_paper = recipe.stem in ("covid19-radiography-first", "covid19-radiography-middle")
    assert (config.split == "paper") == of_the_paper


def test_there_is_a_recipe_for_each_data_set():
    """Three releases and ChestX-ray14 twice."""
    assert len(RECIPES) == 5


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
