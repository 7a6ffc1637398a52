"""Evaluation of models and checkpoints: perplexity, KL divergence, gap recovery, contents."""
