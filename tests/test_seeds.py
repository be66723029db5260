import csv
import json
import shutil

import numpy as np
import pytest
from support import make_shards, run_ranks

from cxrdist.cli import COMMANDS, parse
from cxrdist.config import EvaluateConfig, ExplainConfig, PredictConfig, SeedsConfig
from cxrdist.data.index import read_index
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.predictions import evaluate
from cxrdist.explain.export import explain
from cxrdist.model.densenet import load_model
from cxrdist.predict import predict
from cxrdist.run import RunDirectory, read_document
from cxrdist.seeds import MembersFile, seeds

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
