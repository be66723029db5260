import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from slurm.cluster import Cluster
from support import contents, run_ranks

BLOCKS = ("stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "head")
RECIPE = {
    "init": "none",
    "global_batch_size": 6,
    "network": {"growth_rate": 4, "block_config": [1, 1, 1, 1]},
    "stages": {
        "head": {"lr": {"head": 0.01}, "epochs": 20, "patience": 20},
        "all": {"lr": dict.fromkeys(BLOCKS, 0.001), "epochs": 30, "patience": 30},
    },
}


@pytest.fixture(scope="module")
def train(shards, tmp_path_factory) -> Callable[[Path], tuple]:
    """The words of `train` but its name, for a run directory."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    words = ("--config", folder / "recipe.yaml", "--shards", shards, "--cache", folder / "cache")
    return lambda run: (*words, "--run", run)


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory) -> Path:
    """The run directory of two ranks without Slurm."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_ranks(2, "-m", "cxrdist", "train", *train(run))
    assert done.returncode == 0, done.stderr
    return run


def submit(cluster: Cluster, train: tuple) -> int:
    return cluster.submit("--nodes=2", "--cpus-per-task=1", "launch/train.sbatch", *train)


def epochs(run: Path) -> list[dict]:
    """The rows of the epochs that are done, without what depends on the clock."""
    log = run / "log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    rows = [row for row in map(json.loads, lines) if row["kind"] == "epoch"]
    return [{k: row.get(k) for k in ("stage", "epoch", "step", "loss", "val_loss")} for row in rows]


def assert_same(run: Path, undisturbed: Path) -> None:
    assert epochs(run) == epochs(undisturbed)
    assert contents(run / "model") == contents(undisturbed / "model")


def wait_for_epochs(cluster: Cluster, job: int, run: Path) -> None:
    """Wait until a job has come further since it was started or restarted."""
    before = len(epochs(run))
    cluster.wait(lambda: len(epochs(run)) > before, f"more epochs of job {job}")


def test_a_requeued_job_that_loses_a_node_ends_as_if_nothing_had_happened(
    cluster, train, undisturbed, tmp_path
):
    """Requeued by hand, then bereft of its second node: the bytes of two ranks without Slurm."""
    run = tmp_path / "run"
    job = submit(cluster, train(run))
    wait_for_epochs(cluster, job, run)
    cluster.run("scontrol", "requeue", job)
    cluster.wait(lambda: cluster.job(job)[:2] == ("RUNNING", 1), "job that runs again")
    wait_for_epochs(cluster, job, run)
    cluster.lose_node("n2")
    cluster.wait(lambda: cluster.job(job).state == "PENDING", "job that waits for its node")
    cluster.restore_node("n2")
    ended = cluster.wait_for_end(job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 2), cluster.log(job)
    assert_same(run, undisturbed)


def test_a_job_that_is_told_to_stop_saves_and_requeues_itself(
    cluster, train, undisturbed, tmp_path
):
    """The batch script is told, as before a time limit: all ranks end with 75, nothing is lost."""
    run = tmp_path / "run"
    job = submit(cluster, train(run))
    for restarts, name in enumerate(("USR1", "TERM"), start=1):
        wait_for_epochs(cluster, job, run)
        cluster.run("scancel", "--batch", f"--signal={name}", job)
        cluster.wait(lambda n=restarts: cluster.job(job)[:2] == ("RUNNING", n), "requeued job")
    ended = cluster.wait_for_end(job)
    log = cluster.log(job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 2), log
    assert log.count("Exited with exit code 75") == 2 * 2
    assert log.count("stopped and saved") == 2
    assert_same(run, undisturbed)
