"""The randomisation test: do the maps change when the network does? (Adebayo et al. 2018).

Sanity Checks for Saliency Maps, section 3, cascading: the weights of the head, then of the last
block too, then of all blocks are drawn anew. A map that stays as it was does not show what these
blocks have learned. Relevance of the z-plus rule changes little (Sixt et al. 2020, When
Explanations Lie, section 4); the difference of two classes' maps changes more. Of a DenseNet121
trained on X-rays of COVID-19, with head and last block drawn anew, 0.67 against 0.22 (Pearson).

A block that is drawn anew has the weights that a training from nothing begins with. The statistics
of its BatchNorms are those of the images of the test, so that activations keep their scale.
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
"""Unlike the seeds of trainings, whose first weights would not be independent of the last ones."""


class Likeness(NamedTuple):
    """How alike two maps of an image are; NaN where one of them does not vary."""

    spearman: float
    """Rank correlation of the absolute values."""
    pearson: float


Found = list[tuple[Likeness, Likeness | None]]
"""Of each randomised network the class map and the contrast of an image."""


def randomise(
    model: Classifier, images: Tensor, explainer_of: Callable[[Classifier], Explainer]
) -> list[Explainer]:
    """Draw the head anew, the head and the last block before it, and all blocks.

    Args:
        model: in evaluation mode; it is left as it is.
        images: uint8 [B, 1, H, W], for the statistics of BatchNorms.
        explainer_of: explains a network in the way that is tested.
    """
    return [explainer_of(draw_anew(model, blocks, images)) for blocks in levels(model)]


def levels(model: Classifier) -> list[list[str]]:
    """Blocks that are drawn anew together: the head, the head and the block before it, all."""
    names = block_names(model.shape)
    return [names[-1:], names[-2:], names]


def draw_anew(model: Classifier, blocks: Sequence[str], images: Tensor) -> Classifier:
    """Copy a network with new weights in some blocks; the same blocks get the same weights.

    Args:
        model: in evaluation mode.
        blocks: to draw anew, as `block_names` calls them.
        images: uint8 [B, 1, H, W], on its device.
    """
    drawn = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
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
    hooks = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
    with torch.no_grad():
        drawn(images)
    for hook in hooks:
        hook.remove()
    return drawn


def _take_statistics(norm: nn.Module, inputs: tuple[Tensor]) -> None:
    """Give a BatchNorm the statistics of what it is about to normalise, [B, C, H, W]."""
    (features,) = inputs
    norm.get_buffer("running_mean").copy_(features.mean((0, 2, 3)))
    norm.get_buffer("running_var").copy_(features.var((0, 2, 3), correction=0))


def compare_maps(
    explainer: Explainer, drawn: Sequence[Explainer], image: Tensor, classes: list[str]
) -> Found:
    """Compare an image's maps with those of the randomised networks.

    Args:
        explainer: of the network itself.
        drawn: what `randomise` gives.
        image: uint8 [1, 1, H, W].
        classes: the likeliest of them is explained, and what it has more than the second likeliest.
    """
    own = explainer.attribute(image, classes)
    order = np.argsort(-own.logits[0].cpu().numpy(), kind="stable")[:2].tolist()
    pair = [classes[place] for place in order]
    class_map, contrast = _maps(own, order)
    found = []
    for other in drawn:
        new_map, new_contrast = _maps(other.attribute(image, pair), list(range(len(pair))))
        found.append(
            (
                likeness(class_map, new_map),
                None
                if contrast is None or new_contrast is None
                else likeness(contrast, new_contrast),
            )
        )
    return found


def _maps(
    found: Attribution, places: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Return the map of the first of one or two places, and what it has more than the second's."""
    first, *others = (found.relevance[0, place].double().cpu().numpy() for place in places)
    return first, first - others[0] if others else None


def likeness(one: NDArray[np.float64], other: NDArray[np.float64]) -> Likeness:
    """Compare two maps [H, W] pixel by pixel, by SciPy."""
    flat = one.ravel(), other.ravel()
    if any(np.ptp(values) == 0 or np.ptp(np.abs(values)) == 0 for values in flat):
        return Likeness(np.nan, np.nan)
    spearman = stats.spearmanr(*(np.abs(values) for values in flat)).statistic
    return Likeness(float(spearman), float(stats.pearsonr(*flat).statistic))


def summarise(blocks: Sequence[list[str]], of_images: Sequence[Found]) -> RandomisationInfo:
    """Average over images.

    Args:
        blocks: that were drawn anew, by network.
        of_images: what `compare_maps` gives of each image.
    """
    drawn: list[Drawn] = []
    for names, found in zip(blocks, zip(*of_images, strict=True), strict=True):
        contrasts = [contrast for _, contrast in found if contrast is not None]
        drawn.append(
            {
                "blocks": names,
                "class_map": _mean([class_map for class_map, _ in found]),
                "contrast": _mean(contrasts) if contrasts else None,
            }
        )
    return {"images": len(of_images), "drawn": drawn}


def _mean(found: Sequence[Likeness]) -> Similarity:
    """Return the means of what is defined, within -1 to 1 whatever the rounding."""
    means = []
    for values in zip(*found, strict=True):
        defined = [value for value in values if np.isfinite(value)]
        means.append(float(np.clip(np.mean(defined), -1, 1)) if defined else None)
    return {"spearman": means[0], "pearson": means[1]}
