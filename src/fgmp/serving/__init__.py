"""Serving checkpoints with vLLM: a plugin that vLLM discovers, and ``fgmp serve``.

plugin      what vLLM's entry point calls
methods     the classes that vLLM's model layers call
linears     which linears of a checkpoint make up a layer
source      checks the checkpoint's folder, and reads it layer by layer
shards      divides and joins packed weights
experts     the operator for a mixture of experts
command     checks a checkpoint and starts vLLM's server

Only the first two know vLLM.
"""
