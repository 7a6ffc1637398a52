"""Bits on disk and in memory, as docs/format.md fixes them.

planes      one weight as planes, and back: pure functions, bit exact
stream      the image that hardware reads: a flag a block, 9- or 16-byte blocks
checkpoint  a model's planes and sites as safetensors, written at once and read with suspicion
"""
