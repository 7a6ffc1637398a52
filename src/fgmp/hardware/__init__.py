"""The accelerator: hardware that computes an FGMP linear (docs/hardware.md).

===============  ==================================================================
datapath         parameters of a lane; computes in Python and creates the hardware
array            parameters of an array of lanes and of what feeds them
rtl              the hardware, in Amaranth
image            a linear in the accelerator's memory
simulate         Amaranth's simulator, made faster
verilator        bulk simulation, where Verilator is installed
run              a linear through the accelerator, in either simulator
verify           a checkpoint's layers against the reference, bit for bit
export           Verilog, ports and the memory map as files
yosys            the only module that runs Yosys

cells            standard cells, and a library of them by logical effort
liberty          cell libraries from files
expression       functions of cells, parsed and evaluated
netlist          gates and registers of a mapped design
synthesis        RTL to netlists
timing           loads, slews, delays
gates            gate-level simulation: toggles, without delays and with glitches
stimulus         a model's operands at the ports
power            toggles to femtojoules
silicon          synthesis, timing and energy of one component
inference        energies of units to joules per prefill or decode of a model
relative_energy  energy relative to all FP8, from a table of measured lanes
plot             figures
===============  ==================================================================

The arithmetic is that of ``fgmp.formats``. Decoded values are integers, sums of products are
exact, and register widths follow from bounds that are computed from the format records. Amaranth
and Yosys come with ``pip install 'fgmp[hw]'``; nothing outside this package needs them.
"""
