import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest

from cxrdist.cli import COMMANDS, parse
from cxrdist.config import Architecture, Network, Stage
from cxrdist.errors import CxrdistError
from cxrdist.model.densenet import Classifier
from cxrdist.model.networks import block_names
from cxrdist.packaged import RECIPES, files_in
from cxrdist.train.checks import refuse_bad_recipe
from cxrdist.train.stages import (
    EarlyStopping,
    check_stages,
    describe_groups,
    freeze,
    parameter_groups,
    rates_of,
    set_modes,
)

BLOCKS = ["stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "head"]
SMALL = Network(growth_rate=4, block_config=(2, 2, 2, 2))
GOLDEN = Path(__file__).parents[1] / "golden" / "bassi2020_parameter_groups.json"


def bassi2020():
    arguments = ["--config", "bassi2020", "--shards", "s", "--run", "r"]
    return parse(COMMANDS["train"], arguments)


def test_the_papers_stages_have_the_papers_parameter_groups():
    """Section 3.3: blocks, rates, decay, and how many of DenseNet121's tensors in each."""
    config = bassi2020()
    model = Classifier(config.network, ["COVID-19", "NORMAL", "Viral Pneumonia"], 224)
    found = {
        name: describe_groups(parameter_groups(model, stage))
        for name, stage in config.stages.items()
    }
    assert found == json.loads(GOLDEN.read_text())


def test_the_papers_rates_fall_by_3_to_10_from_block_to_block():
    """Section 3.3: head 1e-5, each block 3 to 10 times smaller, then all a tenth, then all 1e-5."""
    config = bassi2020()
    assert list(config.stages["head"].lr.items()) == [("head", 1e-3)]
    rates = [config.stages["unfreeze"].lr[block] for block in BLOCKS]
    assert rates[-1] == 1e-5
    for lower, higher in pairwise(rates):
        assert 3 * (1 - 1e-9) <= higher / lower <= 10
    tenth = [config.stages["no_decay"].lr[block] for block in BLOCKS]
    assert tenth == pytest.approx([rate / 10 for rate in rates])
    assert set(config.stages["all_equal"].lr.values()) == {1e-5}
    assert config.copies == {"COVID-19": 72, "NORMAL": 8, "Viral Pneumonia": 8}
    assert config.global_batch_size == 9


def test_frozen_blocks_have_no_gradient_and_their_batchnorm_is_in_evaluation_mode():
    """A frozen block with BatchNorm in training mode would still move its statistics."""
    model = Classifier(SMALL, ["a", "b"], 32).train()
    trained = {"denseblock4", "head"}
    freeze(model, trained)
    set_modes(model, trained)
    features = model.network.features
    assert not features.denseblock1.denselayer1.norm1.training
    assert not features.transition3.norm.training
    assert features.denseblock4.denselayer2.norm2.training
    assert features.norm5.training
    assert model.network.head_drop.training
    assert not features.conv0.weight.requires_grad
    assert features.norm5.weight.requires_grad


def test_the_rate_of_all_falls_from_the_head_to_the_stem():
    """A block that is named has its own rate; the others lie on the line of `all`."""
    every = Stage({"all": 8.0}, 1, 1, block_decay=0.5)
    assert rates_of(every, SMALL) == {
        "stem": 0.25,
        "denseblock1": 0.5,
        "denseblock2": 1.0,
        "denseblock3": 2.0,
        "denseblock4": 4.0,
        "head": 8.0,
    }
    named = Stage({"head": 3.0, "all": 8.0}, 1, 1, block_decay=0.5)
    squeezenet = Network(architecture="squeezenet1_1")
    rates = rates_of(named, squeezenet)
    assert list(rates.values()) == [8 / 2**i for i in range(9, 0, -1)] + [3.0]
    assert list(rates_of(Stage({"all": 1.0}, 1, 1), squeezenet).values()) == [1.0] * 10
    assert list(rates_of(Stage({"head": 1.0, "stem": 2.0}, 1, 1), SMALL)) == ["stem", "head"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({}, "has none"),
        ({"../one": Stage({"head": 1e-3}, 1, 1)}, r"name '\.\./one' is not valid for a directory"),
        ({"one": Stage({}, 1, 1)}, r"stages\.one: trains nothing"),
        (
            {"one": Stage({"haed": 1e-3}, 1, 1)},
            r"no block 'haed'; .*nearest is head",
        ),
        (
            {"one": Stage({"layer1": 1e-3}, 1, 1)},
            r"no block 'layer1'; .*, all$",
        ),
        ({"one": Stage({"head": 1.0}, 1, 1, block_decay=0.5)}, r"block-decay: .*lr has no `all`"),
        (
            {"one": Stage({"head": 1e-3}, 2, 1, warmup_epochs=2)},
            r"stages\.one\.warmup-epochs: is 2",
        ),
    ],
)
def test_stages_that_cannot_be_meant_are_refused(stages, message):
    """A stage that trains nothing, or a misspelt block, is an error and not a silent freeze."""
    with pytest.raises(CxrdistError, match=message):
        check_stages(stages, BLOCKS)


def test_early_stopping_waits_for_its_patience():
    """A stage ends when `patience` epochs were not better than the best."""
    stopping = EarlyStopping(patience=2)
    assert [stopping.update(loss) for loss in (1.0, 0.5, 0.6)] == [True, True, False]
    assert not stopping.exhausted
    assert not stopping.update(0.5)
    assert stopping.exhausted
    assert (stopping.best_epoch, stopping.best_loss) == (2, 0.5)


@pytest.mark.parametrize("name", files_in(RECIPES))
def test_the_recipes_that_come_with_cxrdist_are_valid(name):
    """Each is read by its name."""
    arguments = ["--config", name, "--shards", "s", "--run", "r"]
    config = parse(COMMANDS["train"], arguments)
    refuse_bad_recipe(config)


def test_a_run_is_not_written_into_shards(tmp_path):
    """It would replace their audit.json."""
    (tmp_path / "index.json").touch()
    arguments = ["--config", "scratch", "--shards", "s", "--run", str(tmp_path)]
    with pytest.raises(CxrdistError, match=r"--run .*: is a directory of shards; name a new one"):
        refuse_bad_recipe(parse(COMMANDS["train"], arguments))


@pytest.mark.parametrize(("recipe", "lowered"), [("finetune", 0.5), ("scratch", 1.0)])
def test_recipes_for_ones_own_classes_serve_every_architecture(recipe, lowered):
    """Rates fall to the half from block to block, head to stem, or are all the same."""
    arguments = ["--config", recipe, "--shards", "s", "--run", "r"]
    config = parse(COMMANDS["train"], arguments)
    for name in get_args(Architecture):
        network = Network(architecture=name)
        refuse_bad_recipe(replace(config, network=network))
        rates = rates_of(config.stages["all"], network)
        assert list(rates) == block_names(network)
        blocks = list(rates.values())[::-1]
        assert blocks == pytest.approx([blocks[0] * lowered**i for i in range(len(blocks))])


@pytest.mark.parametrize("name", ["densenet169", "resnet18"])
def test_recipes_of_a_comparison_differ_in_one_line(name):
    """An architecture given by its flag has its own shape, and not the default one's."""
    arguments = ["--config", "compare", "--shards", "s", "--run", "r"]
    config = parse(COMMANDS["train"], [*arguments, "--network.architecture", name])
    refuse_bad_recipe(config)
    assert config.network == Network(architecture=name, dropout=0.2)
