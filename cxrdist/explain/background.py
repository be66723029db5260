"""Penalties for using the background of an image, as differentiable functions of the weights.

Each takes (model, images, targets, background), `share_of_contrast` a turn as well, and returns a
penalty per image.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from cxrdist.explain.gradient import relevance
from cxrdist.model.densenet import Classifier

LEAST = 1e-12
"""Lower bound of a sum of |relevance|, in units of the logit, against division by zero."""


def share_of_contrast(
    model: Classifier, images: Tensor, targets: Tensor, background: Tensor, turn: int | None
) -> Tensor:
    """Return the share of the evidence for the labels of an image that lies in the background.

    It is the mean of two shares, of |relevance| and of |gradient|. A share is independent of scale:
    the network cannot lower it by a map that vanishes or explodes, which ISNet (Bassi et al. 2024,
    Nature Communications 15:291) prevents with a second term. Both are computed for the contrast of
    the labels: each class of the image has the weight 1, all others together -1, since the maps of
    single classes hardly differ.

    The gradient is needed because the z-plus rule follows only positive weights: a word that
    inhibits a feature of the lungs has no relevance but still decides. On phantoms with words and
    faint opacities (40 epochs, region masks), a word pasted on 62 normal images made all of them
    COVID-19 after training with relevance alone (weight 0.5, 0.5 % of it on the words), and 3 of
    them after training with both (0.5 each), at the same sensitivity of 0.917.

    Both shares together cost five plain steps. So training steps take turns, which gives their mean
    over two steps. All ranks and micro-batches of a step use the same share, so that the gradient
    does not depend on their number.

    Args:
        model: in any mode; evaluated in evaluation mode.
        images: float [B, 1, H, W], grey values 0..255.
        targets: float [B, classes]: 1 for present, 0 for absent and -1 for unknown labels.
        background: bool [B, 1, H, W].
        turn: 0 for the share of relevance, 1 for that of the gradient; None for the mean of both.

    Returns:
        float [B], 0 to 1, differentiable in the weights where gradients are enabled.
    """
    weights, amounts = _contrast(targets), []
    if turn != 1:
        amounts.append(relevance(model, images, weights))
    if turn != 0:
        gradient = input_gradient(model, images, lambda logits: (logits * weights).sum())
        amounts.append(gradient[:, 0])
    return torch.stack([share(values, background[:, 0]) for values in amounts]).mean(0)


def _contrast(targets: Tensor) -> Tensor:
    """Return weights of the logits [B, classes]: 1 per present label, -1 in total for absent."""
    present, absent = (targets == 1).to(targets.dtype), (targets == 0).to(targets.dtype)
    return present - absent / absent.sum(1, keepdim=True).clamp(min=1)


def share(amounts: Tensor, background: Tensor) -> Tensor:
    """Return the share of |amounts| [B, H, W] in the background [B, H, W], floats [B]."""
    amounts = amounts.abs()
    outside = (amounts * background).flatten(1).sum(1)
    return outside / amounts.flatten(1).sum(1).clamp(min=LEAST)


def squared_gradient(
    model: Classifier, images: Tensor, targets: Tensor, background: Tensor
) -> Tensor:
    """Return the squared input gradient of the log-probabilities, summed over the background.

    Ross et al. 2017 (IJCAI), equation 2, without its weight. Each label is binary, and the
    log-probabilities of both outcomes of all labels are summed. The gradient is that of grey values
    0..1. Arguments are as in `share_of_contrast`; the targets are not used.

    Returns:
        float [B], differentiable in the weights where gradients are enabled.
    """
    gradient = input_gradient(
        model, images, lambda logits: (logsigmoid(logits) + logsigmoid(-logits)).sum()
    )
    return (gradient.square() * background).flatten(1).sum(1)


def input_gradient(model: Classifier, images: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the gradient of a score of the logits by grey values 0..1, float [B, 1, H, W].

    The network is evaluated in evaluation mode: with batch statistics, the gradient of an image
    would depend on all images. The result is differentiable in the weights if gradients are
    enabled.
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad(), evaluating(model):
        shown = (images.detach().to(model.mean.dtype) / 255).requires_grad_()
        (gradient,) = torch.autograd.grad(
            score(model.logits(shown * 255)), shown, create_graph=differentiable
        )
    return gradient


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set all modules of a network to evaluation mode, and restore their modes at the end."""
    # One by one, because `train` would also set modules inside that were not in training mode.
    modules = [module for module in model.modules() if module.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True
