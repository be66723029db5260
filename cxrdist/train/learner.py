"""The learner: warp, network and loss of one pass, as one graph that can be compiled."""

import copy
from typing import Any

import torch
from timm.models.densenet import DenseLayer, DenseNet
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cxrdist.model.augment import warp
from cxrdist.model.densenet import Classifier
from cxrdist.train.background import BackgroundLoss

COMPILE_BACKEND = "inductor"


class Learner(nn.Module):
    """Computes the loss of images as they are in the cache.

    If all blocks of a DenseNet but the head are frozen, its features come from a copy with folded
    BatchNorms (if these move, from the network itself), without autograd.
    """

    def __init__(
        self,
        model: Classifier,
        trained: set[str],
        precision: torch.dtype,
        background: BackgroundLoss | None = None,
        *,
        compiled: bool,
        moving: bool = False,
    ) -> None:
        """Set up a stage that trains some blocks; the parameters of the others need no gradient.

        The precision of convolutions is that of autocast. If ``compiled``, warp, network and loss
        become one graph of fixed shapes: slices differ by at most one image, so a stage has two.
        """
        super().__init__()
        self.model = model
        self._background = background
        # In a list, so that it is not a submodule, which DDP and optimisers would take up.
        self._trunk: list[nn.Module] = []
        if trained == {"head"} and isinstance(model.network, DenseNet):
            features = model.network.features
            self._trunk = [features if moving else folded(features, precision)]
        self._loss = self.loss
        if compiled:
            torch.compiler.reset()  # else the graphs of earlier stages count towards a limit
            self._loss = torch.compile(
                self.loss, fullgraph=True, dynamic=False, backend=COMPILE_BACKEND
            )

    def forward(
        self,
        images: Tensor,
        matrices: Tensor,
        targets: Tensor,
        foreground: Tensor | None = None,
        turn: int = 0,
    ) -> Tensor:
        """Return the two sums that the loss is made of.

        The arguments are as in `step.Slice`.

        Returns:
            float32 [2]: the binary cross-entropy over the known labels of all images, and the
            penalties of all images, 0 without a background loss.
        """
        loss: Tensor = self._loss(images, matrices, targets)
        if self._background is None or foreground is None:
            return torch.stack([loss, torch.zeros_like(loss)])
        # After the pass that trains, which changes running statistics in place: the gradient of the
        # penalty needs the statistics that the penalty was computed with.
        inputs = (images, matrices, targets, foreground, turn)
        penalties = self._background.penalties(self.model, *inputs)
        return torch.stack([loss, penalties.sum().to(loss.dtype)])

    def loss(self, images: Tensor, matrices: Tensor, targets: Tensor) -> Tensor:
        """Return the loss on logits (paper, section 3.3), as `forward`, not compiled."""
        return sum_of_losses(self.logits(warp(images, matrices)), targets)

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits [B, classes] of warped images, float [B, 1, H, W]."""
        if not self._trunk:
            return self.model.logits(images)
        # Counted here, because `Classifier.logits`, which does it, is not called.
        self.model.count_pass()
        with torch.no_grad():
            features = self._trunk[0](self.model.normalise(images))
        head: Any = self.model.network
        logits: Tensor = head.forward_head(features)
        return logits


def sum_of_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum the binary cross-entropy over the known labels, in the precision of the targets.

    Args:
        logits: float [B, classes].
        targets: float [B, classes], 1 where an image has the label, -1 where that is unknown.
    """
    known = (targets >= 0).to(targets.dtype)  # 1 leaves the bits of loss and gradient as they are
    return binary_cross_entropy_with_logits(
        logits.to(targets.dtype), targets, weight=known, reduction="sum"
    )


def folded(features: nn.Module, precision: torch.dtype) -> nn.Module:
    """Copy a frozen trunk with each BatchNorm that follows a convolution folded into it.

    That is norm0 and each norm2; the others read concatenations. Weights of convolutions are in the
    precision of autocast, which would otherwise cast those of a frozen network anew in each step.
    """
    trunk = copy.deepcopy(features).eval().requires_grad_(False)
    _fold(trunk, "conv0", "norm0")
    for layer in trunk.modules():
        if isinstance(layer, DenseLayer):
            _fold(layer, "conv1", "norm2")
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            module.to(precision)
    return trunk


def _fold(module: nn.Module, conv: str, norm: str) -> None:
    """Fold a BatchNorm into the convolution before it; its ReLU takes its place."""
    folded_into: Any = module.get_submodule(conv)
    folding: Any = module.get_submodule(norm)
    setattr(module, conv, fuse_conv_bn_eval(folded_into, folding))
    setattr(module, norm, folding.act)
