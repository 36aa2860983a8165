"""Training progress -> weights of the terms, as pure functions. Knows nothing of components or models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

REASONING_ANNEALS = ("segment", "token", "linear", "none", "off")


def check_progress(progress: float) -> float:
    """`progress` as a float; ValueError unless it lies in [0, 1] (0 = first optimiser step, 1 = the last)."""
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress={progress!r} must lie in [0, 1]: steps done / steps in the whole run")
    return float(progress)


def linear(start: float, end: float, progress: float) -> float:
    """Straight line from `start` at progress 0 to `end` at progress 1 (scale annealing of tool calls).

    >>> round(linear(0.8, 0.2, 0.5), 12)
    0.5
    """
    return (1.0 - progress) * start + progress * end


def warmup_cosine(progress: float, warmup: float, decay: float, peak: float, valley: float) -> float:
    """CHORD's mu (arXiv 2508.11408; ``mu_schedule_function`` of its release): 0 rises linearly to ``peak`` over the
    share ``warmup`` of training, then falls to ``valley`` along half a cosine over the share ``decay``, and stays.

    decay = 0: ``valley`` at once after the warm-up.

    >>> [round(warmup_cosine(s, 0.25, 0.5, 0.9, 0.1), 3) for s in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)]
    [0.0, 0.45, 0.9, 0.5, 0.1, 0.1]
    """
    if progress < warmup:
        return peak * progress / warmup
    if progress >= warmup + decay:
        return valley
    return valley + (peak - valley) * 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / decay))


def supervised_segments(n: int, progress: float) -> int:
    """How many of a reasoning block's `n` segments (or tokens) are still supervised: ceil((1 - s) n - 1e-9).

    All at 0, none at 1. The 1e-9 keeps rounding from adding one more: (1 - 0.7) * 10 is 3.0000000000000004 in floating
    point.

    >>> [supervised_segments(3, progress) for progress in (0.0, 0.25, 0.5, 1.0)]
    [3, 3, 2, 0]
    """
    return max(0, math.ceil((1.0 - progress) * n - 1e-9))


def segment_weights(segment: Sequence[int] | NDArray[np.int64], progress: float) -> NDArray[np.float64]:
    """Segment annealing (DESIGN section 1): 1.0 on the supervised prefix of each reasoning block, 0.0 elsewhere.

    `segment` [n]: index of each token's segment within its reasoning block, -1 outside. A block is a run of
    non-negative entries; an index that falls starts the next block.

    >>> segment_weights([0, 0, 1, 1, 2, -1, 0, 1], progress=0.5)
    array([1., 1., 1., 1., 0., 0., 1., 0.])
    """
    segment_n = np.asarray(segment, dtype=np.int64)
    return _prefix_weights(segment_n, _block_starts(segment_n), progress)


def token_weights(segment: Sequence[int] | NDArray[np.int64], progress: float) -> NDArray[np.float64]:
    """Token annealing: 1.0 on the first ceil((1 - s) n - 1e-9) tokens of each reasoning block of n, 0.0 elsewhere.

    Blocks are those of `segment_weights`; the prefix may end within a segment.

    >>> token_weights([0, 0, 1, 1, 2, -1, 0, 1], progress=0.5)
    array([1., 1., 1., 0., 0., 0., 1., 0.])
    """
    segment_n = np.asarray(segment, dtype=np.int64)
    starts_n = _block_starts(segment_n)
    token_n = np.arange(len(segment_n))
    first_n = np.maximum.accumulate(np.where(starts_n, token_n, 0))  # the first token of each token's block
    return _prefix_weights(np.where(segment_n >= 0, token_n - first_n, -1), starts_n, progress)


def _block_starts(segment_n: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where a reasoning block begins [n]: at the first of non-negative entries, and where the index falls."""
    before_n = np.concatenate(([-1], segment_n[:-1]))
    return (segment_n >= 0) & ((before_n < 0) | (segment_n < before_n))


def _prefix_weights(place_n: NDArray[np.int64], starts_n: NDArray[np.bool_], progress: float) -> NDArray[np.float64]:
    """1.0 on the supervised prefix of each block, `place_n` counting through it (-1 outside); 0.0 elsewhere."""
    inside_n = place_n >= 0
    weight_n = np.zeros(len(place_n))
    if not inside_n.any():
        return weight_n
    inner, starts = place_n[inside_n], starts_n[inside_n]
    places_in_block = np.maximum.reduceat(inner, np.flatnonzero(starts)) + 1
    kept = np.array([supervised_segments(int(n), progress) for n in places_in_block])
    weight_n[inside_n] = inner < kept[np.cumsum(starts) - 1]
    return weight_n


def reasoning_weights(
    segment: Sequence[int] | NDArray[np.int64], progress: float, anneal: str = "segment"
) -> NDArray[np.float64]:
    """Weights [n] of reasoning tokens (segment >= 0) and 0.0 elsewhere.

    anneal: "segment" (the paper: a shrinking prefix of whole segments), "token" (a prefix that shrinks token by token),
    "linear" (every reasoning token at 1 - s), "none" (every reasoning token at 1), "off" (every reasoning token at 0).
    """
    if anneal not in REASONING_ANNEALS:
        raise ValueError(f"reasoning_anneal={anneal!r} is not one of {', '.join(REASONING_ANNEALS)}")
    if anneal == "segment":
        return segment_weights(segment, progress)
    if anneal == "token":
        return token_weights(segment, progress)
    scale = {"linear": linear(1.0, 0.0, progress), "none": 1.0, "off": 0.0}[anneal]
    return np.where(np.asarray(segment, dtype=np.int64) >= 0, scale, 0.0)
