"""The demonstration that ships with the package: a small model, its texts, and the whole job.

text        docstrings to calibrate on, the language reference to evaluate on
model/      a 3.7M-parameter Llama; MODEL_CARD.md says what it is, training.json how it was made
quickstart  quantize, compare, inspect and report
"""
