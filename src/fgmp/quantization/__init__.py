"""THE QUANTIZING RUN: from a model and calibration text to a packed model.

task        what one run works on, and the records its steps hand on
memory      predicted and measured peak memory
scoring     scores of all weight and activation blocks
budget      from a budget (bits, bytes, energy, perplexity) to fractions of FP4 blocks
sequential  error compensation in order of execution
candidates  packed variants of the model, and the choice among them
held_out    the selection metric: distance from the original on held-out text
tune        training of what is not quantized
uniform     all-FP8 and all-NVFP4 baselines
pipeline    the run from end to end
"""
