"""The torch backend of linear_cotrain_loss: gradients are formed while a chunk's logits are still there.

A row's loss depends on its own log-prob and entropy only, so c and e of DESIGN section 2 are known as soon as its chunk
is scored: three matmuls and one exp in all, nothing recomputed. The backward only scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pact_kernels.cotrain_loss.rowwise import LossOptions, Rows, row_loss
from pact_kernels.linear_logprob.chunked import Gradients, Head


class LinearCoTrainLoss(torch.autograd.Function):
    """(loss, logp [N], entropy [N] or None) of a head; only the loss is differentiable.

    ``needs`` says which of hidden, weight and bias want a gradient. ``ctx.needs_input_grad`` cannot: it is also set
    under ``torch.no_grad()``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        rows: Rows,
        options: LossOptions,
        entropy: bool,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        logp_N = hidden.new_empty(len(head), dtype=head.dtype)
        entropy_N = torch.empty_like(logp_N) if entropy else None
        loss_N = torch.empty_like(logp_N)
        gradients = Gradients(head, needs)
        with head.full_precision():
            for chunk in head.chunks():
                hidden_nH = head.hidden(chunk)
                scores = head.score(chunk, hidden_nH, entropy)
                row = row_loss(scores.logp_n, scores.entropy_n, rows.select(chunk), options)
                logp_N[chunk], loss_N[chunk] = scores.logp_n, row.loss
                if entropy_N is not None:
                    entropy_N[chunk] = scores.entropy_n  # type: ignore[assignment]
                if any(needs):
                    gradients.add(chunk, hidden_nH, scores, row.dlogp, row.dentropy)
        ctx.save_for_backward(gradients.hidden_RH, gradients.weight_VH, gradients.bias_V)
        ctx.dtypes = [None if operand is None else operand.dtype for operand in (hidden, weight, bias)]
        ctx.mark_non_differentiable(*(value for value in (logp_N, entropy_N) if value is not None))
        return loss_N.sum(dtype=torch.float64).to(head.dtype), logp_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        scaled = (
            None if gradient is None else (gradient * dloss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        )
        return (*scaled, *(None,) * 5)
