"""Fixed tile shapes of every kernel by architecture: plain data, no autotuning, no torch, no Triton.

Tiles do not depend on the number of rows, so a row's log-prob does not either (bitwise). None of them has been tuned on
a GPU yet: they are the largest that do not spill.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class HeadTile:
    """Rows x vocabulary columns of one tile of logits, the width of one step of its dot, and how it is launched."""

    block_n: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int

    def backward(self, softcap: bool) -> HeadTile:
        """The tile of recomputed gradients: softcap holds one number a logit more, so half the rows."""
        return replace(self, block_n=self.block_n // 2) if softcap else self

    @property
    def name(self) -> str:
        return f"n{self.block_n}_v{self.block_v}_h{self.block_h}_w{self.num_warps}_s{self.num_stages}"


# Vocabulary columns that one program of the forward goes through. Programs in flight share few splits, whose weights
# (2048 x H) stay in the L2 cache.
SPLIT_COLUMNS = 2048

# target -> bytes of an operand's element -> tile. Shared memory a stage: (block_n + block_v) * block_h * bytes.
HEAD_TILES: dict[str, dict[int, HeadTile]] = {
    "sm_80": {2: HeadTile(64, 128, 64, 8, 3), 4: HeadTile(64, 64, 32, 8, 2)},
    "sm_90": {2: HeadTile(128, 128, 64, 8, 3), 4: HeadTile(64, 64, 32, 8, 2)},
    "sm_100": {2: HeadTile(128, 128, 64, 8, 3), 4: HeadTile(64, 64, 32, 8, 2)},
    "gfx942": {2: HeadTile(128, 128, 32, 8, 2), 4: HeadTile(64, 64, 32, 4, 2)},
    "interpreter": {2: HeadTile(32, 64, 64, 4, 1), 4: HeadTile(32, 64, 64, 4, 1)},
}


@dataclass(frozen=True)
class TreeTile:
    """Queries x keys of one tile of scores, and how it is launched."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return f"q{self.block_q}_k{self.block_k}_w{self.num_warps}_s{self.num_stages}"


@dataclass(frozen=True)
class TreeTiles:
    """The tiles of the three kernels of tree attention."""

    forward: TreeTile
    dq: TreeTile
    dkv: TreeTile


def _square(block: int, num_warps: int, num_stages: int) -> TreeTiles:
    tile = TreeTile(block, block, num_warps, num_stages)
    return TreeTiles(tile, tile, tile)


# float32 dots without tensor cores hold whole rows in registers: few elements a thread, or they spill.
_FLOAT32 = {
    64: _square(32, 8, 2),
    128: _square(32, 16, 2),
    256: replace(_square(32, 16, 1), dq=TreeTile(32, 16, 16, 1)),
}
_HOPPER = {
    64: TreeTiles(TreeTile(128, 128, 8, 3), TreeTile(128, 64, 8, 3), TreeTile(64, 128, 8, 3)),
    128: TreeTiles(TreeTile(128, 64, 8, 3), TreeTile(128, 64, 8, 2), TreeTile(32, 128, 8, 3)),
    # 32 keys are too few for wgmma; with 64, dK and dV of 256 channels spill.
    256: TreeTiles(TreeTile(128, 64, 8, 2), TreeTile(64, 32, 8, 2), TreeTile(64, 32, 8, 2)),
}
# target -> bytes of an operand's element -> widest head (a power of two; the kernel pads to one) -> tiles.
TREE_TILES: dict[str, dict[int, dict[int, TreeTiles]]] = {
    "sm_80": {
        2: {
            64: TreeTiles(TreeTile(128, 64, 4, 3), TreeTile(64, 64, 4, 3), TreeTile(64, 64, 4, 3)),
            128: TreeTiles(TreeTile(128, 64, 8, 3), TreeTile(64, 64, 8, 2), TreeTile(64, 64, 8, 2)),
            256: TreeTiles(TreeTile(64, 32, 8, 2), TreeTile(64, 32, 8, 2), TreeTile(32, 32, 8, 2)),
        },
        4: _FLOAT32,
    },
    "sm_90": {2: _HOPPER, 4: _FLOAT32},
    "sm_100": {
        2: {
            64: replace(_HOPPER[64], dkv=TreeTile(64, 64, 8, 3)),
            128: replace(_HOPPER[128], dkv=TreeTile(32, 64, 8, 3)),
            256: replace(_HOPPER[256], forward=TreeTile(64, 64, 8, 2)),
        },
        4: _FLOAT32,
    },
    "gfx942": {
        2: {
            64: _square(64, 4, 1),
            128: TreeTiles(TreeTile(128, 64, 8, 1), TreeTile(64, 64, 8, 1), TreeTile(64, 64, 8, 1)),
            256: TreeTiles(TreeTile(64, 32, 8, 1), TreeTile(32, 32, 8, 1), TreeTile(32, 32, 8, 1)),
        },
        4: {64: _square(32, 8, 1), 256: _square(16, 4, 1)},
    },
    "interpreter": {
        size: {256: TreeTiles(TreeTile(32, 32, 4, 1), TreeTile(32, 64, 4, 1), TreeTile(64, 32, 4, 1))}
        for size in (2, 4)
    },
}


def tree_tiles(target: str, itemsize: int, head_dim: int) -> TreeTiles:
    """The tiles for heads of ``head_dim`` channels of ``itemsize`` bytes."""
    widths = TREE_TILES[target][itemsize]
    return widths[min(width for width in widths if width >= head_dim)]


# Query tiles that one program of dK and dV goes through for each head, and about how many programs a head may have
# before they get longer: a split tile costs a slot of float32 sums.
PIECE_TILES, PIECES = 128, 1024
JOIN_WARPS = 8  # of the program that joins the slots of a tile

COTRAIN_ROWS = 128  # rows of one program of the loss
COMBINE_ROWS = 128  # rows of one program that joins splits
GATHER_COLUMNS = 256  # columns of one program that sums lines
KEPT_TILE = (8, 4)  # lines and warps of one program that turns kept exponentials into gradients
