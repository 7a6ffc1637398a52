"""The hardware, in Amaranth: each module states its ports, widths and latency.

===========  ======================================================================
decode       element codes to sign, significand and shift; sums of many terms
floats       exact values to floats, rounded once
pipeline     registers between the steps of a calculation
dot          one dot-product unit
registers    operand registers and running totals of a lane
lane         the dot-product units with flags that select one, and the registers
encode       values to E4M3 and E2M1 codes
score        the difference of both formats, squared and weighted
search       errors against the value itself, under every scale that is tried
elements     parts of a calculation as modules of their own
rules        scores by each decision rule
ppu          the online quantizer
table        constants that a stream fills
unpack       the streamed image to blocks
tiles        banks of blocks
schedule     the order of work
epilogue     totals to outputs
accelerator  all of them: a whole linear
verilog      Verilog and port lists of any component
===========  ======================================================================

Ports are unsigned, two's complement where a number has a sign: some tools refuse ``signed``.
"""
