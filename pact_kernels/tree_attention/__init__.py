"""Attention of every token of a prefix tree to its own path."""

from pact_kernels.tree_attention.api import tree_attention

__all__ = ["tree_attention"]
