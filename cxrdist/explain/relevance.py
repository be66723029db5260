"""Explain predictions by the relevance of each pixel for a class, with LRP.

The rules are the canonical preset (composite.py, with sources; engine.py applies them), those of
the paper's program, or any composite of zennit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypedDict, Unpack

import torch
from timm.models.densenet import DenseNet
from torch import Tensor

from cxrdist.errors import CxrdistError
from cxrdist.explain.attribution import Attribution, Rules
from cxrdist.explain.composite import CANONICAL, ByZennit
from cxrdist.explain.engine import Engine
from cxrdist.explain.innvestigate import Innvestigate
from cxrdist.model.batch import check_batch
from cxrdist.model.densenet import Classifier
from cxrdist.precision import full_float32

Preset = Literal["canonical", "innvestigate"]


class Settings(TypedDict, total=False):
    """Keyword arguments of `Explainer`, which documents them."""

    preset: Preset
    composite: str | None
    flat: bool
    biases: bool
    epsilon: float


class Explainer:
    """Explains the predictions of a model: prepares the network once, then explains batches.

    DenseNets are explained by the engine, other networks by zennit (see canonical.py).

    It copies the weights when it is created: later changes of the model have no effect. For
    DenseNet121 in float32 the copy takes 0.1 GB, a batch 0.1 GB per image of 224 px, and the
    targets up to 0.2 GB more (measured with four images and up to 14 targets).

    Attributes:
        classes: class names in the order of the logits.
    """

    def __init__(
        self,
        model: Classifier,
        *,
        preset: Preset = "canonical",
        composite: str | None = None,
        flat: bool = True,
        biases: bool = True,
        epsilon: float = 0.1,
    ) -> None:
        """Prepare a copy of the network; the model itself does not change.

        Args:
            model: in evaluation mode.
            preset: ``canonical``, or ``innvestigate`` for the maps of iNNvestigate 1.0.8.3.
            composite: the name of a zennit composite to use on the canonical network instead;
                ``canonical`` computes the canonical preset with zennit.
            flat: the rule of the first convolution: flat (all pixels of a window get the same
                share) or, if False, z-plus as in the other convolutions.
            biases: whether biases are part of the denominators and absorb their share.
            epsilon: of the linear layer's rule, in units of the logit.

        Raises:
            CxrdistError: the model is in training mode, its network has no proven rules, or the
                settings exclude each other.
        """
        self.classes = list(model.classes)
        self._normalise = model.normalise
        self._size_px = model.image_size_px
        self._device = model.mean.device
        self._method = self._choose_method(model, preset, composite, Rules(flat, biases, epsilon))

    def _choose_method(
        self, model: Classifier, preset: Preset, composite: str | None, rules: Rules
    ) -> Engine | ByZennit | Innvestigate:
        network = model.network
        if preset == "innvestigate":
            if composite is not None or not rules.biases:
                raise CxrdistError(
                    "--preset innvestigate: has its own rules and keeps biases; leave out "
                    "--composite and --biases"
                )
            if type(network) is not DenseNet:
                raise CxrdistError(
                    f"--preset innvestigate: is for DenseNets, but this is a "
                    f"{type(network).__name__}; leave it out"
                )
            return Innvestigate(network, rules.flat, rules.epsilon)
        if composite is None and type(network) is DenseNet:
            return Engine(network, rules)
        darkest, brightest = (torch.full((1, 1, 1, 1), v, device=self._device) for v in (0, 255))
        bounds = model.normalise(darkest), model.normalise(brightest)
        return ByZennit(network, composite or CANONICAL, bounds, rules)

    def attribute(self, images: Tensor, targets: Sequence[int | str] | None = None) -> Attribution:
        """Return the relevance of grey images for some of the classes.

        Args:
            images: uint8 [B, 1, S, S] as the model takes them, on any device.
            targets: names or indices of the K classes to explain for each image; None for all.

        Raises:
            CxrdistError: the images have another type or shape, or a target is not a class of the
                model.
        """
        check_batch(images, self._size_px)
        indices = _class_indices(self.classes, targets)
        with exact(self._device):
            inputs = self._normalise(images.to(self._device)).detach()
            return self._method.attribute(inputs, indices)


def attribute(
    model: Classifier,
    images: Tensor,
    targets: Sequence[int | str] | None = None,
    **settings: Unpack[Settings],
) -> Attribution:
    """Explain one batch; for many batches, create an `Explainer` with these settings once."""
    return Explainer(model, **settings).attribute(images, targets)


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Compute in full precision with deterministic kernels, whatever the caller has enabled.

    TensorFloat-32 would unbalance the ledger by 1e-3.
    """
    with (
        torch.inference_mode(False),  # zennit needs autograd, also under a caller's inference mode
        torch.autocast(device.type, enabled=False),
        full_float32(),
        torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
    ):
        yield


def _class_indices(classes: list[str], targets: Sequence[int | str] | None) -> list[int]:
    """Return the index of each target among the classes; all indices if ``targets`` is None."""
    if targets is None:
        return list(range(len(classes)))
    if isinstance(targets, str) or len(targets) == 0:
        raise CxrdistError(
            f"targets is {targets!r}: expected a list of classes; pass None to explain all"
        )
    indices = []
    for target in targets:
        if isinstance(target, str) and target in classes:
            indices.append(classes.index(target))
        elif isinstance(target, int) and 0 <= target < len(classes):
            indices.append(target)
        else:
            raise CxrdistError(
                f"cannot explain class {target!r}: expected one of {', '.join(classes)} or a "
                f"number below {len(classes)}"
            )
    return indices
