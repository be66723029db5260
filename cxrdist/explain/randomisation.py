"""The model randomisation test: do the maps change when the weights do? (Adebayo et al. 2018).

Sanity Checks for Saliency Maps, section 3, cascading: the weights of the head, then also of the
last block, then of all blocks are randomised. A map that does not change does not show what these
blocks have learned. Relevance of the z-plus rule changes little (Sixt et al. 2020, When
Explanations Lie, section 4); the difference of two classes' maps changes more: for a DenseNet121
trained on X-rays of COVID-19, with head and last block randomised, Pearson's correlation with the
original is 0.67 for class maps and 0.22 for contrasts.

A randomised block has the weights of an untrained network. The running statistics of its BatchNorms
are computed on the images of the test, so that activations keep their scale.
"""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from cxrdist.explain.attribution import Attribution
from cxrdist.explain.description import Drawn, RandomisationInfo, Similarity
from cxrdist.explain.relevance import Explainer
from cxrdist.model.batchnorm import BatchNorm
from cxrdist.model.densenet import Classifier
from cxrdist.model.networks import block_names, block_of

SEED = 2018
"""Must differ from the seeds of trainings: a trained network is similar to its initial weights."""


class Likeness(NamedTuple):
    """Similarity of two maps of an image; NaN if one of them is constant."""

    spearman: float
    """Rank correlation of the absolute values."""
    pearson: float


Comparison = list[list[Likeness]]
"""For each randomised network: of an image's class map, and of its contrast if there is one."""


def randomise(
    model: Classifier, images: Tensor, explainer_of: Callable[[Classifier], Explainer]
) -> list[Explainer]:
    """Return explainers of copies with the head, head and last block, or all blocks randomised.

    The statistics of BatchNorms are those of the images, uint8 [B, 1, H, W].
    """
    return [explainer_of(draw_anew(model, blocks, images)) for blocks in levels(model)]


def levels(model: Classifier) -> list[list[str]]:
    """Return the blocks to randomise together: the head, the head and the last block, all."""
    names = block_names(model.shape)
    return [names[-1:], names[-2:], names]


def draw_anew(model: Classifier, blocks: Sequence[str], images: Tensor) -> Classifier:
    """Copy a network with random weights in some blocks, the same weights in each call.

    The images are uint8 [B, 1, H, W], on the device of the model.
    """
    drawn = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
        torch.manual_seed(SEED)
        fresh = Classifier(model.shape, model.classes, model.image_size_px, model.normalisation)
    state = fresh.network.state_dict()
    new = {name: value for name, value in state.items() if block_of(name, model.shape) in blocks}
    drawn.network.load_state_dict(new, strict=False)
    norms = [
        norm
        for name, norm in drawn.network.named_modules()
        if isinstance(norm, BatchNorm) and block_of(name, model.shape) in blocks
    ]
    # Hooks, because the input of a BatchNorm depends on the statistics of those before it.
    hooks = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
    with torch.no_grad():
        drawn(images)
    for hook in hooks:
        hook.remove()
    return drawn


def _take_statistics(norm: nn.Module, inputs: tuple[Tensor]) -> None:
    """Set the running statistics of a BatchNorm to those of its input [B, C, H, W]."""
    (features,) = inputs
    norm.get_buffer("running_mean").copy_(features.mean((0, 2, 3)))
    norm.get_buffer("running_var").copy_(features.var((0, 2, 3), correction=0))


def compare_maps(
    explainer: Explainer, drawn: Sequence[Explainer], image: Tensor, classes: list[str]
) -> Comparison:
    """Compare the maps of an image, uint8 [1, 1, H, W], with those of the randomised networks.

    The maps are that of the likeliest class, and its contrast with the second likeliest.
    """
    own = explainer.attribute(image, classes)
    order = np.argsort(-own.logits[0].cpu().numpy(), kind="stable")[:2].tolist()
    pair = [classes[index] for index in order]
    maps = _maps(own, order)
    rows = []
    for other in drawn:
        new_maps = _maps(other.attribute(image, pair), list(range(len(pair))))
        rows.append([likeness(*both) for both in zip(maps, new_maps, strict=True)])
    return rows


def _maps(result: Attribution, indices: list[int]) -> list[NDArray[np.float64]]:
    """Return the map of the first of one or two classes, and its difference to the second's."""
    first, *others = (result.relevance[0, index].double().cpu().numpy() for index in indices)
    return [first, *(first - other for other in others)]


def likeness(one: NDArray[np.float64], other: NDArray[np.float64]) -> Likeness:
    """Compare two maps [H, W] pixel by pixel, by SciPy."""
    flat = one.ravel(), other.ravel()
    # Spearman's compares absolute values, which are constant also for a map of c and -c.
    if any(np.ptp(values) == 0 or np.ptp(np.abs(values)) == 0 for values in flat):
        return Likeness(np.nan, np.nan)
    spearman = stats.spearmanr(*(np.abs(values) for values in flat)).statistic
    return Likeness(float(spearman), float(stats.pearsonr(*flat).statistic))


def summarise(blocks: Sequence[list[str]], of_images: Sequence[Comparison]) -> RandomisationInfo:
    """Average the results of `compare_maps`, whose networks have these randomised blocks."""
    drawn: list[Drawn] = []
    for names, rows in zip(blocks, zip(*of_images, strict=True), strict=True):
        class_map, *contrast = (_mean(column) for column in zip(*rows, strict=True))
        of_contrast = contrast[0] if contrast else None
        drawn.append({"blocks": names, "class_map": class_map, "contrast": of_contrast})
    return {"images": len(of_images), "drawn": drawn}


def _mean(rows: Sequence[Likeness]) -> Similarity:
    """Return the means of finite values, clipped to -1..1 against rounding."""
    means = []
    for values in zip(*rows, strict=True):
        defined = [value for value in values if np.isfinite(value)]
        means.append(float(np.clip(np.mean(defined), -1, 1)) if defined else None)
    return {"spearman": means[0], "pearson": means[1]}
