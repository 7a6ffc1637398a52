"""Layouts of quantized weights in memory and on disk, as docs/format.md specifies them.

planes      a weight as planes, and back: pure functions, bit exact
stream      the image that hardware reads: one flag per block, blocks of 9 or 16 bytes
checkpoint  planes and sites of a model as safetensors, written atomically, verified when read
"""
