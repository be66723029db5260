"""Float32 is full float32 in every command; the switches of a GPU exist on a CPU build too."""

import json

import pytest
import torch
from support import make_images
from torch.overrides import TorchFunctionMode

from cxrdist import distributed
from cxrdist.cli import main
from cxrdist.config import EvaluateConfig, Network, PredictConfig
from cxrdist.distributed import start
from cxrdist.evaluate.predictions import evaluate
from cxrdist.explain.relevance import attribute
from cxrdist.model.densenet import Classifier, save_model
from cxrdist.precision import full_float32, use_full_float32
from cxrdist.predict import predict

SMALL = Network(growth_rate=4, block_config=(2, 2, 2, 2))


def switch_on_in_the_older_way() -> None:
    """As most notebooks do; "medium" is bfloat16 in matrix products on a CPU."""
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("medium")


def switch_on_in_the_newer_way() -> None:
    """By the settings of torch 2.9, for all operators and for each of them."""
    torch.backends.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.mkldnn.conv.fp32_precision = "bf16"


def switch_on_for_all() -> None:
    """Only the setting that the operators inherit."""
    torch.backends.fp32_precision = "tf32"


def as_torch_starts() -> None:
    """The switches of a new process: TensorFloat-32 in cuDNN, nothing chosen elsewhere."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    torch.set_float32_matmul_precision("highest")
    for operator in (torch.backends, cudnn, cuda.matmul, mkldnn.matmul, mkldnn.conv):
        operator.fp32_precision = "none"
    cudnn.allow_tf32 = True


WAYS = [switch_on_in_the_older_way, switch_on_in_the_newer_way, switch_on_for_all]


def switches() -> dict[str, str]:
    """What torch itself says of each operator."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    operators = {"cuda.matmul": cuda.matmul, "cudnn.conv": cudnn.conv, "cudnn.rnn": cudnn.rnn}
    operators |= {"mkldnn.matmul": mkldnn.matmul, "mkldnn.conv": mkldnn.conv}
    return {name: operator.fp32_precision for name, operator in operators.items()}


FULL = dict.fromkeys(switches(), "ieee")


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def shortened(request):
    """TensorFloat-32 and bfloat16 are switched on when the test begins, and all off after it."""
    as_torch_starts()
    request.param()
    assert "tf32" in switches().values()
    yield switches()
    use_full_float32()


class Record(TorchFunctionMode):
    """Collects the switches at each convolution."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.conv2d:
            self.seen.append(switches())
        return function(*args, **(kwargs or {}))


@pytest.fixture
def run(tmp_path):
    """A run directory with a random model."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    save_model(Classifier(SMALL, ["a", "b c", "d"], 32), tmp_path / "run" / "model")
    return tmp_path / "run"


def test_every_launch_starts_with_full_float32(shortened):
    """`start`, which train, evaluate, explain and probe-text begin with, switches all off.

    Older readers, such as torch's own `cudnn.flags`, raise where older and newer switches disagree.
    """
    start()
    assert switches() == FULL
    assert torch.backends.cudnn.allow_tf32 is False
    assert torch.backends.cuda.matmul.allow_tf32 is False
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_scores_are_computed_in_full_float32(shortened, shards, run, tmp_path, command):
    """Every convolution of the network finds the switches off."""
    with Record() as record:
        if command == "evaluate":
            evaluate(EvaluateConfig(run, shards, cache=tmp_path / "cache"))
        else:
            images = make_images(tmp_path / "in", {"x": 2})
            predict(PredictConfig(run, [images], tmp_path / "out.csv"))
    assert len(record.seen) > 8
    assert all(seen == FULL for seen in record.seen)


def test_attribute_convolves_in_full_float32(shortened):
    """From Python, too, the caller's switches are off during the pass and on after it."""
    model = Classifier(SMALL, ["a", "b"], 32).eval()
    with Record() as record:
        attribute(model, torch.zeros(1, 1, 32, 32, dtype=torch.uint8))
    assert len(record.seen) > 8
    assert all(seen == FULL for seen in record.seen)
    assert switches() == shortened


def test_full_float32_holds_only_inside(shortened):
    """A program that explains between its own steps keeps the precision that it chose."""
    with full_float32():
        assert switches() == FULL
        assert torch.get_float32_matmul_precision() == "highest"
    assert switches() == shortened


def test_what_was_inherited_is_inherited_again():
    """After `full_float32` the caller's next choice for all operators still reaches them."""
    as_torch_starts()
    switch_on_for_all()
    with full_float32():
        pass
    assert switches()["cuda.matmul"] == "tf32"
    torch.backends.fp32_precision = "none"
    assert switches()["cuda.matmul"] == "none"
    use_full_float32()


@pytest.mark.parametrize("stays_on", [False, True])
def test_run_json_says_what_the_switches_say(shortened, shards, tmp_path, monkeypatch, stays_on):
    """A training by the real command records that TensorFloat-32 is off, or on if it stays on."""
    if stays_on:
        monkeypatch.setattr(distributed, "use_full_float32", lambda: None)
    stage = {"lr": {"head": 1e-3}, "epochs": 1, "patience": 1}
    recipe = {"init": "none", "stages": {"head": stage}}
    recipe["network"] = {"growth_rate": 4, "block_config": [2, 2, 2, 2]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    arguments = ("train", "--config", tmp_path / "recipe.yaml", "--shards", shards)
    where = ("--run", tmp_path / "run", "--cache", tmp_path / "cache")
    assert main([str(argument) for argument in (*arguments, *where)]) == 0
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["tf32"] is stays_on
    assert info["mixed_precision"] == "no"
    assert switches() == (shortened if stays_on else FULL)
