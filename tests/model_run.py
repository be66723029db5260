"""A run directory that holds a model and no training: weights drawn at random, fast to make."""

from pathlib import Path

import torch
from support import claim_shards

from cxrdist.config import Network
from cxrdist.files import read_json, write_json
from cxrdist.model.densenet import Classifier, save_model
from cxrdist.model.description import Calibration, Normalisation
from cxrdist.model.ensemble import Ensemble, save_ensemble

SMALL = Network(growth_rate=4, block_config=(2, 2, 2, 2))
CLASSES = ["a", "b c", "d"]
CALIBRATION = Calibration(
    temperatures={"a": 1.5, "d": 0.75},
    rule="youden",
    thresholds={"a": -0.25, "d": 0.5},
    reasons={"b c": "4 positives"},
    fewest=10,
    index_sha256="0" * 64,
    images=40,
    patients=20,
)


def make_model(
    network: Network = SMALL, size_px: int = 32, channels: int = 3, seed: int = 0
) -> Classifier:
    """A calibrated network whose statistics, scales and biases are not those of a new one."""
    torch.manual_seed(seed)
    normalisation = Normalisation() if channels == 3 else Normalisation((0.5,), (1 / 2048,))
    model = Classifier(network, CLASSES, size_px, normalisation)
    for name, tensor in model.network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith("gamma"):  # ConvNeXt begins with 1e-6, where a block has no part
            tensor.uniform_(0.5, 1)
        elif name.endswith(("running_mean", ".bias")):
            tensor.normal_(0, 0.1)
    model.calibration = CALIBRATION
    return model.eval()


def make_model_run(run: Path, model: Classifier, shards: Path) -> Path:
    """Write RUN/model and a run.json that claims to be of some shards."""
    (run / "model").mkdir(parents=True)
    save_model(model, run / "model")
    claim_shards(run, shards)
    more = {"started": "2026-01-01T00:00:00+00:00", "versions": {"cxrdist": "0.1.0"}}
    write_json(run / "run.json", {**read_json(run / "run.json"), **more})
    return run


def make_ensemble_run(run: Path, models: list[Classifier], shards: Path) -> Path:
    """Write the members of an ensemble, and what makes them one."""
    members = {f"member-{number}": model for number, model in enumerate(models)}
    for name, model in members.items():
        make_model_run(run / name, model, shards)
    (run / "model").mkdir()
    ensemble = Ensemble(members)
    ensemble.calibration = CALIBRATION
    save_ensemble(ensemble, run / "model")
    return run
