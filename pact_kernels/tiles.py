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

COTRAIN_ROWS = 128  # rows of one program of the loss
COMBINE_ROWS = 128  # rows of one program that joins splits
GATHER_COLUMNS = 256  # columns of one program that sums lines
KEPT_TILE = (8, 4)  # lines and warps of one program that turns kept exponentials into gradients
