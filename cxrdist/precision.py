"""Full float32 arithmetic: set the switches of torch that reduce it, such as TensorFloat-32.

By default cuDNN's convolutions use TensorFloat-32 (10 bits of mantissa instead of 23), and some
containers switch it on for matrix products too (``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _switches() -> list[Any]:
    """List the modules with an ``fp32_precision`` (torch >= 2.9), a parent before its operators."""
    backends: Any = torch.backends  # torch's type hints lack some of them
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    operators = [backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    return [backends, cudnn, *operators, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


def use_full_float32() -> None:
    """Use full float32 on every device from now on, whatever was enabled before."""
    # torch has older and newer switches, and raises an error when an older one is read that
    # disagrees, so both are set. The older ones come first: they make an operator inherit from its
    # parent, which may be tf32.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    for switch in _switches():
        switch.fp32_precision = "ieee"


@contextmanager
def full_float32() -> Iterator[None]:
    """Use full float32 inside the context, and restore the caller's switches at its end."""
    switches, matmul, convolution = _switches(), _older_matmul(), _older_convolution()
    before = []
    for switch in switches:
        before.append(switch.fp32_precision)
        switch.fp32_precision = "none"  # so that its operators, read next, do not inherit it
    use_full_float32()
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolution
        torch.set_float32_matmul_precision(matmul)
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def uses_tf32() -> bool:
    """Return whether any float32 operator may use TF32 in this process, as torch reports it."""
    return any(switch.fp32_precision == "tf32" for switch in _switches())


def _older_matmul() -> str:
    """Read the older switch of matrix products; torch raises where only a newer one was set."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def _older_convolution() -> bool:
    """Return whether cuDNN may use TF32, by the newer switches: reading the older can fail."""
    cudnn: Any = torch.backends.cudnn
    return "tf32" in (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)
