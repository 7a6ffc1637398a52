"""What `formats` and `pack` define, fast. Nothing here may give another bit.

ops        the operators ``torch.ops.fgmp.*``: schemas, checks at the door, the definitions as
           default, and whatever kernels this machine can run
check      what the operators demand of their arguments
cpu        C++, an object an instruction set, compiled where the package is installed
triton     the same for GPUs

There is no switch: PyTorch's dispatcher takes the kernel of the device on which the tensors lie.
"""
