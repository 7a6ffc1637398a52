"""The accelerator: what computes an FGMP linear in silicon (docs/hardware.md).

datapath    parameters of a lane; computes in Python and creates the hardware
rtl         the hardware, in Amaranth
yosys       the one place that runs Yosys

cells       standard cells, and a library of them by logical effort
liberty     libraries from files
netlist     gates and registers of a mapped design
synthesis   RTL to netlists
timing      loads, slews, delays
gates       netlists at work: what toggles, without delays and with glitches
stimulus    a model's operands at the ports
power       toggles to femtojoules
silicon     all of these for one component
inference   units' energies to joules of serving a model
plot        figures

cli         ``fgmp hw``

The arithmetic is that of ``fgmp.formats``: decoded values are integers, sums of products are exact,
and every register is wide enough by a bound that is computed from the format records. Amaranth and
Yosys come with ``pip install 'fgmp[hw]'``; nothing outside this package needs them.
"""
