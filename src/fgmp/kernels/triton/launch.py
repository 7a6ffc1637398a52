"""How a kernel is launched: on the device of its tensors, and without fused multiply-add.

Contracting a * b + c rounds once where the definitions round twice, as in the linear's bias.
"""

import torch
import triton
from torch import Tensor


def launch(
    kernel: triton.JITFunction, grid: tuple[int, ...], on: Tensor, **arguments: object
) -> None:
    """``kernel`` over ``grid`` programs on the device of ``on``; waits for nothing."""
    with torch.cuda.device_of(on):
        kernel[grid](enable_fp_fusion=False, **arguments)
