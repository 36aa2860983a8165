"""What a backend plans for a tree: made once, kept as long as the tree's ``subtree_end`` lives. Checks the tree first.

Plans are found by storage, not by tensor object: torch.compile and activation checkpointing hand aliases around.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Plan = TypeVar("Plan")


class Plans(Generic[Plan]):
    """``make(subtree_end, *options)``, kept for each tree and choice of options. ``make`` gets a tree that is one."""

    def __init__(self, make: Callable[..., Plan]) -> None:
        self.make = make
        self._lock = Lock()  # autograd runs backward on threads of its own
        # The weak reference keeps the address from being given to another storage, so an address names one tree.
        self._kept: dict[int, tuple[StorageWeakRef, dict[Hashable, Plan]]] = {}

    def of(self, subtree_end: Tensor, *options: Hashable) -> Plan:
        """The plan of a tree.

        Raises:
            TypeError: ``subtree_end`` is no contiguous 1-D int32 tensor.
            ValueError: its intervals are no tree.
        """
        version = 0 if subtree_end.is_inference() else subtree_end._version  # changed in place, it is another tree
        view = (subtree_end.dtype, subtree_end.storage_offset(), subtree_end.shape, subtree_end.stride(), version)
        with self._lock:
            plans = self._of_storage(subtree_end)
            if (view, options) not in plans:
                check_tree(subtree_end)
                plans[view, options] = self.make(subtree_end, *options)
            return plans[view, options]

    def _of_storage(self, subtree_end: Tensor) -> dict[Hashable, Plan]:
        address = subtree_end.untyped_storage()._cdata
        if address not in self._kept or self._kept[address][0].expired():
            self._kept = {at: kept for at, kept in self._kept.items() if not kept[0].expired()}
            self._kept[address] = (StorageWeakRef(subtree_end.untyped_storage()), {})
        return self._kept[address][1]

    def __len__(self) -> int:
        with self._lock:
            return sum(not ref.expired() for ref, _ in self._kept.values())


def check_tree(subtree_end: Tensor) -> None:
    """Raise unless ``[i, subtree_end[i])`` are the subtrees of a forest in depth-first pre-order: each holds its own
    token, ends within the row, and of any two one lies in the other or they do not meet."""
    if subtree_end.dtype != torch.int32 or subtree_end.dim() != 1 or not subtree_end.is_contiguous():
        raise TypeError(
            f"subtree_end must be a contiguous 1-D int32 tensor, got {list(subtree_end.shape)} of {subtree_end.dtype} "
            f"with strides {subtree_end.stride()}; build the tree with PrefixTree.from_sequences"
        )
    length = subtree_end.numel()
    position = torch.arange(length, device=subtree_end.device)
    end = subtree_end.long()
    inside = ((end > position) & (end <= length)).all()
    # The largest end below i must not pass end[i]. A table of maxima over 2^k tokens answers each range as two lookups.
    size = (end.clamp(max=length) - position - 1).clamp(min=0)  # tokens below i
    highest, nested, step = end, torch.ones_like(inside), 1
    while step < length:
        begin = (position + 1).clamp(max=length - 1)
        second = (begin + size - step).clamp(0, length - 1)
        below = torch.maximum(highest[begin], highest[second])
        nested &= ((size < step) | (size >= 2 * step) | (below <= end)).all()
        highest = torch.maximum(highest, highest[(position + step).clamp(max=length - 1)])
        step *= 2
    if not bool(inside & nested):
        raise ValueError(
            "subtree_end is no tree: token i's subtree must be a range [i, subtree_end[i]) within the row, and two "
            "subtrees must be nested or apart; build the tree with PrefixTree.from_sequences"
        )
