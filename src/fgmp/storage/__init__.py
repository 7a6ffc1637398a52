"""Files on disk: atomic writes, fingerprints, and partial results from which runs resume.

atomic       replace a file in one step
fingerprint  SHA-256 of models, token sequences and settings
resume       partial results of a run, stored under the fingerprint of its inputs
"""
