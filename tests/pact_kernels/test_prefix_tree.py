from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import DictTrie

from pact_kernels import PrefixTree

token = st.integers(0, 3) | st.sampled_from([255, 256, 2**31 - 1])
sequence_lists = st.lists(st.lists(token, min_size=1, max_size=8), min_size=1, max_size=12)


def assert_segments(tree: PrefixTree) -> None:
    """Segments partition the tree into maximal runs with one subtree_end and at most one way on."""
    segments, length = tree.segments, len(tree)
    position, subtree_end = tree.position_ids.tolist(), tree.subtree_end.tolist()
    assert segments.start.tolist() == [0, *segments.end.tolist()[:-1]]
    assert segments.end[-1] == length
    children = [0] * length
    for s in range(len(segments)):
        start, end, parent = (int(column[s]) for column in (segments.start, segments.end, segments.parent))
        assert position[start:end] == list(range(position[start], position[start] + end - start))
        assert set(subtree_end[start:end]) == {int(segments.subtree_end[s])}
        assert segments.depth[s] == position[start]
        if parent < 0:
            assert position[start] == 0
        else:
            last = int(segments.end[parent]) - 1
            assert parent < s
            assert position[last] == position[start] - 1
            assert last <= start < subtree_end[last]
            children[last] += 1
    assert 1 not in children  # a segment that had a single child would not have been maximal


@given(sequence_lists)
def test_equals_a_trie_of_dicts(sequences: list[list[int]]) -> None:
    tree, trie = PrefixTree.from_sequences(sequences), DictTrie(sequences)
    assert tree.input_ids.tolist() == trie.ids
    assert tree.position_ids.tolist() == trie.depth
    assert tree.subtree_end.tolist() == trie.end
    assert [path.tolist() for path in tree.index] == trie.paths
    assert tree.pairs == sum(k <= q < trie.end[k] for q in range(len(tree)) for k in range(len(tree)))
    assert_segments(tree)


@given(sequence_lists, st.randoms())
def test_order_of_the_sequences_does_not_matter(sequences: list[list[int]], random) -> None:
    shuffled = list(enumerate(sequences))
    random.shuffle(shuffled)
    tree = PrefixTree.from_sequences(sequences)
    again = PrefixTree.from_sequences([sequence for _, sequence in shuffled])
    assert torch.equal(tree.input_ids, again.input_ids)
    assert torch.equal(tree.subtree_end, again.subtree_end)
    assert all(torch.equal(tree.index[s], path) for (s, _), path in zip(shuffled, again.index))


def test_dtypes_and_a_known_tree() -> None:
    tree = PrefixTree.from_sequences([[5, 6, 7], [5, 6, 8, 9], [5, 6, 7], [4], [5, 6]])
    assert tree.input_ids.tolist() == [4, 5, 6, 7, 8, 9]
    assert tree.position_ids.tolist() == [0, 0, 1, 2, 2, 3]
    assert tree.subtree_end.tolist() == [1, 6, 6, 4, 6, 6]
    assert [path.tolist() for path in tree.index] == [[1, 2, 3], [1, 2, 4, 5], [1, 2, 3], [0], [1, 2]]
    assert tree.segments.start.tolist() == [0, 1, 3, 4]
    assert tree.segments.parent.tolist() == [-1, -1, 1, 1]
    assert tree.pairs == 1 + (1 + 2 + 3) + (3 + 4)
    assert (tree.input_ids.dtype, tree.position_ids.dtype, tree.subtree_end.dtype) == (
        torch.int64,
        torch.int64,
        torch.int32,
    )
    assert all(path.dtype == torch.int64 for path in tree.index)


def test_a_sequence_that_continues_another_starts_no_segment() -> None:
    assert len(PrefixTree.from_sequences([[1, 2, 3, 4], [1, 2], [1]]).segments) == 1
    assert len(PrefixTree.from_sequences([[1, 2, 3], [1, 2], [1, 2, 4]]).segments) == 3


@pytest.mark.parametrize("kind", [list, tuple, np.int32, np.uint8, np.int64, torch.int32, torch.int64])
def test_every_integer_input_gives_the_same_tree(kind) -> None:
    sequences = [[3, 1, 2], [3, 1], [3, 250, 2]]
    if isinstance(kind, torch.dtype):
        inputs = [torch.tensor(sequence, dtype=kind) for sequence in sequences]
    else:
        inputs = [kind(s) if kind in (list, tuple) else np.array(s, kind) for s in sequences]
    tree, plain = PrefixTree.from_sequences(inputs), PrefixTree.from_sequences(sequences)
    assert torch.equal(tree.input_ids, plain.input_ids)
    assert torch.equal(tree.subtree_end, plain.subtree_end)


def test_a_million_tokens() -> None:
    """Checked against the path property: every sequence reads back from its path."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 150_000, 40_000)
    sequences = [
        np.concatenate([prompt[: rng.integers(1, 40_000)], rng.integers(0, 150_000, 20_000)]) for _ in range(30)
    ]
    assert sum(map(len, sequences)) > 1_000_000
    tree = PrefixTree.from_sequences(sequences)
    assert len(tree) < 40_000 + 30 * 20_000 + 1
    for sequence, path in zip(sequences, tree.index):
        assert np.array_equal(tree.input_ids[path].numpy(), sequence)
        assert np.array_equal(tree.position_ids[path].numpy(), np.arange(len(sequence)))
        assert bool((tree.subtree_end[path] > path[-1]).all())  # the last token sees its whole path


def test_many_short_sequences() -> None:
    tree = PrefixTree.from_sequences([[i] for i in range(5000)])
    assert tree.subtree_end.tolist() == list(range(1, 5001))
    assert tree.pairs == 5000


def test_to_moves_everything_but_the_segments() -> None:
    tree = PrefixTree.from_sequences([[1, 2], [1, 3, 4]]).to("meta")
    tensors = (tree.input_ids, tree.position_ids, tree.subtree_end, *tree.index)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert [path.numel() for path in tree.index] == [2, 3]
    assert tree.segments.start.device.type == "cpu"


@pytest.mark.parametrize(
    ("sequences", "error", "message"),
    [
        ([], ValueError, "at least one sequence"),
        ([[1], []], ValueError, "sequence 1 is empty"),
        ([[1], [2, -3]], ValueError, "sequence 1 holds token id -3"),
        ([[2**31]], ValueError, "0..2147483647"),
        ([np.ones((2, 2), np.int64)], ValueError, r"sequence 0 must be 1-D, got shape \[2, 2\]"),
        ([[[1, 2]]], TypeError, "sequence 0 must be a 1-D sequence of token ids"),
        ([1, 2, 3], TypeError, "sequence 0 must be a 1-D sequence of token ids"),
        ([[1.0, 2.0]], TypeError, "sequence 0 must be a 1-D sequence of token ids"),
        (["ab"], TypeError, "sequence 0 must be a 1-D sequence of token ids"),
        ([torch.tensor([1.0])], TypeError, "sequence 0 must hold integers, got float32"),
        ([torch.tensor(1)], ValueError, r"1-D, got shape \[\]"),
        ([[2**70]], TypeError, "sequence 0 must be a 1-D sequence of token ids"),
    ],
)
def test_bad_input_is_one_clear_error(sequences, error, message) -> None:
    with pytest.raises(error, match=message):
        PrefixTree.from_sequences(sequences)


def test_copies_on_devices_are_made_once_and_are_not_pickled():
    tree = PrefixTree.from_sequences([[1, 2, 3], [1, 4]])
    assert tree.to("cpu") is tree
    assert tree.to("meta") is tree.to(torch.device("meta"))
    again = pickle.loads(pickle.dumps(tree))
    assert torch.equal(again.subtree_end, tree.subtree_end)
    assert not again._copies
    assert not copy.deepcopy(tree)._copies
