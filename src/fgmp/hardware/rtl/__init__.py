"""The hardware, in Amaranth: each module states its ports, widths and latency.

decode      element codes to sign, significand and shift; sums of many terms
dot         one dot-product unit
lane        four units, the flags that select one, operand registers and running totals
verilog     Verilog and port lists of any of them

Ports are unsigned, two's complement where a number has a sign: some tools refuse ``signed``.
"""
