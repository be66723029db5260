import json

import yaml
from slurm.cluster import Cluster
from support import contents, make_images, make_shards

CLASSES = {"a": 20, "b c": 20, "d": 20}
RECIPE = {
    "init": "none",
    "global_batch_size": 9,
    "network": {"growth_rate": 4, "block_config": [1, 1, 1, 1]},
    "stages": {"head": {"lr": {"head": 0.01}, "epochs": 2, "patience": 2}},
}


def submit(cluster: Cluster, *words: object) -> dict[str, int]:
    """`submit.sh WORDS` with an array of two tasks; what each job does, and its number."""
    lines = cluster.run("env", "PARTS=2", "bash", "launch/submit.sh", *words).splitlines()
    return {does: int(job.split()[1]) for job, does in (line.split(": ") for line in lines)}


def test_one_line_takes_images_to_a_report(cluster, tmp_path):
    """Array, join, two nodes of training, evaluation and heat maps, report: each after the last."""
    whole = make_shards(tmp_path / "whole", CLASSES)
    images = make_images(tmp_path / "images", CLASSES)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    shards, run = tmp_path / "shards", tmp_path / "run"
    pack = ("--pack", "--source", "folder", "--input", images, "--size", 32)
    pack = (*pack, "--split", "0.5/0.2/0.3", "--patient-pattern", r"^(\w+)_")
    train = ("--train", "--config", tmp_path / "recipe.yaml", "--cache", tmp_path / "cache")
    explain = ("--explain", "--limit", 4, "--cache", tmp_path / "cache")
    jobs = submit(cluster, shards, run, *pack, *train, *explain)
    assert list(jobs) == ["pack, 2 tasks", "pack, join", "train", "evaluate", "explain", "report"]
    for job in jobs.values():
        assert cluster.wait_for_end(job).state == "COMPLETED", cluster.log(job)
    found = contents(shards)
    assert found.pop("pack.json") != contents(whole)["pack.json"]
    assert found.items() <= contents(whole).items()
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    assert json.loads((run / "test" / "metrics.json").read_text())["samples"] == 18
    assert (run / "report.html").is_file()


def test_a_job_that_fails_takes_those_that_wait_for_it_away(cluster, tmp_path):
    """Bad input ends its job with 2 and one line; nothing after it starts or waits for ever."""
    pack = ("--pack", "--source", "folder", "--input", tmp_path / "nothing")
    jobs = submit(cluster, tmp_path / "shards", tmp_path / "run", *pack, "--train")
    first, *others = [cluster.wait_for_end(job) for job in jobs.values()]
    assert (first.state, first.exit_code) == ("FAILED", 2)
    assert {job.state for job in others} == {"CANCELLED"}
    assert "cxrdist: --input" in cluster.log(jobs["pack, 2 tasks"])
