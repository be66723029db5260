"""Captured steps, with a stand-in for the GPU's recorder: replaying is doing the step again."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from recorder import Again, record_again

from cxrdist.config import Augmentation, Background, Network, Stage, TrainConfig
from cxrdist.files import read_log
from cxrdist.train import learner, stage
from cxrdist.train.capture import WARM_UP_STEPS, CapturedStep, Tensors, can_capture
from cxrdist.train.loop import train

BLOCKS = ["stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "head"]


def test_each_size_and_turn_is_recorded_once_and_every_step_counts():
    """Warm-up steps, the recording and replays change the state as plain steps do, once each."""
    total = torch.zeros(())

    def step(turn: int, numbers: torch.Tensor) -> Tensors:
        total.add_(numbers.sum() + 100 * turn)
        return numbers.max(), total.clone()

    recorded = []

    def record(step: partial, static: Tensors) -> tuple[Again, Tensors]:
        recorded.append((step.args[0], len(static[0])))
        return record_again(step, static)

    captured, expected = CapturedStep(step, record), 0.0
    for number in range(4 * WARM_UP_STEPS + 8):
        turn, size = number // 2 % 2, 4 + number % 2
        numbers = torch.arange(size) + float(number)
        expected += float(numbers.sum()) + 100 * turn
        largest, found = captured(turn, numbers)
        assert float(largest) == float(numbers.max())
        assert float(found) == expected
    assert recorded == [(0, 4), (0, 5), (1, 4), (1, 5)]


def test_only_small_steps_of_one_gpu_are_captured():
    """DDP's collectives are not in the graph, and large batches gain nothing."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert can_capture(gpu, 1, 9)
    assert not can_capture(gpu, 2, 9)
    assert not can_capture(gpu, 1, 256)
    assert not can_capture(cpu, 1, 9)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_captured_training_ends_in_the_bytes_of_a_plain_one(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
):
    """With rates that rise and fall, an average and a limit of the norm, over two stages.

    The first has a background loss, whose steps take turns.

    The rates are such that float32, which they have on the device, holds them.
    """
    stages = {
        name: Stage(dict.fromkeys(blocks, 0.0625), epochs=2, patience=2)
        for name, blocks in (("all", BLOCKS), ("head", ["head"]))
    }
    stages["all"] = replace(stages["all"], background=Background(0.5, "border"))
    monkeypatch.setattr(learner, "COMPILE_BACKEND", "eager")
    for name, captured in (("plain", False), ("captured", True)):
        monkeypatch.setattr(stage, "can_capture", lambda *_, captured=captured: captured)
        monkeypatch.setattr(stage, "record_cuda_graph", record_again)
        train(
            TrainConfig(
                shards,
                tmp_path / name,
                stages,
                init="none",
                global_batch_size=7,
                augmentation=Augmentation(degrees=5),
                network=Network(growth_rate=4, block_config=(1, 1, 1, 1)),
                optimizer=optimizer,
                max_gradient_norm=1.0,
                average=0.9,
                compile=True,
                cache=tmp_path / "cache",
            )
        )
    plain, captured = (
        (tmp_path / name / "model" / "model.safetensors").read_bytes()
        for name in ("plain", "captured")
    )
    assert plain == captured


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_on_a_gpu_the_captured_training_has_the_losses_of_the_plain_one(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
):
    """The real recorder and compiler: warm-up, both sizes of a step, replays, rates that fall."""
    losses = {}
    for name, captured in (("plain", False), ("captured", True)):
        monkeypatch.setattr(stage, "can_capture", lambda *_, captured=captured: captured)
        config = TrainConfig(
            shards,
            tmp_path / name,
            {"all": Stage(dict.fromkeys(BLOCKS, 1e-3), epochs=3, patience=3, schedule="cosine")},
            init="none",
            global_batch_size=7,
            augmentation=Augmentation(degrees=5),
            network=Network(growth_rate=8, block_config=(2, 2, 2, 2), dropout=0.0),
            optimizer=optimizer,
            compile=captured,
            cache=tmp_path / "cache",
        )
        train(config)
        rows = [row for row in read_log(config.run / "log.jsonl") if row["kind"] == "epoch"]
        losses[name] = [row["val_loss"] for row in rows]
    assert losses["captured"] == pytest.approx(losses["plain"], abs=5e-3)
