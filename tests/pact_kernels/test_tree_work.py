"""The work lists of the tree kernels against the dense mask, tile by tile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pact_kernels.prefix_tree import PrefixTree
from pact_kernels.tree_attention import work
from pact_kernels.tree_attention.reference import visible
from pact_kernels.tree_attention.work import KEY_LISTS, QUERY_PIECES

Tiles = dict[tuple[int, int], bool]


def expected(subtree_end: torch.Tensor, block_q: int, block_k: int) -> Tiles:
    """{(query tile, key tile): partial} of the dense mask; a tile that reaches past the end is partial."""
    mask, length = visible(subtree_end), subtree_end.numel()
    found = {}
    for i in range(-(-length // block_q)):
        for j in range(-(-length // block_k)):
            tile = mask[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
            if tile.any():
                found[i, j] = not bool(tile.all()) or max((i + 1) * block_q, (j + 1) * block_k) > length
    return found


def listed(rows: list[tuple[int, int, int, int]], index: torch.Tensor, turned: bool) -> Tiles:
    """Rows of (owner, begin, middle, stop)."""
    found = {}
    for owner, begin, middle, stop in rows:
        for at in range(begin, stop):
            other = int(index[at])
            pair = (other, owner) if turned else (owner, other)
            assert pair not in found
            found[pair] = at >= middle
    return found


SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=12)
BLOCKS = st.sampled_from([(4, 4), (8, 4), (4, 8), (16, 16)])


@given(SEQUENCES, BLOCKS)
def test_keys_of_query_tiles(sequences, blocks) -> None:
    end = PrefixTree.from_sequences(sequences).subtree_end
    lists = KEY_LISTS.of(end, *blocks)
    start = lists.start.tolist()
    rows = list(zip(range(len(start)), start, lists.middle.tolist(), start[1:]))
    assert listed(rows, lists.items, False) == expected(end, *blocks)


@given(SEQUENCES, BLOCKS, st.integers(1, 5), st.sampled_from([1, 4, 1000]))
def test_queries_of_key_tiles_in_pieces(sequences, blocks, least, pieces) -> None:
    end = PrefixTree.from_sequences(sequences).subtree_end
    made, wanted = QUERY_PIECES.of(end, *blocks, least, pieces), expected(end, *blocks)
    rows = list(zip(*(column.tolist() for column in made[:4])))
    assert listed(rows, made.items, True) == wanted
    longest = max(stop - begin for _, begin, _, stop in rows)
    assert longest <= max(least, -(-len(wanted) // pieces))

    # A tile of several pieces has its own slots, in order; the others have none.
    owners = made.tile.tolist()
    assert set(owners) == set(range(-(-len(end) // blocks[1])))
    several = [tile for tile in sorted(set(owners)) if owners.count(tile) > 1]
    assert made.split.tolist() == several
    slots = {tile: list(range(*made.first[i : i + 2].tolist())) for i, tile in enumerate(several)}
    assert made.n_slots == sum(map(len, slots.values()))
    for tile in set(owners):
        mine = [slot for owner, slot in zip(owners, made.slot.tolist()) if owner == tile]
        assert mine == slots.get(tile, [-1])


@pytest.mark.parametrize("pairs", [1, 7])
def test_pair_search_in_pieces(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    end = PrefixTree.from_sequences([[1] * 30 + [i] * 20 for i in range(2, 6)]).subtree_end
    whole = KEY_LISTS.of(end.clone(), 8, 8)
    monkeypatch.setattr(work, "PAIRS", pairs)
    assert all(torch.equal(x, y) for x, y in zip(whole, KEY_LISTS.of(end, 8, 8)))
