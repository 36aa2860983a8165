"""Slow, obvious versions of what the package computes, and the error rule. Shared by the tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor

# Kernel tests run on a GPU where there is one, in Triton's interpreter where there is none.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def assert_within(name: str, got: Tensor, plain: Tensor, exact: Tensor, rounding: float) -> None:
    """The error rule: ``got`` may be off float64 by twice what plain torch is off, plus ``rounding``."""
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)} instead of {list(exact.shape)}"
    if exact.numel() == 0:
        return
    error = (got.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item() + rounding
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"  # also fails on NaN


class DictTrie:
    """The tree built token by token: nested dicts, walked in ascending order of token id."""

    def __init__(self, sequences: list[list[int]]) -> None:
        self.ids: list[int] = []
        self.depth: list[int] = []
        self.end: list[int] = []
        self.flat: dict[tuple[int, ...], int] = {}
        root: dict = {}
        for sequence in sequences:
            node = root
            for token in sequence:
                node = node.setdefault(token, {})
        self._walk(root, ())
        self.paths = [[self.flat[tuple(s[: t + 1])] for t in range(len(s))] for s in sequences]

    def _walk(self, node: dict, path: tuple[int, ...]) -> None:
        for token in sorted(node):
            at = len(self.ids)
            self.flat[(*path, token)] = at
            self.ids.append(token)
            self.depth.append(len(path))
            self.end.append(-1)
            self._walk(node[token], (*path, token))
            self.end[at] = len(self.ids)
