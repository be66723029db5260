import yaml
from support import make_shards

from cxrdist.evaluate.members import read_members
from cxrdist.run import RunDirectory

RECIPE = {
    "init": "none",
    "global_batch_size": 6,
    "network": {"growth_rate": 4, "block_config": [1, 1, 1, 1]},
    "stages": {"head": {"lr": {"head": 0.01}, "epochs": 1, "patience": 1}},
}


def test_an_array_trains_the_members_and_a_last_job_joins_them(cluster, tmp_path):
    """Two tasks, a member each, at the same time; then the same line without the array."""
    shards = make_shards(tmp_path, {"a": 12, "b": 12})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    run = tmp_path / "run"
    words = ("launch/seeds.sbatch", "--run", run, "--shards", shards, "--seeds", 2)
    words = (*words, "--recipe", tmp_path / "recipe.yaml", "--cache", tmp_path / "cache")
    members = cluster.submit("--array=0-1", "--cpus-per-task=1", *words)
    last = cluster.submit(f"--dependency=afterok:{members}", "--cpus-per-task=1", *words)
    assert cluster.wait_for_end(last).state == "COMPLETED", cluster.log(last)
    assert cluster.log(last).count("is already trained") == 2
    assert read_members(RunDirectory(run))["members"] == ["member-0", "member-1"]
    assert (run / "test" / "metrics.json").is_file()
