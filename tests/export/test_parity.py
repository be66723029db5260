"""What was exported is compared with PyTorch, and not written where it differs."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from model_run import make_ensemble_run, make_model, make_model_run
from support import make_shards

from cxrdist.cli import main
from cxrdist.config import Network
from cxrdist.errors import CxrdistError, RunFailedError
from cxrdist.export import parity
from cxrdist.export.parity import Squares, describe_parity, measure_parity, read_squares
from cxrdist.model.densenet import Classifier


@pytest.fixture(scope="module")
def model() -> Classifier:
    return make_model()


@pytest.fixture
def squares() -> Squares:
    pixels = torch.arange(9, dtype=torch.uint8)[:, None, None, None].expand(9, 1, 32, 32)
    return Squares(pixels, "grey squares", None)


def test_the_largest_difference_of_any_logit_counts(model: Classifier, squares: Squares) -> None:
    """One logit of the ninth image, in the second batch, is apart by 2^-15."""

    def exported(images: torch.Tensor) -> np.ndarray:
        logits = model(images).double().numpy().copy()
        logits[:, 1] -= (images.amax((1, 2, 3)) == 8).numpy() * 2.0**-15
        return logits

    found = measure_parity(model, exported, squares, "a program 1")
    assert found["largest_difference"] == pytest.approx(2.0**-15, rel=1e-3)
    assert (found["images"], found["runtime"]) == (9, "a program 1")


@pytest.mark.parametrize("largest", [8.642673492431641e-07, 9.96e-6, 2.0**-20])
def test_no_logit_differs_by_more_than_the_sentence_says(largest: float) -> None:
    """The bound has two digits and is rounded up: 8.64e-7 is not at most 8.6e-7."""
    compared = {"images": 9, "source": "squares", "runtime": "a program 1"}
    shown = describe_parity({**compared, "largest_difference": largest})
    bound = re.fullmatch(r"logits by a program 1 .* by at most (.*) on 9 squares", shown)[1]
    assert largest <= float(bound) < largest + 10 ** (np.floor(np.log10(largest)) - 1)


@pytest.mark.parametrize("error", [2e-4, float("nan")])
def test_other_logits_fail(error: float, model: Classifier, squares: Squares) -> None:
    """More than 1e-4, or not a number."""
    with pytest.raises(RunFailedError, match=r"a program 1 differ .* expected at most 0\.0001"):
        measure_parity(model, lambda x: model(x).numpy() + error, squares, "a program 1")


@pytest.mark.parametrize("target", ["timm", "huggingface"])
def test_nothing_is_left_of_an_export_that_differs(
    target: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command ends with 1 and the folder above OUT is as it was."""
    run = make_model_run(tmp_path / "run", make_model(), shards)
    monkeypatch.setattr(parity, "MOST_DIFFERENCE", -1.0)
    assert main(["export", "--run", str(run), "--to", target, str(tmp_path / "out")]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_shards_must_be_like_the_models(shards: Path, tmp_path: Path, model: Classifier) -> None:
    """Squares of another size and shards without a test split are refused by name."""
    with pytest.raises(CxrdistError, match=r"images of 32 px .* trained at 64 px"):
        read_squares(shards, make_model(size_px=64))
    without = make_shards(tmp_path, {"a": 4, "b c": 4, "d": 4}, split="0.5/0.5/0")
    with pytest.raises(CxrdistError, match="have no test images"):
        read_squares(without, model)


def test_wrong_use_is_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OUT that exists, another suffix, a network that timm lacks, an ensemble for timm."""
    run = make_model_run(tmp_path / "run", make_model(), shards)
    squeezenet = make_model(Network(architecture="squeezenet1_1"))
    squeezed = make_model_run(tmp_path / "squeezenet", squeezenet, shards)
    mean = make_ensemble_run(tmp_path / "mean", [make_model(), make_model(seed=1)], shards)
    wrong = [
        (run, "timm", "run", "already exists"),
        (run, "onnx", "model", "expected a name ending in .onnx"),
        (squeezed, "timm", "out", "timm has no SqueezeNet 1.1"),
        (mean, "timm", "out", "is an ensemble of 2; give a member"),
        (mean, "huggingface", "out", "is an ensemble of 2; give a member"),
    ]
    before = {*tmp_path.rglob("*")}
    for source, target, out, line in wrong:
        code = main(["export", "--run", str(source), "--to", target, str(tmp_path / out)])
        error = capsys.readouterr().err
        assert code == 2
        assert line in error
        assert error.count("\n") == 1
    assert {*tmp_path.rglob("*")} == before
