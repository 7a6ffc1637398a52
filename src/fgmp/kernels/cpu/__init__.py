"""C++ kernels behind a plain C interface, called by ctypes: neither Python's headers nor
PyTorch's are needed to compile them, and one library serves every version of both.

build      compile the library; needs nothing but Python and a C++ compiler
library    load it, mirror its records, call it

abi.h            the records that Python fills in
block.h          sixteen numbers, and packed blocks to them: one version an instruction set
quantize.h       activations to FGMP
gemv.h           few tokens, any instruction set
gemv_bf16.h      few tokens, AVX-512
gemm.h           many tokens
unpack.h         the whole weight
kernels.cpp      entry points, compiled once an instruction set
dispatch.cpp     which of them this processor can run
"""
