"""The flash backend of tree attention: a cascade of dense variable-length calls merged by log-sum-exp. It computes no
attention itself (see providers.py), and the number of calls grows with how often a path branches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pact_kernels.tree_attention.operators import differentiable, empty_like, lse_like
from pact_kernels.tree_attention.plans import Plans
from pact_kernels.tree_attention.providers import Rows, Sequences, groups_of, provider_for, put, rows_of, take


@dataclass(frozen=True)
class Piece:
    """One variable-length call: ``queries`` attend to ``keys``, sequence by sequence. No row comes twice."""

    queries: Rows
    keys: Rows
    sequences: Sequences
    causal: bool


def cascade(subtree_end: Tensor) -> list[Piece]:
    """The pieces that together hold every visible pair once.

    With the tree cut into its unbranching runs (segments), a token sees its own segment causally and all of each
    segment above. First piece: each segment by itself. Piece ``j + 1``: each segment with ``j`` segments above it and
    some below is attended to by all tokens below it. The subtrees of one level's segments are disjoint ranges.
    """
    end, device = subtree_end.cpu().numpy().astype(np.int64), subtree_end.device
    start, stop, last, level = segments(end)
    if not start.size:
        return []
    whole, size = slice(0, end.size), stop - start
    pieces = [Piece(whole, whole, Sequences.of(size, size, device), causal=True)]
    inner = np.flatnonzero(last > stop)
    for group in groups_of(level[inner]):
        above = inner[group]
        queries, keys = (rows_of(b[above], e[above], device) for b, e in ((stop, last), (start, stop)))
        lengths = Sequences.of((last - stop)[above], size[above], device)
        pieces.append(Piece(queries, keys, lengths, causal=False))
    return pieces


def segments(end: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Maximal unbranching runs ``[start, stop)``, the end of the subtree of each, and how many lie above it.

    The token behind ``i`` is the only child of ``i`` if and only if both subtrees have the same end: another child
    would come between the two ends, and where ``i`` has no child its end is ``i + 1``, which no later token has.
    """
    start = np.flatnonzero(np.diff(end, prepend=-1))
    stop, last = np.append(start[1:], end.size)[: start.size], end[start]
    # A segment lies above those from the next one to the last in its subtree: +1 where they begin, -1 behind them.
    change = np.ones(start.size + 1, np.int64)
    change[0] = 0
    change -= np.bincount(np.searchsorted(start, last), minlength=change.size)
    return start, stop, last, change.cumsum()[: start.size]


PLANS = Plans(cascade)


def forward(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, merged in at least float32 and rounded once more than the provider does."""
    q, scale = positive_scale(q, scale)
    provider, pieces = provider_for(q), PLANS.of(subtree_end)
    out, lse = empty_like(q), lse_like(q)
    for piece in pieces:
        rows = ((q, piece.queries), (k, piece.keys), (v, piece.keys))
        part, part_lse = provider.forward(*(take(*x) for x in rows), piece.sequences, piece.causal, scale)
        if piece is pieces[0]:  # holds every query: the others add to it
            out, lse = part.to(lse.dtype).contiguous(), part_lse.contiguous()
        else:
            merge(out, lse, piece.queries, part, part_lse)
    return out.to(q.dtype), lse


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Queries and a scale above 0 with the same scores: the providers mask with -inf before they multiply by it."""
    if scale > 0:
        return q, scale
    return (q.neg(), -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


def merge(out_LHD: Tensor, lse_HL: Tensor, rows: Rows, part_NHD: Tensor, part_lse_HN: Tensor) -> None:
    """Take more keys into ``rows`` of an output and its log-sum-exp, in place.

    out = (e^lse out + e^lse' out') / (e^lse + e^lse') is the mean of both with weight sigmoid(lse' - lse) on the
    second: convex whatever the rounding of the log-sum-exps, which for large scores is coarse.
    """
    old_NHD, old_lse_HN = take(out_LHD, rows), take(lse_HL, rows, dim=1)
    weight_NH1 = (part_lse_HN - old_lse_HN).sigmoid().T[..., None]
    put(out_LHD, rows, old_NHD.lerp(part_NHD.to(out_LHD.dtype), weight_NH1))
    put(lse_HL, rows, torch.logaddexp(old_lse_HN, part_lse_HN), dim=1)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, subtree_end: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v: the sum of those of the pieces.

    With the merged ``out`` and ``lse`` a piece yields exactly its share: P = exp(S - lse) and
    dS = P (dO V^T - rowsum(dO O)) are those of the whole row, for the keys of the piece. The sum is in at least float32
    and rounded once; the GPU providers round each piece's share to 16 bits before.
    """
    if scale <= 0:
        same_q, one = positive_scale(q, scale)
        dq, dk, dv = backward(dout, same_q, k, v, out, lse, subtree_end, one)
        return (dq.neg_(), dk, dv) if scale < 0 else (dq.zero_(), dk.zero_(), dv)
    provider, pieces = provider_for(q), PLANS.of(subtree_end)
    totals = [empty_like(x) for x in (q, k, v)]
    for piece in pieces:
        queries, keys = piece.queries, piece.keys
        rows = ((dout, queries), (q, queries), (k, keys), (v, keys), (out, queries), (lse, queries, 1))
        parts = provider.backward(*(take(*x) for x in rows), piece.sequences, piece.causal, scale)
        if piece is pieces[0]:  # holds every row
            totals = [part.to(lse.dtype).contiguous() for part in parts]
            continue
        for total, where, part in zip(totals, (queries, keys, keys), parts):
            put(total, where, take(total, where) + part)
        del part, parts  # before the next call
    dq, dk, dv = (total.to(q.dtype) for total in totals)
    return dq, dk, dv


tree_flash = differentiable("tree_flash", forward, backward)
