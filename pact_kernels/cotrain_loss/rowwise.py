"""The torch backend of cotrain_loss: each row's loss and its derivatives in closed form. It knows no hidden states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pact_kernels.terms import METRICS, N_BRANCHES, N_COMPONENTS, N_KINDS, RL, TokenTerms

_CELLS = (N_KINDS, N_BRANCHES, N_COMPONENTS)


@dataclass(frozen=True)
class LossOptions:
    """Coefficients of the RL term; the clip keeps the ratio within ``[1 - clip_low, 1 + clip_high]``, and below
    ``clip_dual`` where the advantage is negative."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    clip_dual: float = math.inf


class Rows(NamedTuple):
    """The terms of n rows as the loss reads them: constants in the dtype of the log-probs."""

    is_rl: Tensor
    old_logp: Tensor | None  # None: the log-probs themselves
    advantage: Tensor
    weight: Tensor
    ref_logp: Tensor | None

    @classmethod
    def of(cls, terms: TokenTerms, dtype: torch.dtype) -> Rows:
        """All rows of ``terms``."""
        return cls(
            is_rl=terms.kind == RL,
            old_logp=None if terms.old_logp is None else terms.old_logp.detach().to(dtype),
            advantage=terms.advantage.detach().to(dtype),
            weight=terms.weight.detach().to(dtype),
            ref_logp=None if terms.ref_logp is None else terms.ref_logp.detach().to(dtype),
        )

    def select(self, rows: Tensor) -> Rows:
        """The rows of one chunk."""
        return Rows._make(None if value is None else value[rows] for value in self)


class RowLoss(NamedTuple):
    """``loss``: weight_i l_i; ``dlogp``, ``dentropy``: its derivatives c and e; the rest are the metrics' columns."""

    loss: Tensor
    dlogp: Tensor
    dentropy: Tensor | None
    ratio: Tensor
    clipped: Tensor
    kl: Tensor


def row_loss(logp: Tensor, entropy: Tensor | None, rows: Rows, options: LossOptions) -> RowLoss:
    """Loss and derivatives of each row. Zero weights and zero advantages select their term away (0 * inf).

    ``dl/dlogp``: -r A where the clip lets it pass, plus ``kl_coef (1 - e^d)``; -1 on SFT rows.
    """
    zero = torch.zeros_like(logp)
    old_logp = logp if rows.old_logp is None else rows.old_logp
    ratio = torch.where(rows.is_rl, torch.exp(logp - old_logp), zero)
    gains = rows.is_rl & (rows.advantage != 0)
    kept_ratio = torch.where(
        rows.advantage > 0,
        ratio.clamp(max=1 + options.clip_high),
        ratio.clamp(1 - options.clip_low, options.clip_dual),
    )
    clipped = gains & ((kept_ratio < ratio) | (kept_ratio > ratio))
    loss = torch.where(gains, -kept_ratio * rows.advantage, zero)
    dlogp = torch.where(clipped, zero, loss)  # d(-r A)/dlogp = -r A

    kl = zero
    if rows.ref_logp is not None:
        d = rows.ref_logp - logp
        kl = torch.where(rows.is_rl, torch.expm1(d) - d, zero)
        if options.kl_coef:
            loss = loss + options.kl_coef * kl
            dlogp = dlogp - torch.where(rows.is_rl, options.kl_coef * torch.expm1(d), zero)
    dentropy = None
    if entropy is not None and options.entropy_coef:
        loss = loss - torch.where(rows.is_rl, options.entropy_coef * entropy, zero)
        dentropy = torch.where(rows.is_rl & (rows.weight != 0), -options.entropy_coef * rows.weight, zero)

    loss = torch.where(rows.is_rl, loss, -logp)
    dlogp = torch.where(rows.is_rl, dlogp, -torch.ones_like(logp))
    live = rows.weight != 0
    loss = torch.where(live, rows.weight * loss, zero)
    return RowLoss(loss, torch.where(live, rows.weight * dlogp, zero), dentropy, ratio, clipped, kl)


def sum_metrics(logp: Tensor, entropy: Tensor | None, terms: TokenTerms, rows: RowLoss) -> dict[str, Tensor]:
    """The sums of ``CoTrainResult.metrics``, in float64."""
    cell = terms.kind.long()
    for index, size in ((terms.branch, N_BRANCHES), (terms.component, N_COMPONENTS)):
        cell = cell * size if index is None else cell * size + index.long()
    entropies = torch.zeros_like(logp) if entropy is None else entropy
    ones = torch.ones_like(logp)
    columns = (ones, terms.weight, rows.loss, logp, rows.ratio, rows.clipped, rows.kl, entropies)
    values = torch.stack([column.detach().double() for column in columns])
    sums = values.new_zeros(len(METRICS), N_KINDS * N_BRANCHES * N_COMPONENTS).index_add_(1, cell, values)
    return dict(zip(METRICS, sums.view(-1, *_CELLS)))


class CoTrainLoss(torch.autograd.Function):
    """The sum of ``row.loss``, with the derivatives that ``row_loss`` found."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, entropy: Tensor | None, row: RowLoss) -> Tensor:
        ctx.save_for_backward(row.dlogp, row.dentropy)
        return row.loss.sum(dtype=torch.float64).to(logp.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dlogp, dentropy = ctx.saved_tensors
        return dlogp * dloss, None if dentropy is None else dentropy * dloss, None
