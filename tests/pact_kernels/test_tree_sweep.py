"""A few cases of the sweep, other ones than `make sweep` draws."""

from __future__ import annotations

import pytest
from tree_sweep import TREE_TILES, ops, share


def test_a_few_random_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, tiles in TREE_TILES["interpreter"].items():  # put back what the cases change
        monkeypatch.setitem(TREE_TILES["interpreter"], size, tiles)
    for name in ("PIECE_TILES", "PIECES"):
        monkeypatch.setattr(ops, name, getattr(ops, name))
    assert share(25, seed=10**6) == 25
