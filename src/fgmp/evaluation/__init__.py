"""How good a model is: perplexity, KL divergence from the original, and what a gap recovers."""
