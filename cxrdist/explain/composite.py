"""Zennit's composites on the canonical network; the canonical one keeps a ledger.

Rules of the canonical composite (Bassi & Attux 2020, section 4.1; iNNvestigate 1.0's
LRP-PresetAFlat): epsilon for the linear layer, z-plus for convolutions, flat for the first of them;
average pools pass relevance on in proportion to their inputs, max pools to their maximum. For
DenseNets the engine computes the same in a sixth of the time; tests compare it with this module.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from zennit.composites import COMPOSITES, SpecialFirstLayerMapComposite
from zennit.core import BasicHook, Composite, ParamMod, Stabilizer
from zennit.rules import ClampMod, Epsilon, Flat, Norm, ZPlus

from cxrdist.errors import CxrdistError
from cxrdist.explain.attribution import (
    STABILISER,
    Attribution,
    Ledger,
    Rules,
    concatenate,
    sum_per_image,
)
from cxrdist.explain.canonical import canonical_network

CANONICAL = "canonical"
"""The name of the canonical composite, beside the names of zennit's composites."""


class ByZennit:
    """Explains a network with a composite, on its own canonical copy of the network."""

    def __init__(
        self, network: nn.Module, name: str, bounds: tuple[Tensor, Tensor], rules: Rules
    ) -> None:
        """Build the canonical copy of a network; the network itself does not change.

        Args:
            network: what to explain.
            name: ``canonical``, or the name of one of zennit's composites.
            bounds: least and largest normalised inputs [1, C, 1, 1], for zennit's box rule.
            rules: variant of the canonical preset; zennit's composites ignore ``flat``.
        """
        self.network = canonical_network(network)
        self._ledger = Ledger()
        if name == CANONICAL:
            self._composite: Composite = _canonical(self._ledger, rules)
            self._absorbed_at_start = 0.0
        else:
            self._composite = _from_zennit(name, bounds, rules)
            self._absorbed_at_start = math.nan  # zennit's rules keep no ledger

    @torch.enable_grad()
    def attribute(self, inputs: Tensor, targets: list[int]) -> Attribution:
        """Return the relevance of normalised images [B, C, H, W] for the target class indices."""
        inputs = inputs.detach().requires_grad_()
        with self._composite.context(self.network):
            logits = self.network(inputs)
            return concatenate([self._propagate(logits[:, t], inputs) for t in targets])

    def _propagate(self, logit: Tensor, inputs: Tensor) -> Attribution:
        """Propagate one target's logit [B] to the inputs."""
        self._ledger.open(logit, self._absorbed_at_start)
        # All targets share one forward pass.
        (relevance,) = torch.autograd.grad(logit, inputs, logit.detach(), retain_graph=True)
        return self._ledger.close(logit.detach(), relevance)


class _Denominator:
    """A stabiliser for zennit's rules that keeps the last denominator, plain and stabilised."""

    def __init__(self, epsilon: float) -> None:
        self._stabilise = Stabilizer(epsilon)
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, z: Tensor) -> Tensor:
        stabilised: Tensor = self._stabilise(z.detach())
        self._last = z.detach(), stabilised
        return stabilised

    def take(self) -> tuple[Tensor, Tensor]:
        """Return the last denominator, plain and stabilised, and forget it."""
        if self._last is None:
            raise RuntimeError("a rule of zennit did not use its stabiliser")
        last, self._last = self._last, None
        return last


class _Booked(BasicHook):
    """A rule of zennit that records in a ledger the relevance that it absorbs.

    Each rule divides the relevance R_j of neuron j by d_j = z_j + epsilon * sign(z_j), where z_j
    is a sum of terms, and assigns every input its term times R_j / d_j. If one of the terms is a
    bias b_j, it absorbs b_j * R_j / d_j; the stabiliser absorbs (d_j - z_j) * R_j / d_j
    (Bach et al. 2015, PLoS ONE 10(7), equations 58 and 59).
    """

    def __init__(
        self, rule: Callable[[_Denominator], BasicHook], epsilon: float, ledger: Ledger
    ) -> None:
        self._rule, self._epsilon, self._ledger = rule, epsilon, ledger
        self._denominator = _Denominator(epsilon)
        made = rule(self._denominator)
        super().__init__(
            input_modifiers=made.input_modifiers,
            param_modifiers=made.param_modifiers,
            output_modifiers=made.output_modifiers,
            gradient_mapper=made.gradient_mapper,
            reducer=made.reducer,
        )

    def copy(self) -> "_Booked":
        """Return a hook for another layer, on the same ledger."""
        return _Booked(self._rule, self._epsilon, self._ledger)

    def backward(
        self, module: nn.Module, grad_input: tuple[Tensor, ...], grad_output: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the relevance of the inputs from that of the outputs (``grad_output``)."""
        relevance: tuple[Tensor | None, ...] = super().backward(module, grad_input, grad_output)
        plain, stabilised = self._denominator.take()
        ratio = grad_output[0] / stabilised
        self._ledger.epsilon += sum_per_image(ratio * (stabilised - plain))
        per_channel = ratio.reshape(*ratio.shape[:2], -1).sum(2)
        for modifier in self.param_modifiers:
            with ParamMod.ensure(modifier)(module) as modified:
                bias = getattr(modified, "bias", None)
                if bias is not None:
                    self._ledger.bias += sum_per_image(per_channel * bias.detach())
        return relevance


def _z_plus_of_relu(denominator: _Denominator, zero_params: list[str]) -> BasicHook:
    """Return zennit's ZPlus for non-negative inputs: bitwise the same with half the work."""
    return BasicHook(
        param_modifiers=[ClampMod(min=0.0, zero_params=zero_params)],
        gradient_mapper=lambda relevance, outputs: relevance / denominator(outputs[0]),
    )


def _canonical(ledger: Ledger, rules: Rules) -> SpecialFirstLayerMapComposite:
    """Return the rule of each layer of a canonical network.

    ReLU and max pool need none: a ReLU whose output is zero gets no relevance from the layer after
    it, and the gradient of a max pool assigns everything to the maximum.
    """

    def booked(rule: Callable[..., BasicHook], epsilon: float = STABILISER) -> _Booked:
        return _Booked(partial(rule, zero_params=_zero_params(rules)), epsilon, ledger)

    pool = _Booked(Norm, STABILISER, ledger)
    layer_map = [
        (nn.Conv2d, booked(_z_plus_of_relu)),
        ((nn.AvgPool2d, nn.AdaptiveAvgPool2d), pool),
        (nn.Linear, booked(Epsilon, rules.epsilon)),
    ]
    first = booked(Flat if rules.flat else ZPlus)
    return SpecialFirstLayerMapComposite(layer_map, [(nn.Conv2d, first)])


def _zero_params(rules: Rules) -> list[str]:
    """Return the names of parameters that zennit's rules take as zero."""
    return [] if rules.biases else ["bias"]


def _from_zennit(name: str, bounds: tuple[Tensor, Tensor], rules: Rules) -> Composite:
    """Return zennit's composite of a name, or raise CxrdistError if there is none."""
    if name not in COMPOSITES:
        names = ", ".join((CANONICAL, *COMPOSITES))
        raise CxrdistError(f"--composite: zennit has no {name!r}; expected one of {names}")
    zero_params, (low, high) = _zero_params(rules), bounds
    settings = {"epsilon": rules.epsilon, "zero_params": zero_params, "low": low, "high": high}
    taken = inspect.signature(COMPOSITES[name]).parameters
    return COMPOSITES[name](**{key: value for key, value in settings.items() if key in taken})
