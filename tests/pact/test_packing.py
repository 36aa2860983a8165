"""Packing: every sequence exactly once, no tree over the budget, the least repeated prefix."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pact.packing import plan_trees
from pact_kernels.prefix_tree import PrefixTree

sequence = st.lists(st.integers(0, 2), min_size=1, max_size=6)
some_groups = st.lists(st.lists(sequence, max_size=6), min_size=1, max_size=4)


def arrays(groups):
    return [[np.array(ids) for ids in group] for group in groups]


def size(sequences):
    """Unique tokens: the number of different non-empty prefixes."""
    return len({tuple(ids[:n]) for ids in sequences for n in range(1, len(ids) + 1)})


@settings(max_examples=100, deadline=None)
@given(some_groups, st.integers(6, 30))
def test_trees_hold_every_sequence_once_within_the_budget(groups, budget):
    trees = plan_trees(arrays(groups), budget)
    members = [pair for tree in trees for pair in tree]
    assert sorted(members) == [(g, s) for g, group in enumerate(groups) for s in range(len(group))]
    for tree in trees:
        sequences = [groups[g][s] for g, s in tree]
        assert size(sequences) <= budget
        assert len(PrefixTree.from_sequences(sequences)) == size(sequences)


@settings(max_examples=50, deadline=None)
@given(st.lists(sequence, min_size=1, max_size=5), st.integers(6, 12))
def test_cuts_are_the_cheapest_contiguous_ones(sequences, budget):
    trees = plan_trees(arrays([sequences]), budget)
    found = sum(size([sequences[s] for _, s in tree]) for tree in trees)
    ordered = sorted(sequences)
    best = None
    for n_cuts in range(len(ordered)):
        for cuts in combinations(range(1, len(ordered)), n_cuts):
            runs = [ordered[a:b] for a, b in zip((0, *cuts), (*cuts, len(ordered)))]
            if all(size(run) <= budget for run in runs):
                best = min(filter(None, (best, sum(map(size, runs)))))
    # First-fit may put two parts back together, which can only share more.
    assert found <= best


@settings(max_examples=50, deadline=None)
@given(some_groups, st.integers(6, 30))
def test_dense_packing_counts_plain_lengths(groups, budget):
    trees = plan_trees(arrays(groups), budget, shared=False)
    assert sorted(pair for tree in trees for pair in tree) == [
        (g, s) for g, group in enumerate(groups) for s in range(len(group))
    ]
    assert all(sum(len(groups[g][s]) for g, s in tree) <= budget for tree in trees)


def test_a_group_that_fits_stays_whole():
    groups = arrays([[[0, 1, 2], [0, 1, 3]], [[5, 6], [5, 7], [5, 8]], [[9]]])
    trees = plan_trees(groups, 5)
    assert sorted(map(sorted, trees)) == [[(0, 0), (0, 1), (2, 0)], [(1, 0), (1, 1), (1, 2)]]


def test_the_cut_falls_where_little_is_shared():
    # Two branches below a root of one token; a cut inside either would repeat five.
    left = [[0, *[1] * 4, 2, k] for k in range(3)]
    right = [[0, *[3] * 4, 4, k] for k in range(3)]
    trees = plan_trees(arrays([left + right]), 9)
    assert sorted(map(sorted, trees)) == [[(0, 0), (0, 1), (0, 2)], [(0, 3), (0, 4), (0, 5)]]


def test_without_a_budget_there_is_one_tree():
    assert plan_trees(arrays([[[1], [2]], [], [[3]]])) == [[(0, 0), (0, 1), (2, 0)]]
    assert plan_trees([[]]) == []


def test_a_sequence_over_the_budget_is_an_error():
    with pytest.raises(ValueError, match=r"token_budget=2 is below the longest sequence of group 1 \(3 tokens\)"):
        plan_trees(arrays([[[1]], [[1, 2, 3]]]), 2)
