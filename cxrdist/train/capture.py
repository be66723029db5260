"""Capture: a whole step as one CUDA graph, for batches too small to keep a GPU busy otherwise."""

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Step = Callable[..., Tensors]
Graph = torch.cuda.CUDAGraph
Recorder = Callable[[Step, Tensors], tuple[Graph, Tensors]]

MOST_IMAGES = 64
"""Largest step that is captured: with few images, launching the kernels takes longer than running
them. This number was not measured on a GPU; `cxrdist bench --only gpu` measures it."""
WARM_UP_STEPS = 3  # as in the example of PyTorch's notes on CUDA graphs


def can_capture(device: torch.device, world_size: int, num_images: int) -> bool:
    """Return whether steps of this many images are captured: on one GPU, without DDP."""
    return device.type == "cuda" and world_size == 1 and num_images <= MOST_IMAGES


class CapturedStep:
    """Takes steps by replaying a graph; one for each turn and number of images.

    A stage has two numbers of images, and with a background loss two turns.

    The first steps of each graph are not replayed, but run on a stream of their own, while kernels
    choose their algorithms and libraries allocate memory. Recording computes nothing: the step is
    then replayed like the later ones, so each step is taken once.

    Args:
        step: takes a turn and tensors on the device, changes the network, and returns tensors,
            without a read by the host.
        record: records a step of a turn on given inputs, see `record_cuda_graph`.
    """

    def __init__(self, step: Step, record: Recorder) -> None:
        self._step, self._record = step, record
        self._taken: dict[tuple[int, int], int] = {}
        self._graphs: dict[tuple[int, int], tuple[Tensors, Graph, Tensors]] = {}

    def __call__(self, turn: int, *inputs: Tensor) -> Tensors:
        """Take a step; its results are valid until the next step of the same turn and size."""
        key = turn, len(inputs[0])
        if key not in self._graphs:
            step = partial(self._step, turn)
            taken = self._taken[key] = self._taken.get(key, 0) + 1
            if taken <= WARM_UP_STEPS:
                return on_side_stream(step, inputs)
            # Memory of its own: a graph reads the same addresses in each replay.
            static = tuple(tensor.clone() for tensor in inputs)
            self._graphs[key] = (static, *self._record(step, static))
        static, graph, outputs = self._graphs[key]
        for own, tensor in zip(static, inputs, strict=True):
            own.copy_(tensor)
        graph.replay()
        return outputs


def on_side_stream(step: Step, inputs: Tensors) -> Tensors:
    """Take a step on a side stream: the default one cannot be recorded."""
    if inputs[0].device.type != "cuda":
        return step(*inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), warnings.catch_warnings():
        # AdamW warns, in case no step is ever recorded.
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        outputs = step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    return outputs


def record_cuda_graph(step: Step, static: Tensors) -> tuple[Graph, Tensors]:
    """Record a step on the GPU; return its graph, and the memory of its results.

    Each replay reads its inputs from the memory of `static`.
    """
    graph = Graph()
    with torch.cuda.graph(graph):
        outputs = step(*static)
    return graph, outputs
