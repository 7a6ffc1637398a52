"""Launch a kernel on the device of its tensors, without fused multiply-add.

A fused a * b + c rounds once where the definitions round twice, as in the linear's bias.
"""

import torch
import triton
from torch import Tensor


def launch(
    kernel: triton.JITFunction, grid: tuple[int, ...], on: Tensor, **arguments: object
) -> None:
    """Launch ``kernel`` with ``grid`` programs on the device of ``on``, without waiting for it."""
    with torch.cuda.device_of(on):
        kernel[grid](enable_fp_fusion=False, **arguments)
