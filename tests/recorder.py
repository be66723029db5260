"""A stand-in for the recorder of CUDA graphs: replaying is taking the step again."""

import torch

from cxrdist.train.capture import Step, Tensors


class Again:
    """Like a CUDA graph it computes nothing when recorded, and has fixed inputs and outputs."""

    def __init__(self, step: Step, static: Tensors) -> None:
        self.step, self.static = step, static
        self.outputs = torch.zeros(()), torch.zeros(())
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for own, result in zip(self.outputs, self.step(*self.static), strict=True):
            own.resize_as_(result).copy_(result)


def record_again(step: Step, static: Tensors) -> tuple[Again, Tensors]:
    graph = Again(step, static)
    return graph, graph.outputs
