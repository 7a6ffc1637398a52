"""THE APPLICATION: the `fgmp` command, from names of models and texts to printed results.

console     how every command prints
records     typed results of the commands, with their labels and JSON keys
commands    what the commands do
energy      area, and energy of serving a model on the accelerator
report      the one-page HTML report
quickstart  the demonstration from end to end
cli, hw     argument parsing
"""
