"""Checkpoints in the formats of other programs; docs/export.md has their definition.

``rounding`` brings a packed weight to one format, ``plan`` decides which and refuses what a format
cannot represent, ``layouts`` has names, bytes and configurations, ``export`` writes the folder.
"""
