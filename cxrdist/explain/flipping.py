"""Pixel flipping: test whether maps show what the network uses (Samek et al. 2017, TNNLS 28(11)).

Patches of the image are covered, the most relevant first, and the network predicts again. If the
relevance shows what the network uses, the probability falls faster than in random order. The sum of
a map is not a test: its values at other positions have the same sum.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cxrdist.explain.description import FlippingInfo
from cxrdist.explain.relevance import Explainer
from cxrdist.model.densenet import Classifier

PATCHES_PER_SIDE = 28
"""Patches of 8 px at 224 px."""

COVERED_SHARE = 0.2
"""Share of the image that is covered in the end; with more, it is hardly an X-ray."""

STEPS = 10
"""Points of the curve after its start."""

RANDOM_ORDERS = 8
"""Random orders of the patches of each image. With one, the random area of 8 X-rays had a standard
deviation of 0.05, as much as the gain below which the report warns."""


class Flipping(NamedTuple):
    """Probability of the class while patches are covered, [STEPS + 1], relative to the first."""

    relevance: NDArray[np.float64]
    """The most relevant patches first."""
    random: NDArray[np.float64]
    """Patches in random order, mean of `RANDOM_ORDERS`."""


def flip_pixels(
    model: Classifier, explainer: Explainer, image: NDArray[np.uint8], classes: list[str], seed: int
) -> Flipping:
    """Cover an image, uint8 [H, W], step by step, for the likeliest of some classes.

    The model is in evaluation mode; the random orders depend on the seed.
    """
    pixels = torch.from_numpy(np.array(image))[None, None].to(model.mean.device)
    result = explainer.attribute(pixels, classes)
    likeliest = int(result.logits[0].argmax())
    target = model.classes.index(classes[likeliest])
    patches = _patches(*image.shape).ravel()
    relevance = result.relevance[0, likeliest].double().cpu().numpy()
    # If the side is no multiple of 28, patches differ in size: they are ranked by mean relevance.
    sizes = np.bincount(patches)
    amount = np.bincount(patches, relevance.ravel()) / sizes
    random = np.random.Generator(np.random.Philox(seed))
    orders = [random.permutation(len(sizes)) for _ in range(RANDOM_ORDERS)]
    # Equal patches keep the random order, so that a constant map is exactly as good as chance.
    by_relevance = [order[np.argsort(-amount[order], kind="stable")] for order in orders]
    curves = []
    for rankings in (by_relevance, orders):
        distinct, times = np.unique(rankings, axis=0, return_counts=True)
        each = []
        for ranking in distinct:
            covered_before = np.empty(len(sizes), np.int64)
            covered_before[ranking] = np.cumsum(sizes[ranking]) - sizes[ranking]
            before = covered_before[patches].reshape(image.shape)
            each.append(_curve(model, image, before, target))
        curves.append(np.average(each, axis=0, weights=times))
    return Flipping(*curves)


def _patches(height: int, width: int) -> NDArray[np.int64]:
    """Return the patch number of each pixel, int64 [H, W]."""
    rows, columns = (np.arange(n) * min(n, PATCHES_PER_SIDE) // n for n in (height, width))
    return rows[:, None] * (columns[-1] + 1) + columns


@torch.inference_mode()
def _curve(
    model: Classifier, image: NDArray[np.uint8], covered_before: NDArray[np.int64], target: int
) -> NDArray[np.float64]:
    """Return the probability while more and more of the image is set to its mean grey.

    For each pixel [H, W] is given how many pixels are covered before its patch.
    """
    limits = np.linspace(0, COVERED_SHARE * image.size, STEPS + 1)[:, None, None]
    covered = np.where(covered_before < limits, np.uint8(round(image.mean())), image)
    images = torch.from_numpy(covered).unsqueeze(1).to(model.mean.device)
    probabilities = torch.sigmoid(model(images)[:, target]).double().cpu().numpy()
    return probabilities / max(probabilities[0], np.finfo(np.float32).tiny)


def summarise(flippings: list[Flipping]) -> FlippingInfo:
    """Return mean curves and areas over them: 0 without effect, 1 for an immediate drop to 0."""
    relevance, random = (np.mean(curves, axis=0) for curves in zip(*flippings, strict=True))
    return {
        "images": len(flippings),
        "covered_share": COVERED_SHARE,
        "relevant_first": relevance.tolist(),
        "random_order": random.tolist(),
        # The start of a curve is 1 for any map, and does not count.
        "area_over_relevant_first": float(1 - relevance[1:].mean()),
        "area_over_random_order": float(1 - random[1:].mean()),
    }
