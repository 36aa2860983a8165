"""Random trees through tree attention by the error rule, drawn by hypothesis; four of six through the Triton kernels.

`make test` runs a few through ``test_tree_sweep.py``; `make sweep` runs 10,000 and records the result:
``python tests/pact_kernels/tree_sweep.py --cases 10000``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from oracles import DEVICE
from sweeping import main, sweep
from trees import check_tree

from pact_kernels.prefix_tree import PrefixTree
from pact_kernels.tiles import TREE_TILES, TreeTile, TreeTiles
from pact_kernels.tree_attention import ops

MAX_DEPTH = 8
SIZE = st.one_of(st.integers(1, 8), st.integers(1, 60), st.integers(1, 300))
BLOCKS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Case:
    """A tree and how it is attended to. ``blocks``: forward's, dQ's and dKdV's (queries, keys) of a tile."""

    sequences: list[list[int]]
    blocks: list[tuple[int, int]]
    piece: int
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    scale: float | None
    turned: bool
    spread: float
    offset: float
    backend: str
    seed: int


@st.composite
def trees(draw: st.DrawFn) -> list[list[int]]:
    """Sequences of a random tree of segments, up to 8 deep; a segment's id is its token."""
    room = draw(st.sampled_from([20, 30, 40, 60, 60, 120, 250, 500]))
    paths: list[list[int]] = [draw(st.integers(0, 64)) * [1]]  # what lies before the rest, so that it starts anywhere
    depth = [0]
    used = len(paths[0])
    for token in range(2, 2 + draw(st.integers(1, 12))):
        size = min(draw(SIZE), room - used)
        if size < 1:
            break
        above = draw(st.integers(0, len(paths) - 1))
        above = 0 if depth[above] == MAX_DEPTH else above
        root = draw(st.integers(0, 4)) == 0
        paths.append(([] if root else paths[above]) + [token] * size)
        depth.append(1 if root else depth[above] + 1)
        used += size
    found = [path for path in paths if path]
    return found or [[1]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Tiles are small enough that a tree has several, and not so small that the interpreter takes seconds: it takes as
    long for a small tile as for a large one."""
    sequences = draw(trees())
    length = len(PrefixTree.from_sequences(sequences))
    fitting = [block for block in BLOCKS if -(-length // block) <= 4] or [128]
    blocks = [(draw(st.sampled_from(fitting[:2])), draw(st.sampled_from(fitting[:2]))) for _ in range(3)]
    ratio = draw(st.sampled_from([1, 1, 1, 4, 8] if length <= 60 else [1]))
    kv_heads = draw(st.sampled_from([1, 1, 1, 2])) if ratio == 1 else 1
    return Case(
        sequences,
        blocks,
        piece=draw(st.sampled_from([1, 2, 128])),
        heads=ratio * kv_heads,
        kv_heads=kv_heads,
        dim=draw(st.sampled_from([1, 8, 16, 20, 64, 64, 96, 128, 128, 256])),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
        scale=draw(st.sampled_from([None, None, 0.0, 1.0, -0.3])),
        turned=draw(st.booleans()),
        spread=draw(st.sampled_from([1.0, 1.0, 1.0, 3.0, 10.0])),
        offset=draw(st.sampled_from([0.0, 0.0, 0.0, 30.0])),
        backend=draw(st.sampled_from(["triton"] * 4 + ["torch", "flash"])),
        seed=draw(st.integers(0, 2**16)),
    )


def check(case: Case) -> None:
    """Forward and backward, with the case's tiles (in the interpreter; a GPU takes its own) and pieces.

    An error may be twice that of plain torch in the operands' dtype, plus 2 eps (1 + largest score) times the sums of
    absolute values behind the result: see ``sums_behind``.
    """
    forward, dq, dkv = (TreeTile(block_q, block_k, 4, 1) for block_q, block_k in case.blocks)
    for size in (2, 4):
        TREE_TILES["interpreter"][size] = {256: TreeTiles(forward, dq, dkv)}
    ops.PIECE_TILES, ops.PIECES = case.piece, 10**6
    tree = PrefixTree.from_sequences(case.sequences).to(DEVICE)
    shape = (case.heads, case.kv_heads, case.dim, case.dtype, case.scale)
    made = {"seed": case.seed, "turned": case.turned, "spread": case.spread, "offset": case.offset}
    check_tree(tree, *shape, backend=case.backend, of_sums=True, **made)


def share(number: int, seed: int) -> int:
    """One process's part."""
    return sweep(check, cases(), number, seed)


if __name__ == "__main__":
    main("tree_sweep", share, __doc__)
