"""One HTML page on one or several checkpoints, and their model card.

``gather`` reads a checkpoint into a typed record, ``page`` renders records with the templates in
``page/``, and ``card`` writes the README.md of a checkpoint. Nothing here runs a model: comparisons
and passages of text are computed elsewhere and passed in.
"""
