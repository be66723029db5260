"""The randomisation test, on networks whose maps are known to change or not."""

import numpy as np
import pytest
import torch

from cxrdist.config import Network
from cxrdist.explain.randomisation import (
    Likeness,
    compare_maps,
    draw_anew,
    levels,
    likeness,
    randomise,
    summarise,
)
from cxrdist.explain.relevance import Explainer
from cxrdist.model.batchnorm import BatchNorm
from cxrdist.model.densenet import Classifier
from cxrdist.model.networks import block_of

CLASSES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Four images of noise."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (4, 1, 64, 64), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def model(images) -> Classifier:
    """A small network whose BatchNorms have seen images."""
    torch.manual_seed(5)
    model = Classifier(Network(growth_rate=8, block_config=(2, 2, 2, 2)), CLASSES, 64)
    for _ in range(20):
        model(images)
    return model.eval()


def test_blocks_are_drawn_anew_and_no_others(model, images):
    """Each weight of these blocks differs, all else is bitwise the same, and so is the model."""
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    drawn = draw_anew(model, ["head", "denseblock4"], images).network.state_dict()
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, before[name])
        is_drawn = block_of(name, model.shape) in ("head", "denseblock4")
        if "num_batches" in name:
            continue
        if not is_drawn:
            assert torch.equal(drawn[name], value), name
        elif value.dim() > 1 or "running" in name:
            assert not torch.equal(drawn[name], value), name
    again = draw_anew(model, ["head"], images).network.state_dict()
    assert torch.equal(again["classifier.weight"], drawn["classifier.weight"])


def test_new_blocks_keep_the_scale_of_activations(model, images):
    """Behind each BatchNorm, before its ReLU, the images have mean 0 and variance 1."""
    drawn = draw_anew(model, levels(model)[-1], images)
    seen = []

    def watch(norm: BatchNorm, inputs: tuple[torch.Tensor], _: torch.Tensor) -> None:
        (features,) = inputs
        mean, var = features.mean((0, 2, 3)), features.var((0, 2, 3), correction=0)
        assert torch.allclose(norm.running_mean, mean, atol=1e-5)
        assert torch.allclose(norm.running_var, var, atol=1e-5, rtol=1e-4)
        seen.append(norm)

    for norm in drawn.norms:
        norm.register_forward_hook(watch)
    with torch.no_grad():
        assert torch.isfinite(drawn(images)).all()
    assert len(seen) == len(model.norms)


def test_maps_change_the_more_the_more_is_drawn_anew(model, images):
    """A network is like itself, then its maps become less and less alike, the contrast first."""
    explainer = Explainer(model)
    drawn = [explainer, *randomise(model, images, Explainer)]
    found = summarise(
        [[], *levels(model)],
        [compare_maps(explainer, drawn, image[None], CLASSES) for image in images],
    )
    same, head, last, _all = found["drawn"]
    assert found["images"] == 4
    assert (last["blocks"], head["blocks"]) == (["denseblock4", "head"], ["head"])
    for similarity in (same["class_map"], same["contrast"]):
        assert similarity["pearson"] == pytest.approx(1, abs=1e-6)
        assert similarity["spearman"] == pytest.approx(1, abs=1e-6)
    for what in ("class_map", "contrast"):
        for measure in ("spearman", "pearson"):
            values = [drawn[what][measure] for drawn in found["drawn"]]
            assert values == sorted(values, reverse=True)
            assert values[-1] < 0.5
    assert last["contrast"]["pearson"] < last["class_map"]["pearson"] < 0.9
    alone = compare_maps(explainer, drawn[1:2], images[:1], ["b"])
    assert summarise([["head"]], [alone])["drawn"][0]["contrast"] is None


def test_likeness_is_that_of_the_formulas():
    """Pearson's is that of the values, Spearman's that of the ranks; flat maps have none."""
    random = np.random.default_rng(2)
    one, other = random.normal(size=(2, 6, 6))
    found = likeness(one, other)
    ranks = [np.abs(values).ravel().argsort().argsort() for values in (one, other)]
    assert found.pearson == pytest.approx(np.corrcoef(one.ravel(), other.ravel())[0, 1])
    assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert np.isnan(likeness(one, np.zeros((6, 6)))).all()


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([1 + 1e-15, 1.0], 1),
        ([-1 - 1e-15, -1.0], -1),
        ([0.5, np.nan, 0.25], 0.375),
        ([np.nan], None),
    ],
)
def test_a_mean_similarity_is_of_the_images_that_have_one_and_within_its_bounds(values, mean):
    """A correlation that was rounded to just beyond 1 is 1; a constant map has none."""
    found = summarise([["head"]], [[[Likeness(value, 0.0)]] for value in values])
    assert found["drawn"][0]["class_map"] == {"spearman": mean, "pearson": 0}
    assert found["images"] == len(values)
