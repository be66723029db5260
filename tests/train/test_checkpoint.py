"""Checkpoints beside what does not belong to them, and with a content that does not fit."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cxrdist.errors import CxrdistError
from cxrdist.train import checkpoint
from cxrdist.train.checkpoint import (
    Checkpoint,
    Position,
    fitting,
    has_checkpoint,
    load_latest,
    load_network,
    load_optimizer_tensors,
    save_best,
    save_checkpoint,
)

RECIPE = "seed: 0\n"
STATE = {f"0.{name}": torch.ones(2, 3) for name in ("exp_avg", "exp_avg_sq")}
STATE |= {"0.step": torch.ones(())}


def position(epochs: int, bests: dict[str, tuple[str, str]]) -> Position:
    stopping = {"patience": 1, "best_loss": 0.5, "best_epoch": 0, "epoch": epochs}
    return Position("all", epochs, 0, epochs, 9, 0, 0, 2**64 - 1, 0, stopping, False, bests, {})


def save(directory: Path, epochs: int, before: Position | None) -> Position:
    """Write best weights and a checkpoint after some epochs."""
    bests = {"all": save_best(directory, epochs, {"w": torch.ones(2)})}
    now = position(epochs, bests)
    losses = torch.zeros(0, dtype=torch.float64)
    save_checkpoint(
        directory, Checkpoint(now, {"w": torch.ones(2)}, {}, {}, losses, losses), RECIPE, before
    )
    return now


def test_only_checkpoints_are_removed(tmp_path):
    """The old checkpoint and its best weights go; whatever else stands there stays untouched."""
    victim = tmp_path / "home"
    (victim / "thesis").mkdir(parents=True)
    directory = tmp_path / "run" / "checkpoints"
    directory.mkdir(parents=True)
    for name in ("thesis", "copy-of-best", "best-00001-keep", "00009", ".x.partial"):
        (directory / name).mkdir()
    for name in (".nfs0001", "00007-0000003", "best-00009"):
        (directory / name).touch()
    (directory / "00000-0000005").symlink_to(victim)
    strangers = set(os.listdir(directory))
    assert not has_checkpoint(directory)
    before = None
    for epochs in (1, 2, 3, 4):
        before = save(directory, epochs, before)
    kept = {"00003-0000000", "00004-0000000", "best-00003", "best-00004"}
    assert set(os.listdir(directory)) == strangers | kept
    assert (victim / "thesis").is_dir()
    found = load_latest(directory, RECIPE, pytest.fail)
    assert found is not None
    assert found.position == before


def test_the_latest_checkpoint_is_that_of_the_largest_numbers(tmp_path):
    """Epoch 100,000 comes after 99,999, and step 10,000,000 after 9,999,999, though not as text."""
    before = None
    for epochs in (99_999, 100_000):
        before = save(tmp_path, epochs, before)
    assert load_latest(tmp_path, RECIPE, pytest.fail).position.epochs_done == 100_000
    names = [f"100000-{step:07d}" for step in (9_999_999, 10_000_000)]
    for name in names:
        (tmp_path / name).mkdir()
    said: list[str] = []
    load_latest(tmp_path, RECIPE, said.append)
    assert [names[1] in said[0], names[0] in said[1]] == [True, True]


def test_a_checkpoint_that_leads_elsewhere_is_damaged(tmp_path):
    """A link in the place of a state, and best weights outside of the run."""
    first = save(tmp_path, 1, None)
    save(tmp_path, 2, first)
    state = tmp_path / "00002-0000000" / "state.safetensors"
    state.rename(tmp_path / "elsewhere")
    state.symlink_to(tmp_path / "elsewhere")
    said: list[str] = []
    found = load_latest(tmp_path, RECIPE, said.append)
    assert found is not None
    assert found.position == first
    assert "is a link" in said[0]
    outside = replace(first, bests={"all": ("../home", "0")}, epochs_done=3)
    losses = torch.zeros(0, dtype=torch.float64)
    save_checkpoint(tmp_path, Checkpoint(outside, {}, {}, {}, losses, losses), RECIPE, first)
    assert load_latest(tmp_path, RECIPE, said.append).position == first


@pytest.mark.parametrize(
    ("network", "optimizer"),
    [
        ({}, {}),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(9)}, {}),
        ({"weight": torch.ones(2, 3, dtype=torch.int64), "bias": torch.ones(2)}, {}),
        (None, {"7.exp_avg": torch.ones(2, 3)}),
        (None, {"x": torch.ones(2, 3)}),
        (None, {"0.exp_avg": torch.ones(2, 3)}),
        (None, {**STATE, "0.evil": torch.ones(1)}),
        (None, {**STATE, "0.exp_avg": torch.ones(5)}),
        (None, {**STATE, "0.exp_avg": torch.ones(2, 3, dtype=torch.bool)}),
    ],
)
def test_states_of_another_network_are_one_line(network, optimizer):
    """Missing, of another shape or type, of no parameter: refused before anything is taken over."""
    layer = torch.nn.Linear(3, 2)

    def take_over() -> None:
        with fitting("x"):
            if network is not None:
                load_network(layer, network)
            load_optimizer_tensors(torch.optim.AdamW(layer.parameters()), optimizer)

    with pytest.raises(CxrdistError, match=r"checkpoints/x: does not fit"):
        take_over()


def test_a_checkpoint_of_an_older_version_has_no_penalties(tmp_path, monkeypatch):
    """It had no background loss: its steps have penalties of 0."""
    losses = torch.tensor([0.5, 0.25], dtype=torch.float64)
    now = replace(position(0, {}), step=2)
    write = checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda tensors: write({k: tensors[k] for k in ("losses",)})
    )
    save_checkpoint(tmp_path, Checkpoint(now, {}, {}, {}, losses, losses), RECIPE, None)
    found = load_latest(tmp_path, RECIPE, print)
    assert torch.equal(found.losses, losses)
    assert found.penalties.tolist() == [0, 0]
