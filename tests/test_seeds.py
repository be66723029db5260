import csv
import json
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import make_shards, run_ranks, run_script

from cxrdist.cli import main
from cxrdist.config import (
    EvaluateConfig,
    ExplainConfig,
    Network,
    PredictConfig,
    ProbeTextConfig,
    ReportConfig,
    SeedsConfig,
)
from cxrdist.data.index import read_index
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.members import MembersFile, _spread
from cxrdist.evaluate.predictions import evaluate
from cxrdist.explain.export import explain
from cxrdist.files import read_document
from cxrdist.model.densenet import Classifier, load_model
from cxrdist.model.ensemble import Ensemble, load_predictor
from cxrdist.model.weights import read_weights
from cxrdist.predict import predict
from cxrdist.probe_text import probe_text
from cxrdist.report.html import report
from cxrdist.run import RunDirectory
from cxrdist.seeds import _remove_metrics, seeds

RECIPE = """
stages:
  all:
    lr: {stem: 0.003, denseblock1: 0.003, denseblock2: 0.003, denseblock3: 0.003, \
denseblock4: 0.003, head: 0.003}
    epochs: 1
    patience: 1
init: none
global_batch_size: 6
optimizer: adamw
network: {growth_rate: 4, block_config: [2, 2, 2, 2]}
"""


def make_recipe(folder):
    (folder / "recipe.yaml").write_text(RECIPE)
    return str(folder / "recipe.yaml")


def read_probabilities(file):
    with open(file, newline="") as text:
        rows = list(csv.DictReader(text))
    names = [name for name in rows[0] if name.startswith("prob_")]
    return np.array([[float(row[name]) for name in names] for row in rows])


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    """A folder with shards and a run of two seeds."""
    folder = tmp_path_factory.mktemp("seeds")
    shards = make_shards(folder, {"a": 12, "b": 12})
    cache = folder / "cache"
    seeds(SeedsConfig(folder / "run", shards, make_recipe(folder), seeds=2, cache=cache))
    return folder


def test_an_ensemble_is_the_mean_of_its_members(ensemble):
    """Its probabilities in predictions.csv equal the mean of the members' by hand."""
    run = ensemble / "run"
    files = [run / name / "test" / "predictions.csv" for name in ("member-0", "member-1")]
    members = [read_probabilities(file) for file in files]
    assert np.abs(members[0] - members[1]).max() > 1e-3  # they are two networks
    found = read_probabilities(run / "test" / "predictions.csv")
    assert found == pytest.approx((members[0] + members[1]) / 2, abs=1e-6)


def test_a_figure_that_a_member_lacks_has_no_spread():
    """A precision of two of three members would pass for one of all; the two stay listed."""
    values = {"member-0": 0.25, "member-1": None, "member-2": 0.75}
    spread = _spread(("precision", "a"), values, {})
    assert spread["members"] == values
    for name in ("mean", "standard_deviation", "smallest", "largest"):
        assert spread[name] is None
    assert _spread(("precision", "a"), {"member-0": 0.25, "member-1": 0.75}, {})["mean"] == 0.5


def test_members_spread_is_written(ensemble):
    """members.json has mean, deviation and range of the members' figures, and the ensemble's."""
    run = RunDirectory(ensemble / "run")
    found = read_document(run.members, MembersFile)
    assert (found["kind"], found["members"]) == ("seeds", ["member-0", "member-1"])
    values = [
        json.loads((run.root / name / "test" / "metrics.json").read_text())["accuracy"]
        for name in found["members"]
    ]
    (accuracy,) = [s for s in found["splits"]["test"] if s["figure"] == "accuracy"]
    assert list(accuracy["members"].values()) == values
    assert accuracy["mean"] == pytest.approx(np.mean(values), abs=1e-6)
    assert accuracy["standard_deviation"] == pytest.approx(np.std(values, ddof=1), abs=1e-6)
    assert (accuracy["smallest"], accuracy["largest"]) == (min(values), max(values))
    own = json.loads(run.metrics("test").read_text())["accuracy"]
    assert accuracy["ensemble"] == own
    assert {s["of"] for s in found["splits"]["test"]} == {None, "a", "b"}


def test_temperatures_of_the_members_are_applied(ensemble):
    """A member whose class a has temperature 2 counts with the sigmoid of half its logits of a."""
    members = {n: load_model(ensemble / "run" / n) for n in ("member-0", "member-1")}
    members["member-1"].calibration = SimpleNamespace(temperatures={"a": 2.0})
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 1, 32, 32), np.uint8))
    with torch.inference_mode():
        logits = [member(images).double() for member in members.values()]
        found = torch.sigmoid(Ensemble(members).eval()(images).double())
    logits[1] = logits[1] / torch.tensor([2.0, 1.0])
    expected = (torch.sigmoid(logits[0]) + torch.sigmoid(logits[1])) / 2
    assert torch.allclose(found, expected, atol=1e-6)


def test_sure_members_do_not_run_together():
    """Of logits 40 and 60 the mean probability is 1 in any float; its logit is still told."""
    members = {}
    for number, logit in enumerate((40.0, 60.0)):
        member = Classifier(Network(growth_rate=4, block_config=(2, 2, 2, 2)), ["a", "b"], 32)
        torch.nn.init.zeros_(member.network.classifier.weight)
        member.network.classifier.bias.data = torch.tensor([logit, -logit])
        members[f"member-{number}"] = member.eval()
    found = Ensemble(members)(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))
    # The mean of 1 - p is exp(-40) / 2, so that the logit is 40 + log 2.
    assert found[0].tolist() == pytest.approx([40.6931, -40.6931], abs=1e-4)


def test_an_ensemble_predicts_files(ensemble, tmp_path):
    """`predict` gives the mean of what it gives for the members, and names the likelier class."""
    run, images = ensemble / "run", sorted((ensemble / "images").rglob("*.png"))[:3]
    found = {}
    for name in ("member-0", "member-1", "."):
        out = tmp_path / "predictions.csv"
        predict(PredictConfig(run / name, images, out))
        found[name] = read_probabilities(out)
    expected = (found["member-0"] + found["member-1"]) / 2
    assert found["."] == pytest.approx(expected, abs=1e-6)


def test_what_looks_into_a_network_needs_a_member(ensemble, tmp_path):
    """Heat maps, the probe of words and the start of another training refuse an ensemble."""
    run, shards, cache = ensemble / "run", ensemble / "shards", ensemble / "cache"
    images = sorted((ensemble / "images").rglob("*.png"))[:1]
    for use in (
        lambda: explain(ExplainConfig(run, shards, cache=cache)),
        lambda: predict(PredictConfig(run, images, tmp_path / "p.csv", explain=True)),
        lambda: probe_text(ProbeTextConfig(run, shards, cache=cache)),
        lambda: read_weights(str(run)),
    ):
        with pytest.raises(CxrdistError, match=r"is an ensemble of .* give one of its members"):
            use()


def test_the_report_takes_an_ensemble(ensemble):
    """Its page has the spread of the members instead of a training, and its own results."""
    page = report(ReportConfig(ensemble / "run")).read_text()
    assert "Ensemble of 2 members" in page
    assert "Results on test" in page
    assert "This stage is not done" not in page
    assert "There are none: they need one network; explain a member, such as RUN/member-0." in page
    assert "cxrdist explain" not in " ".join(re.sub("<[^>]*>", " ", page).split())
    checklist = (ensemble / "run" / "checklist.html").read_text()
    # The validation split was evaluated, and has too few images for a threshold.
    assert "No threshold was chosen: model/model.json says why." in checklist
    written = json.loads((ensemble / "run" / "model" / "model.json").read_text())["calibration"]
    assert written["thresholds"] == {}
    assert written["reasons"]
    assert "run cxrdist explain" not in checklist
    assert "stages: ." not in checklist
    links = {*re.findall(r'<a href="([^"#:]+)["#]', checklist)}
    assert {"member-0/run.json", "test/metrics.json"} <= links
    assert all((ensemble / "run" / link).is_file() for link in links)


def test_the_same_command_trains_nothing_again(ensemble, capsys):
    """All members are there: their files stay as they are, and so does the ensemble."""
    run = ensemble / "run"
    before = {f: f.stat().st_mtime_ns for f in run.rglob("model*.*") if f.is_file()}
    arguments = [run, ensemble / "shards", str(ensemble / "recipe.yaml")]
    seeds(SeedsConfig(*arguments, seeds=2, cache=ensemble / "cache"))
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert capsys.readouterr().out.count("is already trained") == 2


def test_the_ensemble_of_a_member_that_was_trained_anew_is_evaluated_anew(ensemble, tmp_path):
    """Its results are never those of an earlier member of the same name."""
    run = tmp_path / "run"
    shutil.copytree(ensemble / "run", run)
    metrics, info = run / "test" / "metrics.json", run / "member-1" / "run.json"
    before = metrics.stat().st_mtime_ns
    later = "2100-01-01T00:00:00+00:00"
    info.write_text(json.dumps({**json.loads(info.read_text()), "finished": later}))
    arguments = [run, ensemble / "shards", str(ensemble / "recipe.yaml")]
    seeds(SeedsConfig(*arguments, seeds=2, cache=ensemble / "cache"))
    assert metrics.stat().st_mtime_ns > before
    assert json.loads((run / "run.json").read_text())["finished"] == later


def test_an_ensemble_of_other_members_keeps_no_metrics_of_the_earlier_one(tmp_path):
    """Neither of a split that the command does not evaluate nor of an external set."""
    subsets = ("test", "val", "external/other")
    for subset in (*subsets, "member-0/test"):
        (tmp_path / subset).mkdir(parents=True)
        (tmp_path / subset / "metrics.json").touch()
    _remove_metrics(RunDirectory(tmp_path))
    assert [*tmp_path.rglob("metrics.json")] == [tmp_path / "member-0/test/metrics.json"]


def test_another_recipe_is_refused(ensemble, tmp_path):
    """A member that was begun with other options is not mixed with new ones."""
    other = tmp_path / "other.yaml"
    other.write_text(RECIPE.replace("epochs: 1", "epochs: 2"))
    with pytest.raises(CxrdistError, match="member-0: holds a run of another recipe"):
        seeds(SeedsConfig(ensemble / "run", ensemble / "shards", str(other), seeds=2))


@pytest.mark.parametrize("taken", ["index.json", "checkpoints", "model/model.safetensors"])
def test_no_trained_model_and_no_shards_are_replaced(tmp_path, taken):
    """--run of a single network's run, or of shards, is refused before a member is trained."""
    (tmp_path / taken).mkdir(parents=True)
    with pytest.raises(CxrdistError, match=r"--run .*: holds shards or a run of one network"):
        seeds(SeedsConfig(tmp_path, tmp_path / "shards", "scratch", seeds=2))
    assert not (tmp_path / "member-0").exists()


def test_members_of_other_classes_are_no_ensemble(ensemble, tmp_path):
    """A stranger's directory whose members do not fit is refused in one line."""
    run = tmp_path / "run"
    shutil.copytree(ensemble / "run", run)
    file = run / "member-1" / "model" / "model.json"
    file.write_text(file.read_text().replace('"b"', '"c"'))
    with pytest.raises(CxrdistError, match=r"member-1: has classes \['a', 'c'\], member-0 has"):
        load_predictor(run)
    model = run / "model" / "model.json"
    model.write_text(model.read_text().replace("member-1", "../member-1"))
    with pytest.raises(CxrdistError, match="expected member-NUMBER"):
        load_predictor(run)


def test_folds_on_two_ranks_one_by_one_and_joined(tmp_path, capsys):
    """Tasks train a fold each; the last command evaluates each on its own part, and joins them."""
    shards = make_shards(tmp_path, {"a": 12, "b": 12})
    run, cache = tmp_path / "run", tmp_path / "cache"
    words = ["seeds", "--run", run, "--shards", shards, "--recipe", make_recipe(tmp_path)]
    words = [*map(str, words), "--folds", "--seeds", "2", "--cache", str(cache)]
    assert main([*words, "--member", "1"]) == 0
    assert not (run / "model").exists()
    assert "once all 2 are, the same command without --member" in capsys.readouterr().out
    done = run_ranks(2, "-m", "cxrdist", *words)
    assert done.returncode == 0, done.stderr
    assert "member-1: is already trained" in done.stdout
    index = read_index(shards)
    keys = []
    for number in (0, 1):
        member = run / f"member-{number}"
        assert load_model(member).fold == f"{number + 1}/2"
        with open(member / "val" / "predictions.csv") as file:
            keys += [row["key"] for row in csv.DictReader(file)]
    development = {s.key for s in index.samples if s.split != "test"}
    assert (len(keys), set(keys)) == (len(development), development)
    found = read_document(RunDirectory(run).members, MembersFile)
    assert (found["kind"], sorted(found["splits"])) == ("folds", ["test", "val"])
    with pytest.raises(
        CxrdistError, match="each member of this ensemble was trained on another fold"
    ):
        evaluate(EvaluateConfig(run, shards, split="val", cache=cache))


KILLED = """
import os, signal, sys
from cxrdist import cli
from cxrdist.train import stage
save = stage.save_checkpoint
def save_and_die(directory, *rest):
    save(directory, *rest)
    if "member-1" in str(directory):
        os.kill(os.getpid(), signal.SIGKILL)
stage.save_checkpoint = save_and_die
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_killed_member_goes_on(tmp_path, capsys):
    """Killed after an epoch of the second one, the same command goes on from there, and joins."""
    shards = make_shards(tmp_path, {"a": 12, "b": 12})
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("epochs: 1", "epochs: 2"))
    run = tmp_path / "run"
    words = ["seeds", "--run", run, "--shards", shards, "--recipe", tmp_path / "recipe.yaml"]
    words = [*map(str, words), "--seeds", "2", "--cache", str(tmp_path / "cache")]
    assert run_script(KILLED, *words).returncode == -signal.SIGKILL
    assert not (run / "member-1" / "model").exists()
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "member-0: is already trained" in printed
    assert "resuming after all, epoch 1" in printed
    assert load_predictor(run).names == ["member-0", "member-1"]


def test_a_recipe_of_one_fold_is_refused(tmp_path, capsys):
    """Its members would all be validated on the same part, and the ensemble on another one."""
    (tmp_path / "recipe.yaml").write_text(f"{RECIPE}fold: 2/5\n")
    words = ["--shards", tmp_path, "--run", tmp_path / "run", "--recipe", tmp_path / "recipe.yaml"]
    assert main(["seeds", *map(str, words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has fold 2/5, on which every member" in line
    assert "give --folds for a fold per member" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1"], "--seeds: is 1, expected at least 2"),
        (["--seeds", "3", "--member", "3"], "--member 3: expected 0 to 2"),
        (["--recipe", "none"], "none"),
    ],
)
def test_bad_options_are_one_line(options, message, tmp_path, capsys):
    """Exit 2 before anything is made."""
    arguments = ["seeds", "--run", str(tmp_path / "run"), "--shards", str(tmp_path)]
    assert main([*arguments, "--recipe", "demo", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()
