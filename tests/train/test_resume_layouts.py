"""Resuming in mid-stage: memory layout, fused kernels, and a GPU's scaler forced on the CPU."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cxrdist.config import Augmentation, Network, Stage, TrainConfig
from cxrdist.distributed import StopVote
from cxrdist.errors import RunFailedError, Stopped
from cxrdist.files import read_log
from cxrdist.train import learner, stage
from cxrdist.train.loop import train

NUM_STOPS = 10
BLOCKS = ["stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "head"]


def recipe(shards: Path, run: Path, **changes: object) -> TrainConfig:
    stages = {
        name: Stage(dict.fromkeys(blocks, 0.01), epochs=2, patience=2, schedule="cosine")
        for name, blocks in (("head", ["head"]), ("all", BLOCKS), ("late", BLOCKS[4:]))
    }
    settings = {
        "init": "none",
        "global_batch_size": 6,
        "augmentation": Augmentation(degrees=5),
        "network": Network(growth_rate=4, block_config=(1, 1, 1, 1)),
        "cache": run.parent / "cache",
        **changes,
    }
    return TrainConfig(shards, run, stages, **settings)


def model_of(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def epoch_rows(run: Path) -> list[dict]:
    return [row for row in read_log(run / "log.jsonl") if row["kind"] == "epoch"]


def run_with_stops(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, num_stops: int) -> int:
    """Train whole; then stopping so often at random steps, resumed each time; stops that came."""
    calls, stops = itertools.count(1), set()

    def passed(vote: StopVote) -> bool:
        return next(calls) in stops

    monkeypatch.setattr(StopVote, "passed", passed)
    train(config)
    num_boundaries = next(calls) - 1
    broken = replace(config, run=config.run.with_name("broken"))
    moments, num_stopped = random.Random(num_boundaries), 0
    # A stop costs no step: the boundaries that are left follow those that were passed.
    ahead = sorted(moments.sample(range(1, num_boundaries), num_stops))
    for first, second in itertools.pairwise([0, *ahead]):
        calls, stops = itertools.count(first + 1), {second}
        try:
            train(broken)
        except Stopped:
            num_stopped += 1
    stops.clear()
    train(broken)
    return num_stopped


@pytest.mark.parametrize(
    ("changes", "scaled"), [({}, False), ({"optimizer": "adamw", "average": 0.9}, True)]
)
def test_a_run_that_stops_within_its_stages_ends_in_the_same_bytes(
    shards, tmp_path, monkeypatch, changes, scaled
):
    """Ten stops at random steps, SGD and AdamW; with a scaler whose first steps overflow, too."""
    if scaled:
        options = {"init_scale": 2.0**127, "growth_interval": 3}
        monkeypatch.setattr(
            stage, "gradient_scaler", lambda _: torch.amp.GradScaler("cpu", **options)
        )
    config = recipe(shards, tmp_path / "whole", **changes)
    assert run_with_stops(config, monkeypatch, NUM_STOPS) == NUM_STOPS
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert model_of(whole) == model_of(broken)
    assert epoch_rows(whole) == epoch_rows(broken)
    weights = load_file(whole / "model" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_a_scaler_changes_the_training_by_rounding_only(shards, tmp_path, monkeypatch):
    """Where nothing overflows, losses and weights are those without one."""
    train(recipe(shards, tmp_path / "plain"))
    monkeypatch.setattr(stage, "gradient_scaler", lambda _: torch.amp.GradScaler("cpu"))
    train(recipe(shards, tmp_path / "scaled"))
    plain, scaled = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("plain", "scaled")
    )
    for name, tensor in plain.items():
        assert torch.allclose(tensor, scaled[name], rtol=1e-4, atol=1e-5), name


def test_gradients_that_never_fit_into_fp16_stop_the_run_by_name(shards, tmp_path, monkeypatch):
    """A scaler that skips for ever would train nothing without a word."""
    options = {"init_scale": float("inf")}
    monkeypatch.setattr(stage, "gradient_scaler", lambda _: torch.amp.GradScaler("cpu", **options))
    config = recipe(shards, tmp_path / "run")
    head = {"head": Stage({"head": 0.01}, epochs=9, patience=9)}
    with pytest.raises(RunFailedError, match=r"stage head, epoch 1, step 16: .* 16 steps in a row"):
        train(replace(config, stages=head, global_batch_size=1))
    assert not (tmp_path / "run" / "model").exists()


def test_a_scaler_that_falls_to_its_least_scale_stops_the_run(shards, tmp_path, monkeypatch):
    """Below 1 it would make gradients smaller than they are."""
    options = {"init_scale": 0.75, "growth_interval": 10**6}
    monkeypatch.setattr(stage, "gradient_scaler", lambda _: torch.amp.GradScaler("cpu", **options))
    with pytest.raises(RunFailedError, match=r"stage head, epoch 1.* has fallen to 0\.75"):
        train(recipe(shards, tmp_path / "run"))


def test_a_compiled_run_resumes_with_the_losses_of_an_eager_one(shards, tmp_path, monkeypatch):
    """Stopped and resumed it has the bytes of the unbroken compiled run."""
    monkeypatch.setattr(learner, "COMPILE_BACKEND", "aot_eager")
    stages = {"all": Stage(dict.fromkeys(BLOCKS, 0.01), epochs=2, patience=2)}
    plain = replace(recipe(shards, tmp_path / "plain"), stages=stages)
    train(plain)
    config = replace(plain, run=tmp_path / "whole", compile=True)
    assert run_with_stops(config, monkeypatch, 1) == 1
    assert model_of(tmp_path / "whole") == model_of(tmp_path / "broken")
    losses = [
        [
            row[name]
            for row in epoch_rows(tmp_path / run)
            for name in ("loss", "val_loss")
            if name in row
        ]
        for run in ("plain", "whole")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.usefixtures("fresh_accelerator")
def test_on_a_gpu_a_run_that_stops_within_its_stages_goes_on(
    shards, tmp_path, monkeypatch, optimizer, precision
):
    """CUDA's fused kernels refuse a state in another layout; kernels may reorder their sums."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    config = recipe(shards, tmp_path / "whole", optimizer=optimizer)
    assert run_with_stops(config, monkeypatch, 3) == 3
    losses = [
        [row["val_loss"] for row in epoch_rows(tmp_path / run)] for run in ("whole", "broken")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=5e-3)
