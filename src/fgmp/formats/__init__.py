"""What a number is: the one definition of FGMP arithmetic that everything else imitates.

spec        records of the formats, computed from their bits; no torch
codec       single values to codes and back, rows to blocks
weight      a weight in both formats, offline
activation  an activation in both formats and the integer decision, online
linear      the exact linear and its fp32 twin

``docs/numerics.md`` states the rules; tests/vectors pins them.
"""
