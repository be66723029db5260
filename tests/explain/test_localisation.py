"""Scores of maps against outlines, by arithmetic."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from cxrdist.config import Network
from cxrdist.explain.heatmap import smooth
from cxrdist.explain.localisation import (
    BLANK,
    INSIDE,
    OVERLAPS,
    POINTING,
    TOPS,
    Scored,
    choose_tops,
    score_chance,
    score_map,
    summarise,
)
from cxrdist.explain.rivals import centre_prior, grad_cam, plain_gradient
from cxrdist.model.densenet import Classifier

OUTLINE = np.zeros((20, 20), bool)
OUTLINE[:10, :10] = True  # a quarter


def test_a_map_that_is_the_outline_is_right_in_all():
    """All inside; the best overlap is that of a quarter of the pixels, here between 20 and 30 %."""
    found = score_map(np.pad(np.ones((6, 6)), ((2, 12), (2, 12))), OUTLINE)
    assert found[[POINTING, INSIDE, BLANK]] == pytest.approx([1, 1, 0])
    # smoothing makes 36 px 100: marked 20 % is 80 px of the 100 that are outlined
    assert found[OVERLAPS][TOPS.index(0.2)] == pytest.approx(0.8)
    assert found[OVERLAPS][TOPS.index(0.5)] == pytest.approx(1)


def test_a_share_is_at_most_1_whatever_is_rounded():
    """All of the map is inside; more than 1 would have no interval, and end in a traceback."""
    values = np.zeros((20, 20))
    values[3:7, 3:7] = np.random.default_rng(4).random((4, 4))
    amounts = smooth(values)
    assert amounts[OUTLINE].sum() / amounts.sum() > 1
    scores = {"lrp": score_map(values, OUTLINE), "centre": score_chance(0.25)}
    groups, _ = summarise([Scored(0, "a", 1, 0.25, scores)], ["p"], {})
    assert groups[0]["methods"][0]["inside"] == 1
    assert groups[0]["methods"][0]["inside_interval"] == pytest.approx([0.206549, 1])  # Wilson's


def test_a_map_elsewhere_and_one_of_no_positive_value_score_nothing():
    """The second is counted as blank."""
    elsewhere = np.zeros((20, 20))
    elsewhere[15, 15] = 1
    assert score_map(elsewhere, OUTLINE).tolist() == [0.0] * (3 + len(TOPS))
    assert score_map(-np.ones((20, 20)), OUTLINE)[BLANK] == 1


def test_a_map_that_is_the_same_everywhere_scores_what_chance_does():
    """A quarter in the pointing game and of the values; negative values never count."""
    found = score_map(np.ones((20, 20)), OUTLINE)
    chance = score_chance(0.25)
    assert found[[POINTING, INSIDE]] == pytest.approx(chance[[POINTING, INSIDE]])
    mixed = np.where(OUTLINE, 1.0, -1.0)
    assert score_map(mixed, OUTLINE)[INSIDE] == pytest.approx(1)


def test_means_are_of_the_cases_and_intervals_by_patient():
    """Three of four point inside; ten copies of an image of one patient narrow nothing."""
    rows = [score_chance(0.25) for _ in range(4)]
    for row, points in zip(rows, (1, 1, 1, 0), strict=True):
        row[POINTING], row[INSIDE] = points, 0.5
    cases = [
        Scored(i, "ab"[i % 2], 1, 0.25, {"lrp": row, "centre": score_chance(0.25)})
        for i, row in enumerate(rows)
    ]
    groups, intervals = summarise(cases, list("pqrs"), {})
    lrp, centre = groups[0]["methods"]
    assert (lrp["pointing"], lrp["times_chance"]) == (0.75, 2)
    assert centre["times_chance_interval"] is None  # without spread they say nothing
    assert lrp["times_chance_gain_interval"] is None
    assert [group["name"] for group in groups] == ["all", "a", "b"]
    often, _ = summarise(cases * 10, list("pqrs") * 10, {})
    assert often[0]["methods"][0]["pointing_interval"] == lrp["pointing_interval"]
    assert intervals["patients"] == 4


def test_gains_over_the_centre_have_the_interval_of_a_paired_t_test():
    """Eight patients with one image each and outlines of one size: percentiles are a fifth less."""
    random, rest = np.random.default_rng(0), [0.0] * (1 + len(TOPS))
    scores = random.random((8, 2, 2))  # image, method, pointing and share inside
    cases = [
        Scored(i, "a", 1, 0.25, {"lrp": [*own[0], *rest], "centre": [*own[1], *rest]})
        for i, own in enumerate(scores)
    ]
    groups, _ = summarise(cases, [f"p{i}" for i in range(8)], {})
    gains = scores[:, 0] - scores[:, 1]
    for i, (name, scale) in enumerate((("pointing", 1), ("times_chance", 4))):
        expected = stats.ttest_1samp(gains[:, i] * scale, 0).confidence_interval()
        limits = groups[0]["methods"][0][f"{name}_gain_interval"]
        assert np.ptp(limits) == pytest.approx(expected.high - expected.low, rel=0.06)
        assert np.mean(limits) == pytest.approx(gains[:, i].mean() * scale, abs=1e-5)


def test_the_share_of_pixels_is_the_one_with_the_largest_mean_overlap():
    """Of two cases that differ the mean decides."""
    first, second = score_chance(0.1), score_chance(0.1)
    first[OVERLAPS], second[OVERLAPS] = 0.1, 0.1
    first[OVERLAPS.start + 2], second[OVERLAPS.start + 4] = 0.5, 0.9
    cases = [Scored(i, "a", 1, 0.1, {"lrp": row}) for i, row in enumerate((first, second))]
    assert choose_tops(cases) == {"lrp": 4}
    assert choose_tops([]) == {}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Classifier(Network(4, (2, 2, 2, 2), 0.0), ["a", "b"], 64)
    model(torch.randint(0, 256, (8, 1, 64, 64), dtype=torch.uint8))
    return model.eval()


def test_the_plain_gradient_is_that_of_finite_differences(model):
    """In float64, at a pixel of each image."""
    model = model.double()
    images = torch.randint(20, 200, (2, 1, 64, 64), dtype=torch.uint8)
    found = plain_gradient(model, images, 1)
    step = torch.zeros(2, 1, 64, 64)
    step[:, :, 30, 31] = 1e-2
    with torch.no_grad():
        difference = model.logits(images + step)[:, 1] - model.logits(images - step)[:, 1]
    model.float()
    assert found[:, 30, 31] == pytest.approx((difference / 2e-2).abs().numpy(), rel=1e-2)


def test_grad_cam_is_its_formula(model):
    """ReLU of the features weighted with their mean gradients: here the head's weights / places."""
    images = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        features = model.network.forward_features(model.normalise(images))
    places = features.shape[2] * features.shape[3]
    weights = model.network.classifier.weight[1].detach() / places
    coarse = F.relu(torch.einsum("bchw,c->bhw", features, weights))
    expected = F.interpolate(coarse[:, None], (64, 64), mode="bilinear")[:, 0]
    assert torch.allclose(grad_cam(model, images, 1), expected, atol=1e-6)


def test_the_centre_prior_is_largest_in_the_middle():
    """And the same in all four corners."""
    prior = centre_prior(32)
    assert prior.max() == prior[15, 15] == prior[16, 16]
    assert len({round(float(value), 12) for value in prior[[0, 0, -1, -1], [0, -1, 0, -1]]}) == 1


def split_network(network: nn.Module, architecture: str) -> tuple[nn.Module, nn.Module]:
    """The network up to its last features, and what follows them."""
    if architecture == "resnet18":
        *trunk, pool, linear = network.children()
        return nn.Sequential(*trunk), nn.Sequential(pool, nn.Flatten(), linear)
    if architecture == "squeezenet1_1":
        return network.features, nn.Sequential(network.classifier, nn.Flatten())
    if architecture == "alexnet":
        rest = (network.features[12:], network.avgpool, nn.Flatten(), network.classifier)
        return network.features[:12], nn.Sequential(*rest)
    return nn.Sequential(network.stem, network.stages), network.head


@pytest.mark.parametrize("architecture", ["resnet18", "squeezenet1_1", "alexnet", "convnext_atto"])
def test_grad_cam_is_its_formula_for_other_networks(architecture):
    """Of the last features before the average: cut there, both halves are the network."""
    torch.manual_seed(0)
    model = Classifier(Network(architecture=architecture), ["a", "b"], 64).eval()
    images = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    trunk, rest = split_network(model.network, architecture)
    features = trunk(model.normalise(images)).detach().requires_grad_()
    logits = rest(features)
    assert torch.allclose(logits, model(images), atol=1e-6)
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), features)
    coarse = F.relu((features * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True))
    expected = F.interpolate(coarse.detach(), (64, 64), mode="bilinear")[:, 0]
    found = grad_cam(model, images, 1)
    assert found.any()
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
    assert plain_gradient(model, images, 1).any()
