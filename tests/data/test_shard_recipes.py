from pathlib import Path

import pytest

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


def test_there_is_a_recipe_for_each_data_set():
    """Three releases and ChestX-ray14 twice."""
    assert len(RECIPES) == 5
