"""Prefix-tree attention and LM-head losses for co-training. Knows nothing of transformers."""

# An operation and its folder share a name. Importing the functions here, all of them, makes sure that
# `pact_kernels.<name>` is always the function, whichever submodule is imported first.
from pact_kernels.cotrain_loss.api import cotrain_loss, linear_cotrain_loss
from pact_kernels.linear_logprob.api import linear_logprob
from pact_kernels.prefix_tree import PrefixTree
from pact_kernels.terms import CoTrainResult, LogProbs, TokenTerms
from pact_kernels.tree_attention.api import tree_attention

__all__ = [
    "CoTrainResult",
    "LogProbs",
    "PrefixTree",
    "TokenTerms",
    "cotrain_loss",
    "linear_cotrain_loss",
    "linear_logprob",
    "tree_attention",
]
