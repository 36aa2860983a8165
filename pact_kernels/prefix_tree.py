"""PrefixTree: a radix tree of token ids, flattened so that one integer a token says who sees whom. Host side."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

_MAX_ID = 2**31 - 1


@dataclass(frozen=True)
class Segments:
    """Maximal unbranching runs of a tree, in flat order: ``[start[i], end[i])`` partition ``0..L``.

    All tokens of a segment have the same ``subtree_end``, and every token sees its own segment causally plus the whole
    of each segment on the way ``parent[i]``, ``parent[parent[i]]``, ... to a root. Int64 [n_segments] tensors that stay
    on the CPU: they are for host-side plans.

    Args:
        start, end: flat positions, end exclusive; ``start[i + 1] == end[i]``.
        parent: segment that holds the token before ``start[i]`` on the path, -1 for a root; ``parent[i] < i``.
        depth: depth (position) of the token at ``start[i]``.
        subtree_end: flat end (exclusive) of the segment and everything below it.
    """

    start: Tensor
    end: Tensor
    parent: Tensor
    depth: Tensor
    subtree_end: Tensor

    def __len__(self) -> int:
        return self.start.numel()


@dataclass(frozen=True)
class PrefixTree:
    """Sequences stored as one tree: what prefix sequences share is there once (DESIGN section 2).

    Flattened in depth-first pre-order. Children, and roots, come in ascending order of their token id, so the tree
    depends on the set of sequences and not on the order they were given in. Token ``q`` sees token ``k`` if and only if
    ``k <= q < subtree_end[k]``.

    Args:
        input_ids: [L] int64, token at each flat position.
        position_ids: [L] int64, depth of the token = its RoPE position.
        subtree_end: [L] int32, end (exclusive) of the subtree below the token.
        index: one int64 tensor a sequence, in the order given: ``index[s][t]`` is the flat position of its token ``t``.
        segments: the unbranching runs (always on the CPU).
        pairs: number of visible (query, key) pairs: a token at depth d sees d + 1 tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    subtree_end: Tensor
    index: list[Tensor] = field(repr=False)
    segments: Segments = field(repr=False)
    pairs: int
    _copies: dict[torch.device, PrefixTree] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int] | np.ndarray | Tensor]) -> PrefixTree:
        """Build the tree of ``sequences``: lists of ints, integer arrays or tensors, each 1-D with at least one token.

        >>> tree = PrefixTree.from_sequences([[1, 2, 3], [1, 2, 4, 5]])
        >>> tree.input_ids.tolist(), tree.position_ids.tolist(), tree.subtree_end.tolist()
        ([1, 2, 3, 4, 5], [0, 1, 2, 2, 3], [5, 5, 3, 5, 5])
        >>> tree.index[1].tolist()
        [0, 1, 3, 4]

        Raises:
            TypeError: a sequence that holds anything but integers.
            ValueError: no sequences, an empty sequence, one that is not 1-D, ids outside 0..2^31 - 1, or 2^31 tokens.
        """
        ids, length = _pack(sequences)
        order, sorted_ids = _lexicographic(ids, length)
        length = length[order]
        offset = np.cumsum(length) - length  # of each sorted sequence in sorted_ids
        shared = _shared_prefix(sorted_ids, offset, length)

        # In lexicographic order sequence i adds exactly its tokens below the prefix it shares with sequence i - 1, and
        # adding them one after the other is depth-first pre-order.
        depth = np.arange(ids.size) - np.repeat(offset, length)
        new = depth >= np.repeat(shared, length)
        run_start = np.cumsum(length - shared) - (length - shared)
        position = depth[new]
        segments = _segments(run_start, shared, length, position)

        segment_size = segments.end - segments.start
        return cls(
            input_ids=torch.from_numpy(sorted_ids[new].astype(np.int64)),
            position_ids=torch.from_numpy(position),
            subtree_end=segments.subtree_end.repeat_interleave(segment_size).to(torch.int32),
            index=_index(order, offset, length, shared, new),
            segments=segments,
            pairs=int(position.sum()) + position.size,
        )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_copies": {}}  # what is pickled or copied needs no device

    def __len__(self) -> int:
        """Number of tokens ``L`` stored."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> PrefixTree:
        """The same tree with its tensors on ``device``, copied once; ``segments`` stay on the CPU."""
        device = torch.empty(0, device=device).device  # "cuda" is the current one of them
        if device == self.input_ids.device:
            return self
        if device not in self._copies:
            packed = torch.cat(self.index).to(device)
            self._copies[device] = replace(
                self,
                input_ids=self.input_ids.to(device),
                position_ids=self.position_ids.to(device),
                subtree_end=self.subtree_end.to(device),
                index=list(packed.split([path.numel() for path in self.index])),
            )
        return self._copies[device]


def _pack(sequences: Sequence[Sequence[int] | np.ndarray | Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """All ids behind each other, and the length of each sequence. Every input error is raised here."""
    if len(sequences) == 0:
        raise ValueError("PrefixTree needs at least one sequence, got an empty list")
    arrays = [_as_array(sequence, s) for s, sequence in enumerate(sequences)]
    length = np.fromiter(map(len, arrays), np.int64, len(arrays))
    if not length.all():
        raise ValueError(f"sequence {int(length.argmin())} is empty; every sequence needs at least one token")
    ids = np.concatenate(arrays)
    if ids.size > _MAX_ID:
        raise ValueError(f"{ids.size} tokens do not fit one tree (int32 positions); build several trees")
    if ids.min() < 0 or ids.max() > _MAX_ID:
        at = int(np.argmax((ids < 0) | (ids > _MAX_ID)))
        s = int(np.searchsorted(np.cumsum(length), at, side="right"))
        raise ValueError(f"sequence {s} holds token id {ids[at]}; ids must lie in 0..{_MAX_ID}")
    return ids, length


def _as_array(sequence: Sequence[int] | np.ndarray | Tensor, s: int) -> np.ndarray:
    if isinstance(sequence, Tensor):
        sequence = sequence.detach().cpu().numpy()
    if not isinstance(sequence, np.ndarray):
        try:
            return np.frombuffer(array("q", sequence if isinstance(sequence, list) else list(sequence)), np.int64)
        except (TypeError, OverflowError) as error:
            raise TypeError(f"sequence {s} must be a 1-D sequence of token ids: {error}") from None
    if sequence.ndim != 1:
        raise ValueError(f"sequence {s} must be 1-D, got shape {list(sequence.shape)}")
    if sequence.dtype.kind not in "iu":
        raise TypeError(f"sequence {s} must hold integers, got {sequence.dtype}")
    return sequence.astype(np.int64, copy=False)


def _lexicographic(ids: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order of the sequences (a prefix before its extensions), and the ids packed in that order.

    Big-endian bytes of non-negative integers compare like the integers, so the sort is memcmp on whole sequences.
    """
    blob = ids.astype(">u4").tobytes()
    end = 4 * np.cumsum(length)
    keys = [blob[a:b] for a, b in zip((end - 4 * length).tolist(), end.tolist())]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return np.array(order), np.frombuffer(b"".join([keys[s] for s in order]), ">u4").astype(np.int32)


def _shared_prefix(ids: np.ndarray, offset: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Length of the longest common prefix of each sorted sequence with the one before it; 0 for the first."""
    common = np.minimum(length[:-1], length[1:])
    if common.size == 0:
        return np.zeros(1, np.int64)
    first = np.cumsum(common) - common  # of each neighbouring pair in the packed comparison
    step = np.arange(common.sum())
    same = ids[step + np.repeat(offset[:-1] - first, common)] == ids[step + np.repeat(offset[1:] - first, common)]
    # First mismatch of each pair: its depth where the tokens differ, the common length where they do not.
    mismatch = np.where(same, np.repeat(common, common), step - np.repeat(first, common))
    return np.concatenate([[0], np.minimum.reduceat(mismatch, first)])


def _segments(run_start: np.ndarray, shared: np.ndarray, length: np.ndarray, position: np.ndarray) -> Segments:
    """Cut the runs that each sequence added wherever another run branches off."""
    added = length > shared
    run_start, shared = run_start[added], shared[added]
    run_parent = _run_parent(run_start, shared)
    # A run right behind its parent token continues it (the parent ended a sequence): a branch only if others say so.
    branches = (run_parent + 1 != run_start) | (run_parent < 0)
    run_start, run_parent = run_start[branches], run_parent[branches]
    start = np.union1d(run_start, run_parent[run_parent >= 0] + 1)
    end = np.append(start[1:], position.size)

    parent_token = start - 1  # of a cut run's lower part: the token before it
    parent_token[np.searchsorted(start, run_start)] = run_parent
    parent = np.searchsorted(start, parent_token, side="right") - 1

    subtree_end = end.tolist()
    for child, ancestor in zip(range(start.size - 1, -1, -1), parent[::-1].tolist()):
        if ancestor >= 0:
            subtree_end[ancestor] = max(subtree_end[ancestor], subtree_end[child])
    columns = (start, end, parent, position[start], np.array(subtree_end))
    return Segments(*(torch.from_numpy(column) for column in columns))


def _run_parent(run_start: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Flat position of the token above each run, -1 above a root.

    It lies at depth ``shared - 1`` on the path of the sequence before, that is in the last run that begins above
    ``shared``: the previous smaller value of ``shared``, found with a stack (one step a sequence).
    """
    parent = []
    stack: list[tuple[int, int]] = []
    for start, depth in zip(run_start.tolist(), shared.tolist()):
        while stack and stack[-1][1] >= depth:
            stack.pop()
        parent.append(stack[-1][0] + depth - 1 - stack[-1][1] if stack else -1)
        stack.append((start, depth))
    return np.array(parent)


def _index(
    order: np.ndarray, offset: np.ndarray, length: np.ndarray, shared: np.ndarray, new: np.ndarray
) -> list[Tensor]:
    """Flat positions along each sequence, in the order the sequences were given."""
    flat = np.cumsum(new) - 1
    previous = 0
    for begin, prefix in zip(offset.tolist(), shared.tolist()):
        flat[begin : begin + prefix] = flat[previous : previous + prefix]
        previous = begin
    paths = torch.from_numpy(flat).split(length.tolist())
    index: list[Tensor] = [paths[0]] * len(paths)
    for s, path in zip(order.tolist(), paths):
        index[s] = path
    return index
