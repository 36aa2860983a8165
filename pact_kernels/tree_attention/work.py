"""Which tiles of keys a tile of queries reads, and the reverse: lists from the tree's intervals. No [L, L] mask.

A pair (q, k) is visible if and only if ``k <= q < end[k]``. Of queries [a, b) and keys [c, d), some pair is visible if
and only if some ``k < b`` has ``end[k] > a``, and all are if and only if ``d - 1 <= a`` and every ``end[k] >= b``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pact_kernels.tree_attention.plans import Plans

PAIRS = 2**24  # tile pairs looked at in one piece


class Lists(NamedTuple):
    """For each tile of one kind the tiles of the other that it meets: ``items[start[t] : middle[t]]`` are visible as a
    whole, ``items[middle[t] : start[t + 1]]`` in part. int32, ascending within each part."""

    start: Tensor
    middle: Tensor
    items: Tensor


class Pieces(NamedTuple):
    """The lists of key tiles cut into pieces that run side by side: the tiles of a prompt have every query below them.

    Piece p adds up ``items[begin[p] : middle[p]]`` (whole) and ``items[middle[p] : stop[p]]`` (in part) for key tile
    ``tile[p]``. Where a tile has one piece ``slot[p]`` is -1; else the sums go to that slot, and tile ``split[s]`` is
    the sum of the slots ``first[s] : first[s + 1]``. int32.
    """

    tile: Tensor
    begin: Tensor
    middle: Tensor
    stop: Tensor
    slot: Tensor
    items: Tensor
    split: Tensor
    first: Tensor
    n_slots: int


def _pairs(subtree_end: Tensor, block_q: int, block_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(query tile, key tile, whether partial) of every pair of tiles with a visible pair of tokens, int64 and bool.

    A tile that reaches past the end is never visible as a whole, so whole tiles need no bounds.
    """
    length, device = subtree_end.numel(), subtree_end.device
    n_q, n_k = -(-length // block_q), -(-length // block_k)
    # A padded key ends at 0, so nobody sees it, and its tile is not visible as a whole.
    padded = pad(subtree_end, (0, n_k * block_k - length)).view(n_k, block_k)
    last_K, first_K = padded.amax(1), padded.amin(1)
    key_begin_K = torch.arange(n_k, device=device) * block_k
    found = []
    for begin in range(0, n_q, max(1, PAIRS // n_k)):
        tile_Q = torch.arange(begin, min(begin + max(1, PAIRS // n_k), n_q), device=device)
        a_Q1, b_Q1 = (tile_Q * block_q)[:, None], ((tile_Q + 1) * block_q)[:, None]
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
    bounds = pad(counts, (1, 0)).int()
    return Lists(bounds[::2].contiguous(), bounds[1::2].contiguous(), other[order].int())


def _key_lists(subtree_end: Tensor, block_q: int, block_k: int) -> Lists:
    q, k, partial = _pairs(subtree_end, block_q, block_k)
    return _lists(q, k, partial, -(-subtree_end.numel() // block_q))


def _query_pieces(subtree_end: Tensor, block_q: int, block_k: int, least: int, pieces: int) -> Pieces:
    q, k, partial = _pairs(subtree_end, block_q, block_k)
    lists = _lists(k, q, partial, -(-subtree_end.numel() // block_k))
    size = max(least, -(-q.numel() // pieces))
    start, end = lists.start[:-1].long(), lists.start[1:].long()
    of_tile = -(-(end - start) // size)  # pieces of each tile, at least 1: a key sees itself
    tile = torch.repeat_interleave(of_tile)
    at = torch.arange(tile.numel(), device=tile.device) - (of_tile.cumsum(0) - of_tile)[tile]
    begin = start[tile] + at * size
    stop = torch.minimum(begin + size, end[tile])
    middle = lists.middle.long()[tile].clamp(begin, stop)
    in_slot = of_tile[tile] > 1
    slot = torch.where(in_slot, in_slot.cumsum(0) - 1, -1)
    split = (of_tile > 1).nonzero()[:, 0]
    first = pad(of_tile[split].cumsum(0), (1, 0))
    tile, begin, middle, stop, slot, first = (x.int() for x in (tile, begin, middle, stop, slot, first))
    return Pieces(tile, begin, middle, stop, slot, lists.items, split.int(), first, int(in_slot.sum()))


# Of (subtree_end, block_q, block_k): the key tiles of each query tile.
KEY_LISTS = Plans(_key_lists)
# Of (subtree_end, block_q, block_k, least, pieces): the query tiles of each key tile, cut so that a piece has at most
# ``least`` of them, or more where the whole tree would have over about ``pieces`` pieces (each split costs a slot).
QUERY_PIECES = Plans(_query_pieces)
