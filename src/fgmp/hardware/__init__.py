"""The accelerator: what computes an FGMP linear in silicon (docs/hardware.md).

datapath    parameters of a lane; computes in Python and creates the hardware
rtl         the hardware, in Amaranth
yosys       the one place that runs Yosys
cli         ``fgmp hw``

The arithmetic is that of ``fgmp.formats``: decoded values are integers, sums of products are exact,
and every register is wide enough by a bound that is computed from the format records. Amaranth and
Yosys come with ``pip install 'fgmp[hw]'``; nothing outside this package needs them.
"""
