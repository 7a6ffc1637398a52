"""The operators of ``kernels.ops`` for CUDA tensors, in Triton.

bits      device functions: encode and decode single values and pairs
planes    device functions: load and decode tiles of a packed weight
launch    launching a kernel: device and floating-point options
quantize  activations to codes, or to decoded values
unpack    a packed weight to a matrix
linear    the packed linear: one kernel for small batches, unpack and GEMM for large ones

A launch function has the signature of its operator and does not check its arguments again. Nothing
here waits for the GPU. Under ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors; tests use
that where there is no GPU.
"""
