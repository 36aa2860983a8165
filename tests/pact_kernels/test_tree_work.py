"""The work lists of the tree kernels against the dense mask, tile by tile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pact_kernels.prefix_tree import PrefixTree
from pact_kernels.tree_attention import work
from pact_kernels.tree_attention.reference import visible
from pact_kernels.tree_attention.work import work_of


def expected(subtree_end: torch.Tensor, block_q: int, block_k: int) -> dict[tuple[int, int], bool]:
    """{(query tile, key tile): partial} of the dense mask."""
    mask, length = visible(subtree_end), subtree_end.numel()
    found = {}
    for i in range(-(-length // block_q)):
        for j in range(-(-length // block_k)):
            tile = mask[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
            if tile.any():
                found[i, j] = not bool(tile.all()) or (j + 1) * block_k > length
    return found


def listed(lists: work.Lists, turned: bool) -> dict[tuple[int, int], bool]:
    found = {}
    for t in range(len(lists.middle)):
        start, middle, end = int(lists.start[t]), int(lists.middle[t]), int(lists.start[t + 1])
        for at in range(start, end):
            other = int(lists.index[at])
            pair = (other, t) if turned else (t, other)
            assert pair not in found
            found[pair] = at >= middle
    return found


SEQUENCE = st.lists(st.integers(0, 2), min_size=1, max_size=40)


@given(st.lists(SEQUENCE, min_size=1, max_size=12), st.sampled_from([(4, 4), (8, 4), (4, 8), (16, 16)]))
def test_lists_are_the_tiles_of_the_mask(sequences, blocks) -> None:
    end = PrefixTree.from_sequences(sequences).subtree_end
    made = work_of(end, *blocks)
    wanted = expected(end, *blocks)
    assert listed(made.keys, False) == wanted
    assert listed(made.queries, True) == wanted


@pytest.mark.parametrize("pairs", [1, 7])
def test_pieces_join(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    end = PrefixTree.from_sequences([[1] * 30 + [i] * 20 for i in range(2, 6)]).subtree_end
    whole = work_of(end.clone(), 8, 8)
    monkeypatch.setattr(work, "PAIRS", pairs)
    for a, b in zip(whole, work_of(end, 8, 8)):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
