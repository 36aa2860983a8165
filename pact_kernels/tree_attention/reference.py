"""The specification of tree attention: softmax over a dense [L, L] mask, differentiable, any float dtype. For tests."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(subtree_end: Tensor) -> Tensor:
    """Boolean [L, L]: query (row) ``q`` sees key (column) ``k`` if and only if ``k <= q < subtree_end[k]``."""
    position = torch.arange(subtree_end.numel(), device=subtree_end.device)
    return (position <= position[:, None]) & (position[:, None] < subtree_end)


def tree_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float | None = None
) -> Tensor:
    """``softmax(scale q k^T + log visible) v`` for each head in the input's dtype; shapes as ``tree_attention``."""
    n_groups = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k_LHD, v_LHD = k.repeat_interleave(n_groups, dim=1), v.repeat_interleave(n_groups, dim=1)
    score_HLL = scale * torch.einsum("qhd,khd->hqk", q, k_LHD)
    score_HLL = score_HLL.masked_fill(~visible(subtree_end), float("-inf"))
    return torch.einsum("hqk,khd->qhd", score_HLL.softmax(dim=-1), v_LHD)
