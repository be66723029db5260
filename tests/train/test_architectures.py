"""Every architecture on several ranks, in a recipe, and what it cannot do."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from support import make_shards, run_ranks

from cxrdist.cli import COMMANDS, main, parse
from cxrdist.config import Architecture, Augmentation, Background, Network, Stage, TrainConfig
from cxrdist.errors import CxrdistError
from cxrdist.train.checks import refuse_bad_recipe
from cxrdist.train.loop import train

SCRIPT = Path(__file__).parent / "architectures.py"
# DenseNets differ in their numbers of layers alone, and the other tests are of one.
OTHERS = [name for name in get_args(Architecture) if not name.startswith("densenet")]


@pytest.fixture(scope="module")
def shards64(tmp_path_factory) -> Path:
    """Shards of 64 px, which AlexNet can take: eight images in train."""
    folder = tmp_path_factory.mktemp("shards64")
    return make_shards(folder, {"a": 10, "b": 10}, size=64, split="0.5/0.25/0.25")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, shards64) -> dict[int, list[dict]]:
    """What one rank and two report of a step, by the number of ranks."""
    folder = tmp_path_factory.mktemp("outcomes")
    done = run_ranks(1, SCRIPT, shards64, folder, *OTHERS)
    assert done.returncode == 0, done.stderr
    return {
        world: [
            torch.load(folder / str(world) / f"rank{rank}.pt", weights_only=True)
            for rank in range(world)
        ]
        for world in (1, 2)
    }


@pytest.mark.parametrize("architecture", OTHERS)
def test_two_ranks_take_the_step_of_one(outcomes, architecture):
    """Slices of one image and two: the same gradient of every tensor, the same statistics."""
    (alone,), both = ([rank[architecture] for rank in outcomes[world]] for world in (1, 2))
    assert [rank["images"] for rank in both] == [1, 2]
    assert alone["images"] == 3
    assert sum(float(rank["loss"][0]) for rank in both) == pytest.approx(float(alone["loss"][0]))
    for rank in both:
        for name, expected in alone["digests"].items():
            difference = (rank["digests"][name] - expected).abs().max()
            assert difference <= 1e-9 * float(expected[0]) + 1e-15, name
    lengths = [float(found[0]) for found in alone["digests"].values()]
    assert sum(length > 0 for length in lengths) > 0.9 * len(lengths)  # the gradient is not none


def recipe(shards: Path, run: Path, architecture: str, **changes: object) -> TrainConfig:
    """Two stages of an epoch: the head, then all blocks with falling rates."""
    stages = {
        "head": Stage({"head": 0.01}, epochs=1, patience=1),
        "every": Stage({"all": 0.001}, epochs=1, patience=1, block_decay=0.5),
    }
    settings = {
        "init": "none",
        "global_batch_size": 6,
        "augmentation": Augmentation(degrees=5),
        "network": Network(architecture=architecture),
        "optimizer": "adamw",
        "cache": run.parent / "cache",
        **changes,
    }
    return TrainConfig(shards, run, stages, **settings)


def test_squares_that_are_too_small_are_refused_before_training(shards, tmp_path):
    """Shards of 32 px for AlexNet: one line, and no run directory."""
    with pytest.raises(CxrdistError, match=r"squares of 32 px, but AlexNet needs at least 63 px"):
        train(recipe(shards, tmp_path / "run", "alexnet"))
    assert not (tmp_path / "run" / "run.json").exists()


def test_one_recipe_serves_every_architecture(tmp_path, capsys):
    """Its stages name head and all; one flag, or one line of it, takes another network."""
    file = tmp_path / "recipe.yaml"
    stages = "{one: {lr: {head: 0.1, all: 0.01}, epochs: 1, patience: 1, block_decay: 0.4}}"
    file.write_text(f"init: none\nnetwork: {{architecture: resnet18}}\nstages: {stages}\n")
    common = ["--config", str(file), "--shards", "s", "--run", "r"]
    assert parse(COMMANDS["train"], common).network.architecture == "resnet18"
    for architecture in get_args(Architecture):
        arguments = [*common, "--network.architecture", architecture]
        config = parse(COMMANDS["train"], arguments)
        assert config.network == Network(architecture=architecture)
        refuse_bad_recipe(config)
    assert main(["train", *common, "--network.architecture", "resnet19"]) == 2
    said = capsys.readouterr().err
    assert "network.architecture" in said
    assert "densenet121" in said
    assert len(said.strip().splitlines()) == 1
    assert main(["train", *common, "--network.growth_rate", "4"]) == 2
    assert "--network.growth-rate: is for DenseNets" in capsys.readouterr().err


def test_the_loss_on_relevance_is_for_densenets(shards, tmp_path):
    """The engine is of a DenseNet; the loss on the gradient is for any network."""
    config = recipe(shards, tmp_path / "run", "resnet18")
    for method in ("gradient", "lrp"):
        background = Background(1.0, "thorax", method)
        stages = {"one": Stage({"all": 0.1}, 1, 1, background=background)}
        config = recipe(shards, tmp_path / "run", "resnet18")
        object.__setattr__(config, "stages", stages)
        if method == "gradient":
            refuse_bad_recipe(config)
    with pytest.raises(CxrdistError, match=r"one\.background\.method: lrp is for DenseNets"):
        refuse_bad_recipe(config)
