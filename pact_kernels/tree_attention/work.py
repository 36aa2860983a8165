"""Which tiles of keys a tile of queries reads, and the reverse: lists from the tree's intervals. No [L, L] mask.

A pair (q, k) is visible if and only if ``k <= q < end[k]``. Of queries [a, b) and keys [c, d), some pair is visible if and
only if some ``k < b`` has ``end[k] > a``, and all are if and only if ``d - 1 <= a`` and every ``end[k] >= b``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

PAIRS = 2**24  # tile pairs looked at in one piece


class Lists(NamedTuple):
    """For each tile of one kind the tiles of the other that it meets: ``index[start[t] : middle[t]]`` are visible as a
    whole, ``index[middle[t] : start[t + 1]]`` in part. int32, ascending within each part."""

    start: Tensor
    middle: Tensor
    index: Tensor


class Work(NamedTuple):
    """``keys`` of each tile of queries, ``queries`` of each tile of keys."""

    keys: Lists
    queries: Lists


def _pairs(subtree_end: Tensor, block_q: int, block_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(query tile, key tile, whether partial) of every pair of tiles with a visible pair of tokens, int64 and bool."""
    length, device = subtree_end.numel(), subtree_end.device
    n_q, n_k = -(-length // block_q), -(-length // block_k)
    missing = n_k * block_k - length
    # A padded key ends at 0, so nobody sees it; for "every end" it must not count.
    padded = torch.nn.functional.pad(subtree_end, (0, missing))
    last_K = padded.view(n_k, block_k).amax(1)
    first_K = torch.nn.functional.pad(subtree_end, (0, missing), value=length).view(n_k, block_k).amin(1)
    key_begin_K = torch.arange(n_k, device=device) * block_k
    found = []
    for begin in range(0, n_q, max(1, PAIRS // n_k)):
        tile_Q = torch.arange(begin, min(begin + max(1, PAIRS // n_k), n_q), device=device)
        a_Q1, b_Q1 = (tile_Q * block_q)[:, None], ((tile_Q + 1) * block_q).clamp(max=length)[:, None]
        # Of the keys in the tile that holds the diagonal some come after the queries; those see themselves at least.
        meets_QK = (key_begin_K < b_Q1) & (last_K > a_Q1)
        whole_QK = (key_begin_K + block_k - 1 <= a_Q1) & (first_K >= b_Q1)
        q, k = meets_QK.nonzero(as_tuple=True)
        found.append((q + begin, k, ~whole_QK[q, k]))
    q, k, partial = (torch.cat(column) for column in zip(*found))
    return q, k, partial


def _lists(owner: Tensor, other: Tensor, partial: Tensor, n_owners: int) -> Lists:
    """Group ``other`` by ``owner``, whole tiles before partial ones, each ascending."""
    key = (owner * 2 + partial) * (int(other.max()) + 1) + other
    order = key.argsort()
    counts = torch.bincount(owner * 2 + partial, minlength=2 * n_owners).cumsum(0)
    bounds = torch.nn.functional.pad(counts, (1, 0)).int()
    return Lists(bounds[::2].contiguous(), bounds[1::2].contiguous(), other[order].int())


_work: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def work_of(subtree_end: Tensor, block_q: int, block_k: int) -> Work:
    """The lists of a tree, made on first use for each pair of block sizes and kept as long as ``subtree_end`` lives."""
    made = _work.setdefault(subtree_end, {})
    if (block_q, block_k) not in made:
        q, k, partial = _pairs(subtree_end, block_q, block_k)
        length = subtree_end.numel()
        keys = _lists(q, k, partial, -(-length // block_q))
        made[block_q, block_k] = Work(keys, _lists(k, q, partial, -(-length // block_k)))
    return made[block_q, block_k]
