"""The torch backend of linear_logprob: a few rows' logits at a time, scored and dropped; gradients recompute them.

Arithmetic is float32 (float64 for float64 inputs) whatever the inputs are: lower precisions are widened tile by tile
before the matmul, so logits are never rounded to them. It knows log-probs and their gradients, not losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass
class ChunkBudget:
    """Size of the temporaries, in bytes unless said. At most three logits buffers are alive at once."""

    logits: int = 32 * 2**20  # one [rows, V] buffer in the accumulation dtype
    rows: int = 128  # but never fewer rows than this: every chunk reads the weight and updates its gradient
    widened: int = 16 * 2**20  # one [tile, H] piece of a weight that must be widened


BUDGET = ChunkBudget()

# CPU matmuls and sums take other paths, with other rounding, for a handful of rows. Short chunks are padded to this
# many, so that a row's log-prob does not depend on how many rows come with it.
PADDED_ROWS = 32


@dataclass(frozen=True)
class Head:
    """The operands of one call, checked by the api. Row-wise ones are [N], ``inv_temperature_N`` in ``dtype``.

    ``operand_dtype`` is what hidden, weight and bias are rounded to first (autocast's dtype, else their own).
    """

    hidden_RH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    target_N: Tensor
    rows_N: Tensor
    inv_temperature_N: Tensor | None
    softcap: float | None
    operand_dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """The accumulation dtype: of logits, log-probs and weight gradients."""
        return torch.float64 if self.operand_dtype == torch.float64 else torch.float32

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """The tensors, in the order of the fields."""
        return (self.hidden_RH, self.weight_VH, self.bias_V, self.target_N, self.rows_N, self.inv_temperature_N)

    def __len__(self) -> int:
        """Number of rows N."""
        return self.target_N.numel()

    def full_precision(self) -> torch.autocast:
        """A context in which autocast leaves this head's own matmuls alone."""
        return torch.autocast(self.hidden_RH.device.type, enabled=False)

    def chunks(self, rows: Tensor | None = None) -> Iterator[Tensor]:
        """Pieces of ``rows`` (default: 0..N-1) whose logits fit the budget."""
        if rows is None:
            rows = torch.arange(len(self), device=self.target_N.device)
        step = max(BUDGET.rows, BUDGET.logits // (self.weight_VH.shape[0] * self.dtype.itemsize))
        yield from (rows[begin : begin + step] for begin in range(0, rows.numel(), step))

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the accumulation dtype: whole if it is stored so, else widened tile by tile."""
        n_vocab, width = self.weight_VH.shape
        whole = self.weight_VH.dtype == self.operand_dtype == self.dtype
        step = n_vocab if whole else max(1, BUDGET.widened // (width * self.dtype.itemsize))
        for begin in range(0, n_vocab, step):
            tile = slice(begin, min(begin + step, n_vocab))
            yield tile, self._widen(self.weight_VH[tile])

    def hidden(self, rows: Tensor) -> Tensor:
        """[n, H] in the accumulation dtype."""
        return self._widen(self.hidden_RH[self.rows_N[rows]])

    def score(self, rows: Tensor, hidden_nH: Tensor, entropy: bool) -> Scores:
        """Log-probs and entropies of ``rows``, with what their gradient needs.

        Centred on the row's maximum m: with ``t = sum e^(z-m)``, ``H = log t - sum e^(z-m) (z-m) / t``.
        """
        n = rows.numel()
        z_pV = self._linear(hidden_nH)
        tanh_pV = None
        if self.softcap is not None:
            tanh_pV = z_pV.div_(self.softcap).tanh_()
            z_pV = tanh_pV * self.softcap
        if self.inv_temperature_N is not None:
            z_pV[:n].mul_(self.inv_temperature_N[rows, None])
        z_pV.sub_(z_pV.amax(dim=1, keepdim=True))
        target_z_n = z_pV[:n].gather(1, self.target_N[rows, None])[:, 0]
        if entropy and self.bias_V is not None:
            z_pV.clamp_(min=-200)  # a bias of -inf masks its column: 0 * -inf would be NaN, and e^-200 is 0 in float32
        exp_pV = torch.exp(z_pV) if entropy else z_pV.exp_()
        total_n = exp_pV.sum(dim=1)[:n]
        log_total_n = total_n.log()
        tanh_nV = None if tanh_pV is None else tanh_pV[:n]
        scores = Scores(target_z_n - log_total_n, None, exp_pV[:n], None, tanh_nV, total_n, log_total_n)
        if not entropy:
            return scores
        expz_pV = z_pV.mul_(exp_pV)
        return scores._replace(entropy_n=log_total_n - expz_pV.sum(dim=1)[:n] / total_n, expz_nV=expz_pV[:n])

    def logit_gradient_(self, rows: Tensor, scores: Scores, dlogp_n: Tensor, dentropy_n: Tensor | None) -> Tensor:
        """dL/du [n, V]; overwrites the buffers of ``scores``.

        With ``p = e^(z-m) / t`` and ``log p = z - m - log t`` the formula of DESIGN section 2 is, before softcap,
        ``e^(z-m) alpha + e^(z-m) (z-m) beta + c onehot``, ``alpha = -(c + e (H - log t)) / t``, ``beta = -e / t``,
        with c and e already divided by the temperature.
        """
        if self.inv_temperature_N is not None:
            dlogp_n = dlogp_n * self.inv_temperature_N[rows]
            dentropy_n = None if dentropy_n is None else dentropy_n * self.inv_temperature_N[rows]
        alpha_n = -dlogp_n
        if dentropy_n is not None and scores.entropy_n is not None:
            alpha_n = alpha_n - dentropy_n * (scores.entropy_n - scores.log_total_n)
        gradient_nV = scores.exp_nV.mul_((alpha_n / scores.total_n)[:, None])
        if dentropy_n is not None and scores.expz_nV is not None:
            gradient_nV.add_(scores.expz_nV.mul_((-dentropy_n / scores.total_n)[:, None]))
        gradient_nV.scatter_add_(1, self.target_N[rows, None], dlogp_n[:, None])
        if scores.tanh_nV is not None:
            gradient_nV.addcmul_(gradient_nV, scores.tanh_nV.square_(), value=-1)
        return gradient_nV

    def _linear(self, hidden_nH: Tensor) -> Tensor:
        """Logits [p, V] before softcap of the n rows, padded to p = max(n, PADDED_ROWS)."""
        n_rows = hidden_nH.shape[0]
        if n_rows < PADDED_ROWS:
            hidden_nH = torch.nn.functional.pad(hidden_nH, (0, 0, 0, PADDED_ROWS - n_rows))
        u_pV = hidden_nH.new_empty(hidden_nH.shape[0], self.weight_VH.shape[0])
        for tile, weight_vH in self.tiles():
            torch.mm(hidden_nH, weight_vH.T, out=u_pV[:, tile])
        if self.bias_V is not None:
            u_pV.add_(self._widen(self.bias_V))
        return u_pV

    def _widen(self, value: Tensor) -> Tensor:
        return value.to(self.operand_dtype).to(self.dtype)


class Scores(NamedTuple):
    """What ``Head.score`` computes of n rows; ``expz_nV`` is ``e^(z-m) (z-m)``, ``total_n`` the sum of ``e^(z-m)``."""

    logp_n: Tensor
    entropy_n: Tensor | None
    exp_nV: Tensor
    expz_nV: Tensor | None
    tanh_nV: Tensor | None
    total_n: Tensor
    log_total_n: Tensor

    def select(self, keep_n: Tensor) -> Scores:
        """The scores of the rows where ``keep_n`` is true."""
        return Scores._make(None if value is None else value[keep_n] for value in self)


class Gradients:
    """Sums of dL/dhidden, dL/dweight, dL/dbias over chunks, in the accumulation dtype; None where nobody needs one."""

    def __init__(self, head: Head, needs: tuple[bool, bool, bool]) -> None:
        operands = (head.hidden_RH, head.weight_VH, head.bias_V)
        self.head = head
        self.hidden_RH, self.weight_VH, self.bias_V = (
            torch.zeros_like(operand, dtype=head.dtype) if need and operand is not None else None
            for operand, need in zip(operands, needs)
        )

    def add(self, rows: Tensor, hidden_nH: Tensor, scores: Scores, dlogp_n: Tensor, dentropy_n: Tensor | None) -> None:
        """Add the scored ``rows``, less those where both derivatives are exactly 0. Overwrites ``scores``."""
        live_n = live_rows(dlogp_n, dentropy_n)
        if not bool(live_n.all()):
            rows, hidden_nH, scores, dlogp_n = rows[live_n], hidden_nH[live_n], scores.select(live_n), dlogp_n[live_n]
            dentropy_n = None if dentropy_n is None else dentropy_n[live_n]
        if rows.numel() > 0:
            self._add(rows, hidden_nH, self.head.logit_gradient_(rows, scores, dlogp_n, dentropy_n))

    def _add(self, rows: Tensor, hidden_nH: Tensor, gradient_nV: Tensor) -> None:
        if self.hidden_RH is not None:
            dhidden_nH = torch.zeros_like(hidden_nH)
            for tile, weight_vH in self.head.tiles():
                dhidden_nH.addmm_(gradient_nV[:, tile], weight_vH)
            self.hidden_RH.index_add_(0, self.head.rows_N[rows], dhidden_nH)
        if self.weight_VH is not None:
            self.weight_VH.addmm_(gradient_nV.T, hidden_nH)
        if self.bias_V is not None:
            self.bias_V.add_(gradient_nV.sum(dim=0))

    def cast(self) -> tuple[Tensor | None, ...]:
        """The three gradients in the dtypes of their operands."""
        sums = (self.hidden_RH, self.weight_VH, self.bias_V)
        operands = (self.head.hidden_RH, self.head.weight_VH, self.head.bias_V)
        return tuple(
            None if total is None or operand is None else total.to(operand.dtype)
            for total, operand in zip(sums, operands)
        )


def live_rows(dlogp_N: Tensor, dentropy_N: Tensor | None) -> Tensor:
    """Which rows have a gradient at all: c and e not both exactly 0 (NaN counts as not 0)."""
    return dlogp_N != 0 if dentropy_N is None else (dlogp_N != 0) | (dentropy_N != 0)


class LinearLogProb(torch.autograd.Function):
    """(logp [N], entropy [N] or None) of a head; nothing but the operands is kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        rows: Tensor,
        inv_temperature: Tensor | None,
        softcap: float | None,
        operand_dtype: torch.dtype,
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        head = Head(hidden, weight, bias, target, rows, inv_temperature, softcap, operand_dtype)
        logp_N = head.hidden_RH.new_empty(len(head), dtype=head.dtype)
        entropy_N = torch.empty_like(logp_N) if entropy else None
        with head.full_precision():
            for chunk in head.chunks():
                scores = head.score(chunk, head.hidden(chunk), entropy)
                logp_N[chunk] = scores.logp_n
                if entropy_N is not None:
                    entropy_N[chunk] = scores.entropy_n  # type: ignore[assignment]
        ctx.save_for_backward(*head.operands)
        ctx.settings = (softcap, operand_dtype)
        ctx.set_materialize_grads(False)
        return logp_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogp_N: Tensor | None, dentropy_N: Tensor | None) -> tuple[Tensor | None, ...]:
        head = Head(*ctx.saved_tensors, *ctx.settings)
        gradients = Gradients(head, ctx.needs_input_grad[:3])
        if dlogp_N is None:
            dlogp_N = head.hidden_RH.new_zeros(len(head), dtype=head.dtype)
        with head.full_precision():
            for chunk in head.chunks(live_rows(dlogp_N, dentropy_N).nonzero()[:, 0]):
                hidden_nH = head.hidden(chunk)
                scores = head.score(chunk, hidden_nH, dentropy_N is not None)
                dentropy_n = None if dentropy_N is None else dentropy_N[chunk]
                gradients.add(chunk, hidden_nH, scores, dlogp_N[chunk], dentropy_n)
        return (*gradients.cast(), *(None,) * 6)
