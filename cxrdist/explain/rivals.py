"""Maps that LRP is compared with: Grad-CAM, the plain gradient, and a prior without an image."""

import numpy as np
from captum.attr import LayerAttribution, LayerGradCam, Saliency
from numpy.typing import NDArray
from torch import Tensor, nn

from cxrdist.explain.relevance import exact
from cxrdist.model.densenet import Classifier

CENTRE_DEVIATION = 0.25
"""Standard deviation of the centre prior along both axes, as a fraction of the side."""


def grad_cam(model: Classifier, images: Tensor, target: int) -> Tensor:
    """Return Grad-CAM (Selvaraju et al. 2017) of the last features, by captum, upsampled.

    The last features enter the average before the head; those of AlexNet enter its last max pool.

    Returns:
        [B, H, W], never negative, for images uint8 [B, 1, H, W].
    """
    # `logits` instead of the model, which takes no floats.
    method = LayerGradCam(model.logits, _last_features(model))
    with exact(images.device):
        coarse = method.attribute(images.float(), target, relu_attributions=True)
        fine = LayerAttribution.interpolate(coarse.detach(), images.shape[2:], "bilinear")
    return fine[:, 0]


def _last_features(model: Classifier) -> nn.Module:
    """Return the module whose output is the last features [B, C, h, w] after their activation."""
    names = {
        "resnet18": "layer4",
        "alexnet": "features.11",
        "squeezenet1_1": "features",
        "convnext_atto": "stages",
    }
    return model.network.get_submodule(names.get(model.shape.architecture, "features.norm5"))


def plain_gradient(model: Classifier, images: Tensor, target: int) -> Tensor:
    """Return the absolute gradient of the logit by grey value (Simonyan et al. 2014), by captum.

    Returns:
        [B, H, W], for images uint8 [B, 1, H, W].
    """
    with exact(images.device):
        method, grey = Saliency(model.logits), images.float().requires_grad_()
        return method.attribute(grey, target).detach()[:, 0]


def centre_prior(size_px: int) -> NDArray[np.float64]:
    """Return a Gaussian at the centre of the square, [size, size], a guess without the image."""
    across = (np.arange(size_px) + 0.5) / size_px - 0.5
    profile = np.exp(-0.5 * (across / CENTRE_DEVIATION) ** 2)
    return profile[:, None] * profile[None, :]
