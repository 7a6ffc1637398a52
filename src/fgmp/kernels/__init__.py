"""Fast implementations of ``formats`` and ``pack``, equal to them bit for bit.

ops        the operators ``torch.ops.fgmp.*``: schemas, argument checks, the definition as default,
           and the kernels that this machine can run
check      checks of the operators' arguments
cpu        C++ kernels, one object per instruction set, compiled when the package is installed
triton     Triton kernels for GPUs

No option selects a kernel: PyTorch's dispatcher takes the one of the tensors' device. Only sums of
products are not equal in every bit; :func:`fgmp.formats.linear.error_bound` bounds the difference.
"""
