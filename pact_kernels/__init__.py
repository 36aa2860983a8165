"""Prefix-tree attention and LM-head losses for co-training. Knows nothing of transformers.

The public names below are imported on first use, so that importing the package costs nothing but torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pact_kernels.cotrain_loss.api import cotrain_loss as cotrain_loss
    from pact_kernels.cotrain_loss.api import linear_cotrain_loss as linear_cotrain_loss
    from pact_kernels.linear_logprob.api import linear_logprob as linear_logprob
    from pact_kernels.prefix_tree import PrefixTree as PrefixTree
    from pact_kernels.terms import CoTrainResult as CoTrainResult
    from pact_kernels.terms import LogProbs as LogProbs
    from pact_kernels.terms import TokenTerms as TokenTerms
    from pact_kernels.tree_attention.api import tree_attention as tree_attention

_HOME = {
    "CoTrainResult": "terms",
    "LogProbs": "terms",
    "PrefixTree": "prefix_tree",
    "TokenTerms": "terms",
    "cotrain_loss": "cotrain_loss.api",
    "linear_cotrain_loss": "cotrain_loss.api",
    "linear_logprob": "linear_logprob.api",
    "tree_attention": "tree_attention.api",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
