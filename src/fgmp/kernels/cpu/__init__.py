"""C++ kernels behind a plain C interface, called by ctypes.

Compiling them takes neither Python's headers nor PyTorch's, and one library serves every version of
both.

build            compile the library; takes only Python and a C++ compiler
library          load the library, mirror its structs, call it

abi.h            structs that Python fills in
block.h          vectors of 16 numbers and the decoding of packed blocks, per instruction set
quantize.h       quantization of activations
gemv.h           linear for few tokens, any instruction set
gemv_bf16.h      linear for few tokens, AVX-512
gemv_int8.h      linear for few tokens in exact integers, AVX2 and ARM
int8.h           products of nibbles and bytes, per instruction set
gemm.h           linear for many tokens
unpack.h         decoding of a whole weight
kernels.cpp      entry points, compiled once per instruction set
dispatch.cpp     the instruction sets that the processor supports
"""
