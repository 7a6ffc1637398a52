"""The accelerator: what computes an FGMP linear in silicon (docs/hardware.md).

datapath    parameters of a lane; computes in Python and creates the hardware
array       parameters of many, with what feeds them
rtl         the hardware, in Amaranth
image       a linear in the accelerator's memory
simulate    Amaranth's simulator, made faster
verilator   bulk simulation, where Verilator is installed
run         a linear through the accelerator, in either
verify      a checkpoint's layers against the reference, bit for bit
export      Verilog, ports and the memory map as files
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
