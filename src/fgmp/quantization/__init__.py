"""THE QUANTIZING RUN: from a model and calibration text to a packed model.

task        the arguments of a run, and the records that its steps pass on
memory      predicted and measured peak memory
scoring     scores of all weight and activation blocks
budget      from a budget (bits, bytes, energy, perplexity) to fractions of FP4 blocks
sequential  sequential error compensation (GPTQ)
candidates  packed variants of the model, and the choice among them
held_out    the selection metric: distance from the original on held-out text
tune        training of the unquantized parameters
uniform     all-FP8 and all-NVFP4 baselines
pipeline    the quantization pipeline: prepare, run
"""
