"""Demonstration that ships with the package: a small model and texts.

text        docstrings to calibrate on, the language reference to evaluate on
model/      a 3.7M-parameter Llama, described in MODEL_CARD.md; training.json: how it was trained

``fgmp quickstart`` (``app.quickstart``) quantizes, compares, inspects and reports with them.
"""
