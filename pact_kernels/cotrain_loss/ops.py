"""The Triton backend of cotrain_loss and linear_cotrain_loss as torch custom operators with autograd.

Tensors and numbers in and out; checks are the api's and the kernels'. The fused operator forms the gradients in the
forward, chunk by chunk: three matmuls a row, nothing recomputed (with softcap: four).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from pact_kernels.cotrain_loss.triton import cotrain_rows_kernel
from pact_kernels.linear_logprob.launch import (
    SYNCHRONISES,
    Gradients,
    Kept,
    Scores,
    TritonHead,
    fill_holes,
    kept_logit_gradient,
    live_rows,
    logit_gradient,
    plain_context,
    raise_flag,
    scaled,
    score,
)
from pact_kernels.terms import METRICS, N_BRANCHES, N_COMPONENTS, N_KINDS, RL
from pact_kernels.tiles import COTRAIN_ROWS

_CELLS = (N_KINDS, N_BRANCHES, N_COMPONENTS)


class Columns(NamedTuple):
    """The fields of TokenTerms that the loss reads, [N] each, contiguous."""

    old_logp: Tensor | None
    advantage: Tensor
    weight: Tensor
    kind: Tensor
    component: Tensor | None
    branch: Tensor | None
    ref_logp: Tensor | None


def _columns(*values: Tensor | None) -> Columns:
    return Columns._make(None if value is None else value.contiguous() for value in values)


def _launch(
    select: Tensor,
    logp: Tensor,
    entropy: Tensor | None,
    columns: Columns,
    coefficients: list[float],
    **outputs: Tensor | None,
) -> None:
    cotrain_rows_kernel[(triton.cdiv(select.numel(), COTRAIN_ROWS),)](
        select, logp, entropy, columns.old_logp, columns.advantage, columns.weight, columns.kind, columns.component,
        columns.branch, columns.ref_logp, outputs.get("dlogp"), outputs.get("dentropy"), outputs.get("sums"),
        select.numel(), *coefficients,
        HAS_ENTROPY=entropy is not None, HAS_OLD=columns.old_logp is not None, HAS_REF=columns.ref_logp is not None,
        HAS_COMPONENT=columns.component is not None, HAS_BRANCH=columns.branch is not None, SUMS="sums" in outputs,
        N_BRANCHES=N_BRANCHES, N_COMPONENTS=N_COMPONENTS, CELLS=N_KINDS * N_BRANCHES * N_COMPONENTS,
        BLOCK_N=COTRAIN_ROWS,
    )  # fmt: skip


def _derivatives(
    select: Tensor, logp: Tensor, entropy: Tensor | None, columns: Columns, coefficients: list[float]
) -> tuple[Tensor, Tensor | None]:
    """c and e [N], filled for the rows ``select``; e is None where it is 0 everywhere."""
    dlogp = torch.empty_like(logp)
    dentropy = torch.empty_like(logp) if entropy is not None else None
    if select.numel():
        _launch(select, logp, entropy, columns, coefficients, dlogp=dlogp, dentropy=dentropy)
    return dlogp, dentropy if coefficients[3] else None


def _sums(logp: Tensor, entropy: Tensor | None, columns: Columns, coefficients: list[float]) -> tuple[Tensor, Tensor]:
    """The loss and the metrics [METRICS, kinds, branches, components], float64, over all rows."""
    rows = torch.arange(logp.numel(), device=logp.device)
    programs = triton.cdiv(logp.numel(), COTRAIN_ROWS)
    sums = logp.new_empty(programs, len(METRICS), N_KINDS * N_BRANCHES * N_COMPONENTS, dtype=torch.float64)
    if programs:
        _launch(rows, logp, entropy, columns, coefficients, sums=sums)
    metrics = sums.sum(dim=0).view(len(METRICS), *_CELLS)
    return metrics[METRICS.index("loss")].sum().float(), metrics


@torch.library.custom_op("pact_kernels::cotrain_loss", mutates_args=())
def cotrain_loss_op(
    logp: Tensor,
    entropy: Tensor | None,
    old_logp: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    kind: Tensor,
    component: Tensor | None,
    branch: Tensor | None,
    ref_logp: Tensor | None,
    coefficients: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics, c [N] and e [N or 0] of float32 log-probs.

    ``coefficients``: clip_low, clip_high, kl_coef, entropy_coef, clip_dual.
    """
    columns = _columns(old_logp, advantage, weight, kind, component, branch, ref_logp)
    logp = logp.contiguous()
    entropy = None if entropy is None else entropy.contiguous()
    with plain_context(logp):
        rows = torch.arange(logp.numel(), device=logp.device)
        dlogp, dentropy = _derivatives(rows, logp, entropy, columns, coefficients)
        loss, metrics = _sums(logp, entropy, columns, coefficients)
    return loss, metrics, dlogp, logp.new_empty(0) if dentropy is None else dentropy


@cotrain_loss_op.register_fake
def _(logp, entropy, old_logp, advantage, weight, kind, component, branch, ref_logp, coefficients):
    n, new = logp.shape[0], logp.new_empty
    n_entropy = n if entropy is not None and coefficients[3] else 0
    return new(()), new(len(METRICS), *_CELLS, dtype=torch.float64), new(n), new(n_entropy)


def _setup_loss(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.has_entropy = inputs[1] is not None


def _backward_loss(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dlogp, dentropy = ctx.saved_tensors
    if not ctx.has_entropy:
        dentropy = None
    elif dentropy.shape != dlogp.shape:
        dentropy = torch.zeros_like(dlogp)
    found = (None if value is None else scaled(value, dloss, value.dtype) for value in (dlogp, dentropy))
    return *found, *(None,) * 8


cotrain_loss_op.register_autograd(_backward_loss, setup_context=_setup_loss)


@torch.library.custom_op("pact_kernels::linear_cotrain_loss", mutates_args=(), tags=SYNCHRONISES)
def linear_cotrain_loss_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rows: Tensor,
    inv_temperature: Tensor | None,
    softcap: float,
    operand_dtype: torch.dtype,
    entropy: bool,
    old_logp: Tensor | None,
    advantage: Tensor,
    row_weight: Tensor,
    kind: Tensor,
    component: Tensor | None,
    branch: Tensor | None,
    ref_logp: Tensor | None,
    coefficients: list[float],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics, and the float32 gradients of hidden, weight and bias (empty where not ``needs``).

    Raises ValueError where a target, a row index or a temperature is out of range.
    """
    columns = _columns(old_logp, advantage, row_weight, kind, component, branch, ref_logp)
    scores = Scores.empty(target.numel(), entropy, hidden.device)
    with plain_context(hidden):
        head = TritonHead.of(hidden, weight, bias, target, rows, inv_temperature, softcap, operand_dtype)
        moves = _may_have_gradient(columns, coefficients) if any(needs) else torch.zeros_like(kind, dtype=torch.bool)
        score(head, (~moves).nonzero()[:, 0], scores)
        candidates = moves.nonzero()[:, 0]
        gradients, step = Gradients(head, needs, candidates.numel()), head.chunk_rows()
        for begin in range(0, candidates.numel(), step):
            _add_chunk(head, candidates[begin : begin + step], scores, columns, coefficients, gradients)
        raise_flag(scores.flag.tolist(), head.n_vocab, hidden.shape[0])
        loss, metrics = _sums(scores.logp, scores.entropy if entropy else None, columns, coefficients)
        dhidden, dweight, dbias = gradients.hidden_RH(torch.float32), gradients.weight_VH, gradients.bias_V
    return (
        loss,
        metrics,
        loss.new_empty(0) if dhidden is None else dhidden,
        loss.new_empty(0) if dweight is None else dweight,
        loss.new_empty(0) if dbias is None else dbias,
    )


def _may_have_gradient(columns: Columns, coefficients: list[float]) -> Tensor:
    """Rows whose c or e need not be 0 before their log-probs are known."""
    moves = columns.kind != RL
    if coefficients[3] or (coefficients[2] and columns.ref_logp is not None):
        moves = torch.ones_like(moves)
    return (columns.weight != 0) & (moves | (columns.advantage != 0))


def _add_chunk(
    head: TritonHead, chunk: Tensor, scores: Scores, columns: Columns, coefficients: list[float], gradients: Gradients
) -> None:
    """Score the rows ``chunk`` and add their gradients, less the rows that turn out to have none (the clipped)."""
    kept = Kept.empty(head, chunk.numel()) if head.softcap == 0 else None
    score(head, chunk, scores, kept)
    entropy = scores.entropy if scores.entropy.numel() else None
    dlogp, dentropy = _derivatives(chunk, scores.logp, entropy, columns, coefficients)
    live = live_rows(dlogp[chunk], None if dentropy is None else dentropy[chunk])
    *flag, n_live = torch.cat([scores.flag, live.sum(dtype=torch.int32)[None]]).tolist()  # one read for both
    raise_flag(flag, head.n_vocab, head.hidden_RH.shape[0])
    if n_live == 0:
        return
    if kept is None:
        select = chunk[live]
        gradients.add(select, logit_gradient(head, select, scores, dlogp, dentropy))
    else:
        source = fill_holes(live, n_live)
        dlogits_nV = kept_logit_gradient(head, kept, source, chunk, scores, dlogp, dentropy)
        gradients.add(chunk[source], dlogits_nV)


@linear_cotrain_loss_op.register_fake
def _(
    hidden, weight, bias, target, rows, inv_temperature, softcap, operand_dtype, entropy, old_logp, advantage,
    row_weight, kind, component, branch, ref_logp, coefficients, needs,
):  # fmt: skip
    new, n_vocab = hidden.new_empty, weight.shape[0]
    gradients = (
        new(hidden.shape if needs[0] else 0, dtype=torch.float32),
        new(weight.shape if needs[1] else 0, dtype=torch.float32),
        new(n_vocab if needs[2] else 0, dtype=torch.float32),
    )
    return new((), dtype=torch.float32), new(len(METRICS), *_CELLS, dtype=torch.float64), *gradients


def _setup_fused(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.needs = inputs[-1]
    ctx.dtypes = [None if operand is None else operand.dtype for operand in inputs[:3]]


def _backward_fused(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    found = (
        scaled(gradient, dloss, dtype) if need else None
        for gradient, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs)
    )
    return *found, *(None,) * 15


linear_cotrain_loss_op.register_autograd(_backward_fused, setup_context=_setup_fused)
