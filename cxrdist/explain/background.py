"""Penalties on what a network reads of the background, as functions of its weights.

Each takes (model, images, targets, background) and gives a penalty for each image.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from cxrdist.explain.gradient import relevance
from cxrdist.model.densenet import Classifier

LEAST = 1e-12
"""Of a sum of |relevance|, in logits; an image with less has the share 0."""


def share_of_contrast(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    background: Tensor,
    turn: int | None,
) -> Tensor:
    """Return the share of what decides the labels of an image that lies in the background.

    It is the mean of two shares, of |relevance| and of |gradient|. A share has no scale: neither a
    map that vanishes nor one that explodes pays off, which ISNet (Bassi et al. 2024, Nature
    Communications 15:291) needs a second term for. Both are those of the contrast of an image's
    labels: each class that it has counts for 1 and those that it does not have for -1 together,
    since the maps of single classes hardly differ.

    The gradient is needed because the z-plus rule follows positive weights only: a word that
    inhibits a feature of the lungs has no relevance and decides all the same. Phantoms with word
    and faint opacities show it, 40 epochs, region masks. With relevance alone (weight 0.5) 0.5 % of
    it lay on the words, and yet a word pasted on 62 normal images made all of them COVID-19; with
    both (0.5 each) it did so on 3, and the recall of COVID-19 was 0.917 with the words and without.

    Both shares together cost five plain steps. So the steps of a training take turns, and each pays
    one of the two in full: over two steps their mean counts as if each had paid half of both. All
    ranks and micro-batches of a step pay the same one, so its gradient does not depend on them.

    Args:
        model: in any mode; it is taken in evaluation mode.
        images: float [B, 1, H, W], grey values 0..255.
        targets: float [B, classes], 1 where an image has the label, -1 where that is unknown.
        background: bool [B, 1, H, W].
        turn: 0 for the share of relevance, 1 for that of the gradient; None for the mean of both.

    Returns:
        float [B], 0 to 1, differentiable in the weights where gradients are enabled.
    """
    shares = (share_of_relevance, share_of_gradient)
    paid = shares if turn is None else (shares[turn],)
    found = [share_of(model, images, targets, background) for share_of in paid]
    return torch.stack(found).mean(0)


def share_of_relevance(
    model: Classifier, images: Tensor, targets: Tensor, background: Tensor
) -> Tensor:
    """Return the share of |relevance|; arguments and result as of `share_of_contrast`."""
    return share(relevance(model, images, _contrast(targets)), background[:, 0])


def share_of_gradient(
    model: Classifier, images: Tensor, targets: Tensor, background: Tensor
) -> Tensor:
    """Return the share of |gradient|; arguments and result as of `share_of_contrast`."""
    weights = _contrast(targets)
    gradient = input_gradient(model, images, lambda logits: (logits * weights).sum())
    return share(gradient[:, 0], background[:, 0])


def _contrast(targets: Tensor) -> Tensor:
    """Weights of the logits [B, classes]: 1 for each label, -1 over those known to be absent."""
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
    """Square the gradient of the log-probabilities in the input, and sum it over the background.

    Ross et al. 2017 (IJCAI), equation 2, without its weight. Each label is a case of its own with
    two outcomes, whose log-probabilities add up. The network is taken in evaluation mode: with the
    statistics of a batch, an image's gradient would be that of all of them.

    Args:
        model: in any mode.
        images: float [B, 1, H, W], grey values 0..255; the gradient is that of grey values 0..1.
        targets: float [B, classes]; the method does not need them.
        background: bool [B, 1, H, W].

    Returns:
        float [B], differentiable in the weights where gradients are enabled.
    """
    gradient = input_gradient(
        model, images, lambda logits: (logsigmoid(logits) + logsigmoid(-logits)).sum()
    )
    return (gradient.square() * background).flatten(1).sum(1)


def input_gradient(model: Classifier, images: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the gradient of a score of the logits in grey values 0..1, float [B, 1, H, W].

    The network is taken in evaluation mode: with the statistics of a batch, an image's gradient
    would be that of all of them. It is differentiable in the weights where gradients are enabled.
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
    """Let a network compute as in evaluation mode; each module gets its mode back."""
    modules = [module for module in model.modules() if module.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True
