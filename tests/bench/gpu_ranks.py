"""Run on each rank of a test: the GPU's job on a small network; rank 1 lacks memory for 8 images.

usage: gpu_ranks.py
"""

import os

import torch

from cxrdist.bench import gpu, measure
from cxrdist.config import BenchConfig, Network
from cxrdist.train import learner

RANK = int(os.environ["RANK"])


def main() -> None:
    learner.COMPILE_BACKEND = "aot_eager"
    gpu.NETWORK = Network(growth_rate=4, block_config=(1, 1, 1, 1), dropout=0.0)
    gpu.BATCHES = (4,)
    gpu.ROUND_SECONDS = 0.0
    measure._peak_mib = lambda _: 1000.0 + RANK
    step_alone = gpu._step_alone

    def full(accelerator, size_px, num_images):
        if RANK == 1 and num_images == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step_alone(accelerator, size_px, num_images)

    gpu._step_alone = full
    gpu.bench_gpu(BenchConfig(size=32, repeats=1))


if __name__ == "__main__":
    main()
