"""Sequences and the tokens to predict in them -> the tensors of one forward. Knows no groups, no model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pact.packing import Ids, plan_trees
from pact_kernels.prefix_tree import PrefixTree
from pact_kernels.terms import RL, TokenTerms

Column = NDArray | float | int  # one value a predicted token, or one for all of them


@dataclass(slots=True)
class Path:
    """One sequence to compute and the tokens of it that are predicted (at least one).

    ``ids`` ends before the last predicted token: what follows the last hidden state needed is not computed.
    """

    ids: Ids
    at: Ids  # position of each predicted token; its hidden state is that of at - 1
    target: Ids
    columns: dict[str, Column] = field(default_factory=dict)  # further fields of TokenTerms

    @classmethod
    def of(cls, prefix: Ids, ids: Ids, chosen: Ids) -> Path:
        """The path that predicts ``ids[chosen]`` (ascending positions) after ``prefix``."""
        return cls(np.concatenate([prefix, ids[: chosen[-1]]]), len(prefix) + chosen, ids[chosen])


@dataclass(frozen=True)
class ForwardPlan:
    """What one forward computes, and which hidden row predicts which token. CPU tensors.

    Args:
        members: (group, path) of every path in it, in the order of ``paths``.
        paths: the paths laid out.
        tree: their prefix tree, or None for a dense pass: the sequences behind each other.
        rows: [N] int64, hidden row (flat tree position) that predicts each token.
        target: [N] int64, the tokens predicted, path by path.
    """

    members: list[tuple[int, int]]
    paths: list[Path]
    tree: PrefixTree | None
    rows: Tensor
    target: Tensor

    @property
    def dense_tokens(self) -> int:
        """Tokens that separate sequences take."""
        return sum(len(path.ids) for path in self.paths)

    @property
    def unique_tokens(self) -> int:
        """Tokens that this forward computes."""
        return self.dense_tokens if self.tree is None else len(self.tree)

    @property
    def largest_id(self) -> int:
        """Largest token id, read or predicted."""
        return max(int(self.target.max()), max(int(path.ids.max()) for path in self.paths))

    def per_path(self, values: Tensor) -> list[NDArray[np.float64]]:
        """``values`` [N] cut into one array a path."""
        return np.split(values.double().cpu().numpy(), np.cumsum([len(path.at) for path in self.paths])[:-1])


class Trees:
    """The trees made last, found by their sequences: made again they would be equal, but attention would plan anew.

    ``tokens``: of all trees that are kept, the last one aside. A plan takes up to about 1.5 KB a token.
    """

    def __init__(self, tokens: int = 2**18) -> None:
        self.tokens = tokens
        self._kept: OrderedDict[bytes, PrefixTree] = OrderedDict()

    def of(self, sequences: Sequence[Ids]) -> PrefixTree:
        """The tree of ``sequences``; the one used longest ago makes room."""
        lengths = np.array([len(ids) for ids in sequences])
        key = blake2b(lengths.tobytes() + np.concatenate(sequences).tobytes()).digest()
        if key not in self._kept:
            self._kept[key] = PrefixTree.from_sequences(sequences)
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and sum(map(len, self._kept.values())) > self.tokens:
            self._kept.popitem(last=False)
        return self._kept[key]


def plan_forwards(groups: Sequence[Sequence[Path]], budget: int | None, trees: Trees | None) -> list[ForwardPlan]:
    """Pack the paths of all groups into forwards of at most ``budget`` tokens (see ``plan_trees``).

    ``trees``: where the prefix trees come from; None: dense passes.
    """
    packed = plan_trees([[path.ids for path in paths] for paths in groups], budget, shared=trees is not None)
    return [_plan([groups[g][p] for g, p in members], members, trees) for members in packed]


def _plan(paths: list[Path], members: list[tuple[int, int]], trees: Trees | None) -> ForwardPlan:
    """Token t of a path is predicted at token t - 1 of the same path, wherever the layout puts that."""
    length = np.array([len(path.ids) for path in paths])
    offset = np.cumsum(length) - length
    rows = torch.from_numpy(np.concatenate([begin + path.at - 1 for begin, path in zip(offset, paths)]))
    target = torch.from_numpy(np.concatenate([path.target for path in paths]))
    tree = None if trees is None else trees.of([path.ids for path in paths])
    return ForwardPlan(members, paths, tree, rows if tree is None else torch.cat(tree.index)[rows], target)


def terms_of(plan: ForwardPlan) -> TokenTerms:
    """The columns of all paths behind each other. A column that only RL rows have is 0 on SFT rows, unread there.

    Raises ValueError where some RL paths have old or reference log-probs and others do not: 0 would be read as one.
    """
    length = np.array([len(path.at) for path in plan.paths])

    def column(name: str) -> Tensor:
        values = [path.columns.get(name, 0.0) for path in plan.paths]
        parts = [value if isinstance(value, np.ndarray) else np.full(n, value) for value, n in zip(values, length)]
        return torch.from_numpy(np.concatenate(parts))

    def if_any(name: str) -> Tensor | None:
        present = {name in path.columns for path in plan.paths if path.columns["kind"] == RL}
        if present == {True, False}:
            raise ValueError(f"{name} is set on some rollouts of a tree and not on others: set it on all or on none")
        return column(name) if present == {True} else None

    return TokenTerms(
        target=plan.target,
        old_logp=if_any("old_logp"),
        advantage=column("advantage").double(),
        weight=column("weight"),
        kind=column("kind"),
        component=column("component"),
        ref_logp=if_any("ref_logp"),
        branch=column("branch"),
        sequence=torch.from_numpy(np.repeat(np.arange(len(length)), length)),
    )
