"""Prefix-tree attention and LM-head losses for co-training. Knows nothing of transformers."""
