"""Which sequences share a forward pass: prompt groups into trees under a token budget. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pact_kernels.prefix_tree import PrefixTree

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class _Part:
    """Sequences of one group that stay together, and the tokens that computing them takes."""

    group: int
    members: list[int]
    tokens: int


def plan_trees(
    groups: Sequence[Sequence[Ids]], budget: int | None = None, *, shared: bool = True
) -> list[list[tuple[int, int]]]:
    """Assign every sequence to a tree: one list of (group, sequence) pairs a tree.

    A group that fits stays whole; one over the budget is cut where its parts repeat the fewest prefix tokens. Parts are
    then packed first-fit, largest first, counting each part's own unique tokens (prefixes shared BETWEEN groups make a
    tree smaller than planned, never larger). ``budget`` None: one tree. ``shared=False``: no prefix is shared (dense
    passes), tokens are plain lengths.

    Raises:
        ValueError: a single sequence is longer than the budget.
    """
    if budget is None:
        everything = [(g, s) for g, sequences in enumerate(groups) for s in range(len(sequences))]
        return [everything] if everything else []
    parts = [part for g, sequences in enumerate(groups) for part in _parts(g, sequences, budget, shared)]
    trees: list[list[tuple[int, int]]] = []
    room: list[int] = []
    for part in sorted(parts, key=lambda part: -part.tokens):
        slot = next((i for i, free in enumerate(room) if free >= part.tokens), None)
        if slot is None:
            slot = len(trees)
            trees.append([])
            room.append(budget)
        trees[slot] += [(part.group, member) for member in part.members]
        room[slot] -= part.tokens
    return trees


def _parts(group: int, sequences: Sequence[Ids], budget: int, shared: bool) -> list[_Part]:
    """The group whole, or cut into contiguous runs of its depth-first order."""
    if not sequences:
        return []
    longest = max(len(ids) for ids in sequences)
    if longest > budget:
        raise ValueError(
            f"token_budget={budget} is below the longest sequence of group {group} ({longest} tokens): "
            "raise token_budget or shorten prompt, trace or rollouts"
        )
    if shared:
        order, prefix = _depth_first(sequences)
    else:
        order, prefix = list(range(len(sequences))), [0] * len(sequences)
    length = [len(sequences[s]) for s in order]
    return [
        _Part(group, sorted(order[start:stop]), tokens)
        for start, stop, tokens in _cheapest_cuts(length, prefix, budget)
    ]


def _depth_first(sequences: Sequence[Ids]) -> tuple[list[int], list[int]]:
    """Depth-first order of the sequences, and the prefix each shares with the one before it (0 for the first)."""
    index = PrefixTree.from_sequences(sequences).index
    order = sorted(range(len(index)), key=lambda s: int(index[s][-1]))
    prefix = [0]
    for before, s in pairwise(order):
        common = min(len(index[before]), len(index[s]))
        prefix.append(int((index[before][:common] == index[s][:common]).sum()))
    return order, prefix


def _cheapest_cuts(length: list[int], prefix: list[int], budget: int) -> list[tuple[int, int, int]]:
    """Runs (start, stop, tokens), each within the budget, of least total tokens; of those, the fewest runs.

    In depth-first order the run start..stop takes length[start] + sum over the rest of (length - prefix) tokens, so a
    cut before i costs prefix[i]. Dynamic programming over the last cut.
    """
    best: list[tuple[int, int]] = [(0, 0)]  # (tokens, runs) of the first i sequences
    cut = [0]
    for stop in range(1, len(length) + 1):
        choices = []
        tail = 0  # tokens that sequences start+1 .. stop-1 add below their predecessor
        for start in range(stop - 1, -1, -1):
            tokens = length[start] + tail
            if tokens > budget:
                break
            choices.append((best[start][0] + tokens, best[start][1] + 1, start))
            tail += length[start] - prefix[start]
        total, runs, start = min(choices)
        best.append((total, runs))
        cut.append(start)
    runs_backwards = []
    stop = len(length)
    while stop:
        start = cut[stop]
        runs_backwards.append((start, stop, best[stop][0] - best[start][0]))
        stop = start
    return runs_backwards[::-1]
