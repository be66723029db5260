"""What a run tells of its plan before it begins."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.launch import _validate_launch_command

from cxrdist import launch
from cxrdist.cli import COMMANDS, parse
from cxrdist.data.plan import copies_of, plan_epoch, refuse_uncrossed
from cxrdist.data.records import Record, Source
from cxrdist.data.splits import assign_splits
from cxrdist.errors import CxrdistError
from cxrdist.run import RunDirectory
from cxrdist.train.training import epoch_table, recipe_yaml, refuse_other_run

CLASSES = ["COVID-19", "NORMAL", "Viral Pneumonia"]


def test_the_papers_data_set_gives_the_papers_epochs_but_for_its_rounding():
    """219/1341/1345 images: 9144 of COVID-19 as in section 2.3, 8200 and 8224 for its 8128.

    The paper's 8128 = 8 x 1016 is not 8 x 80 % of the 1281 and 1285 images that are not in test.
    """
    config = parse(COMMANDS["train"], ["--config", "bassi2020", "--shards", "s", "--run", "r"])
    records = [
        Record(Path(), f"{name}/{i}", name, f"{name}{i}", "s")
        for name, count in zip(CLASSES, (219, 1341, 1345), strict=True)
        for i in range(count)
    ]
    source = Source(records, "multiclass", CLASSES, "s")
    splits = np.array(assign_splits(source, "paper", seed=0))
    targets = np.array([[record.label == name for name in CLASSES] for record in records], np.int8)
    copies = copies_of(targets, CLASSES, config.copies)
    refuse_uncrossed(copies, config.augmentation)
    train, val = (np.flatnonzero(splits == name) for name in ("train", "val"))
    told = epoch_table(targets, CLASSES, copies, (train, val))
    assert [line.split()[-4:] for line in told.splitlines()[2:]] == [
        ["127", "9144", "32", "2304"],
        ["1025", "8200", "256", "2048"],
        ["1028", "8224", "257", "2056"],
        ["2180", "25568", "545", "6408"],
    ]
    batch = config.global_batch_size
    plan = plan_epoch(train, copies[train], config.augmentation, batch, (0, "head", 1))
    assert (len(plan.samples), plan.num_steps) == (25568, 2841)


def test_an_image_of_several_labels_counts_for_each_of_them():
    """And once in the row of all; one without a label counts there alone."""
    targets = np.array([[1, 1], [0, 1], [0, 0], [-1, 1]], np.int8)
    told = epoch_table(targets, ["a", "b"], np.array([4, 3, 1, 1]), (np.arange(3), np.array([3])))
    assert [line.split() for line in told.splitlines()[2:]] == [
        ["a", "1", "4", "0", "0"],
        ["b", "2", "7", "1", "1"],
        ["all", "3", "8", "1", "1"],
    ]


def commands_of(recipe: Path) -> list[list[str]]:
    """Read the commands that stand in the head of a recipe, as a shell would."""
    lines = [line[1:] for line in recipe.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    starts = ("   cxrdist ", "   accelerate ")
    return [
        shlex.split(line, comments=True) for line in text.splitlines() if line.startswith(starts)
    ]


def test_the_papers_commands_are_the_papers_protocol(monkeypatch):
    """Two ranks in float32, and words covered with black on the test images only.

    Accelerate itself reads the launch, and cxrdist the rest.
    """
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    find, pack, train, evaluate = commands_of(root / "cxrdist" / "recipes" / "bassi2020.yaml")
    assert train[:2] == ["cxrdist", "launch"]
    options, _, _ = _validate_launch_command(launch._read(train[2:]))
    assert (options.num_processes, options.mixed_precision) == (2, "no")
    command, *arguments = options.training_script_args
    assert (options.training_script, command) == ("cxrdist", "train")
    trained = parse(COMMANDS["train"], arguments)
    assert trained.augmentation.draws == "crossed"
    assert trained.frozen_batch_norm == "moving"
    packed = parse(COMMANDS["pack"], pack[2:])
    assert (packed.cover, packed.cover_split, packed.split) == ("black", "test", "paper")
    found = parse(COMMANDS["find-text"], find[2:])
    assert (found.out, found.input, found.source) == (
        *(packed.text_boxes, packed.input, packed.source),
    )
    assert packed.out == trained.shards
    evaluated = parse(COMMANDS["evaluate"], evaluate[2:])
    assert evaluated.run.parent.parent == trained.run


@pytest.mark.parametrize(
    ("flags", "change"),
    [
        (["--stages.all.epochs", "5"], "stages.all.epochs was 30, is 5"),
        (["--stages.all.lr.all", "0.01"], "stages.all.lr.all was 0.001, is 0.01"),
        (["--augmentation.flip", "false"], "augmentation.flip was True, is False"),
        (["--seed", "3"], "seed was 0, is 3"),
    ],
)
def test_another_recipe_is_refused_by_the_field_that_differs(tmp_path, flags, change):
    """A whole group of fields, such as all stages, would hide which of them it is."""
    command = ["--config", "scratch", "--shards", "s", "--run", str(tmp_path)]
    run = RunDirectory(tmp_path)
    run.recipe.write_text(recipe_yaml(parse(COMMANDS["train"], command)))
    run.model.mkdir()
    (run.model / "model.json").write_text("{}")
    with pytest.raises(CxrdistError, match=rf"another recipe \({re.escape(change)}\); give"):
        refuse_other_run(run, parse(COMMANDS["train"], [*command, *flags]), None, "no")
