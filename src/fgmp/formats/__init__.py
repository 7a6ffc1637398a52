"""Definition of FGMP arithmetic; kernels and hardware reproduce it bit for bit.

spec        the two formats, E2M1 and E4M3, described by their bits; no torch
codec       single values to codes and back, rows to blocks
weight      a weight in both formats, offline
rules       decision rules: the integer score that makes an activation block FP8
activation  an activation in both formats and the integer decision, online
linear      the linear layer with an exact accumulator, and with an fp32 one

``docs/numerics.md`` states the rules; ``tests/vectors`` holds worked examples.
"""
