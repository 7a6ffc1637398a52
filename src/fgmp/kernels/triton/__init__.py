"""The ops of ``kernels.ops`` for CUDA tensors, in Triton.

bits      single values and pairs of them: encode, decode; device functions
planes    tiles of a packed weight: load, count, decode; device functions
launch    on which device, with which arithmetic
quantize  activations to codes, or to the values that the codes stand for
unpack    a packed weight to a matrix
linear    the packed linear: one kernel for small batches, unpack and GEMM for large ones

A launch function has the signature of its op and trusts its arguments: the op has checked them.
Nothing here waits for the GPU. Under ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors,
which is how they are tested where no GPU is.
"""
