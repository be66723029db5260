"""Stages: which blocks are trained at which rates, and when a stage ends."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cxrdist.config import Network, Stage
from cxrdist.errors import CxrdistError, choices
from cxrdist.info import GroupInfo
from cxrdist.model.batchnorm import BatchNorm
from cxrdist.model.densenet import Classifier
from cxrdist.model.networks import block_names, block_of, modules_of
from cxrdist.run import refuse_bad_stage_name

MOMENTUM = 0.9  # paper, section 3.3
ALL = "all"
"""The name, in a stage's rates, of all blocks that it does not list."""


def check_stages(stages: dict[str, Stage], blocks: list[str]) -> None:
    """Reject a recipe without stages, and stages whose fields do not fit each other or `blocks`."""
    if not stages:
        raise CxrdistError("--stages: the recipe has none; `cxrdist recipes bassi2020` shows four")
    for name, stage in stages.items():
        refuse_bad_stage_name(name)
        for block in stage.lr:
            if block not in (*blocks, ALL):
                raise CxrdistError(
                    f"--stages.{name}.lr: no block {block!r}; {choices(block, (*blocks, ALL))}"
                )
        if not stage.lr:
            raise CxrdistError(
                f"--stages.{name}: trains nothing; name the blocks to train under lr"
            )
        if stage.block_decay != 1 and ALL not in stage.lr:
            raise CxrdistError(
                f"--stages.{name}.block-decay: is {stage.block_decay}, but lr has no `all`, whose "
                "rate it lowers; give lr.all, or leave block-decay out"
            )
        if stage.warmup_epochs >= stage.epochs:
            raise CxrdistError(
                f"--stages.{name}.warmup-epochs: is {stage.warmup_epochs}, expected fewer than the "
                f"stage's {stage.epochs} epochs"
            )


def rates_of(stage: Stage, shape: Network) -> dict[str, float]:
    """Return the learning rate of each block that a stage trains, in forward order.

    The rate of ``all``, for the blocks that are not named, is that of the head; it is multiplied by
    ``block_decay`` for each block between the head and its own (Howard & Ruder 2018, section 3.2).
    """
    named, blocks = stage.lr, block_names(shape)
    rates = {}
    for depth, block in enumerate(blocks):
        if block in named:
            rates[block] = named[block]
        elif ALL in named:
            rates[block] = named[ALL] * stage.block_decay ** (len(blocks) - 1 - depth)
    return rates


def rate_factor(stage: Stage, epoch: int, step: int, num_steps: int) -> float:
    """Return the factor of the learning rates after some epochs of a stage and steps of the next.

    The warm-up is linear (Goyal et al. 2017, section 2.2); after it the factor is constant or half
    a cosine (Loshchilov & Hutter 2017, equation 5, without restarts).
    """
    done = epoch + step / num_steps
    if done < stage.warmup_epochs:
        # One step ahead, so that the first rate is not 0 and the last one of the warm-up is full.
        return (done + 1 / num_steps) / stage.warmup_epochs
    if stage.schedule == "constant":
        return 1.0
    share = (done - stage.warmup_epochs) / (stage.epochs - stage.warmup_epochs)
    return (1 + math.cos(math.pi * share)) / 2


def freeze(model: Classifier, trained: set[str]) -> None:
    """Let gradients reach only the trained blocks; call it before building optimiser and DDP."""
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_(block_of(name, model.shape) in trained)


def set_modes(model: Classifier, trained: set[str], *, moving: bool = False) -> None:
    """Put trained blocks in training mode, frozen ones with their BatchNorm in evaluation mode.

    If `moving`, the BatchNorm of frozen blocks is in training mode as well. Every later ``train()``
    or ``eval()`` of the model undoes this.
    """
    model.eval()
    for module in modules_of(model.network, model.shape, trained):
        module.train()
    for norm in moving_norms(model, trained, moving=moving):
        norm.train()


def moving_norms(model: Classifier, trained: set[str], *, moving: bool = False) -> list[BatchNorm]:
    """List the BatchNorms whose statistics move: of trained blocks, or if `moving` of all."""
    if moving:
        return model.norms
    modules = modules_of(model.network, model.shape, trained)
    return [norm for m in modules for norm in m.modules() if isinstance(norm, BatchNorm)]


def parameter_groups(model: Classifier, stage: Stage) -> list[dict[str, Any]]:
    """Return an optimiser group (name, params, lr, weight_decay) per trained block, in order."""
    members: dict[str, list[nn.Parameter]] = {block: [] for block in block_names(model.shape)}
    for name, parameter in model.network.named_parameters():
        members[block_of(name, model.shape)].append(parameter)
    return [
        {"name": block, "params": members[block], "lr": lr, "weight_decay": stage.weight_decay}
        for block, lr in rates_of(stage, model.shape).items()
    ]


def describe_groups(groups: list[dict[str, Any]]) -> list[GroupInfo]:
    """Describe the parameter groups, for run.json and the terminal."""
    return [
        {
            "block": group["name"],
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            "tensors": len(group["params"]),
            "parameters": sum(parameter.numel() for parameter in group["params"]),
        }
        for group in groups
    ]


def build_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build SGD with momentum 0.9, or AdamW, with one fused kernel per step."""
    # Only fused kernels read `found_inf`, by which `Updater` withholds a step.
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    # Each group has its own rate, so this 0 is never used.
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, fused=True)
    for parameter in (p for group in groups for p in group["params"]):
        # If the first step is withheld, PyTorch's own momentum buffer stays uninitialised.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


# Checkpoints hold its fields under these names (`Position.stopping`).
@dataclass
class EarlyStopping:
    """Tracks the best epoch of a stage by validation loss; epoch 0 is the start of the stage."""

    patience: int
    best_loss: float = math.inf
    best_epoch: int = 0
    epoch: int = 0

    def update(self, loss: float) -> bool:
        """Count an epoch; return whether it is the best so far."""
        self.epoch += 1
        if loss < self.best_loss:
            self.best_loss, self.best_epoch = loss, self.epoch
            return True
        return False

    @property
    def exhausted(self) -> bool:
        """Return whether `patience` epochs have passed since the best one."""
        return self.epoch - self.best_epoch >= self.patience
