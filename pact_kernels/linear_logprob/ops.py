"""The Triton backend of linear_logprob as torch custom operators: launches, chunks, matmuls and autograd.

Tensors and numbers in and out; checks are the api's. The backward makes dL/du of a chunk of live rows with Triton and
leaves the two matmuls to torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from pact_kernels.backend import INTERPRETED, require_triton
from pact_kernels.linear_logprob.triton import (
    gather_sum_kernel,
    head_combine_kernel,
    head_dlogits_kernel,
    head_forward_kernel,
)
from pact_kernels.tiles import HEAD_TILES, SPLIT_COLUMNS, HeadTile

BLOCK_COMBINE = 128
BLOCK_GATHER = 256


@dataclass
class ChunkBudget:
    """``dlogits``: bytes of one chunk's dL/du, in the operands' dtype; never fewer rows than one tile."""

    dlogits: int = 512 * 2**20


BUDGET = ChunkBudget()


def _tile(hidden: Tensor) -> HeadTile:
    return HEAD_TILES[require_triton("linear_logprob", hidden.device)][hidden.dtype.itemsize]


def _meta(tile: HeadTile) -> dict[str, int | bool]:
    return {
        "BLOCK_N": tile.block_n,
        "BLOCK_V": tile.block_v,
        "BLOCK_H": tile.block_h,
        "UPCAST": INTERPRETED,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


@torch.library.custom_op("pact_kernels::head_forward", mutates_args=())
def head_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rows: Tensor,
    inv_temperature: Tensor | None,
    softcap: float,
    operand_dtype: torch.dtype,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp [N], entropy [N] (empty unless asked for) and log-sum-exp [N], float32. ``softcap`` 0 is none.

    hidden [R, H], weight [V, H] and bias [V] are rounded to ``operand_dtype`` first.
    """
    hidden, weight, bias = _operands(hidden, weight, bias, operand_dtype)
    n, vocab = target.numel(), weight.shape[0]
    logp = hidden.new_empty(n, dtype=torch.float32)
    lse = torch.empty_like(logp)
    entropies = hidden.new_empty(n if entropy else 0, dtype=torch.float32)
    if n == 0:
        return logp, entropies, lse
    tile = _tile(hidden)
    per_split = triton.cdiv(SPLIT_COLUMNS, tile.block_v) * tile.block_v
    splits = triton.cdiv(vocab, per_split)
    parts = hidden.new_empty(3 if entropy else 2, splits, n, dtype=torch.float32)
    target_z = hidden.new_empty(n, dtype=torch.float32)
    head_forward_kernel[(triton.cdiv(n, tile.block_n), splits)](
        hidden, weight, bias, target, rows, inv_temperature, parts[0], parts[1], parts[-1], target_z,
        n, vocab, hidden.shape[1], per_split, hidden.stride(0), weight.stride(0), softcap,
        HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap > 0, HAS_SCALE=inv_temperature is not None, ENTROPY=entropy,
        **_meta(tile),
    )  # fmt: skip
    head_combine_kernel[(triton.cdiv(n, BLOCK_COMBINE),)](
        parts[0], parts[1], parts[-1], target_z, logp, entropies, lse, n, splits,
        ENTROPY=entropy, BLOCK_N=BLOCK_COMBINE,
    )  # fmt: skip
    return logp, entropies, lse


@head_forward.register_fake
def _(hidden, weight, bias, target, rows, inv_temperature, softcap, operand_dtype, entropy):
    n = target.shape[0]
    new = hidden.new_empty
    return new(n, dtype=torch.float32), new(n if entropy else 0, dtype=torch.float32), new(n, dtype=torch.float32)


@torch.library.custom_op("pact_kernels::head_backward", mutates_args=())
def head_backward(
    dlogp: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rows: Tensor,
    inv_temperature: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    softcap: float,
    operand_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias in their dtypes, accumulated in float32; empty where not ``needs``."""
    dtype, n_hidden = hidden.dtype, hidden.shape[0]
    hidden, weight, bias = _operands(hidden, weight, bias, operand_dtype)
    live = _live_rows(dlogp, dentropy)
    (n_vocab, width), tile = weight.shape, _tile(hidden)
    new = hidden.new_zeros
    dhidden_nH = new(live.numel() if needs[0] else 0, width, dtype=torch.float32)
    dweight_VH = new(n_vocab if needs[1] else 0, width, dtype=torch.float32)
    dbias_V = new(n_vocab if needs[2] else 0, dtype=torch.float32)
    step = max(tile.block_n, BUDGET.dlogits // (n_vocab * hidden.dtype.itemsize) // tile.block_n * tile.block_n)
    for chunk_begin in range(0, live.numel(), step):
        chunk = slice(chunk_begin, chunk_begin + step)
        rows_n = live[chunk]
        dlogits_nV = hidden.new_empty(rows_n.numel(), n_vocab)
        head_dlogits_kernel[(triton.cdiv(rows_n.numel(), tile.block_n), triton.cdiv(n_vocab, tile.block_v))](
            hidden, weight, bias, target, rows, inv_temperature, rows_n, lse, entropy, dlogp, dentropy, dlogits_nV,
            rows_n.numel(), n_vocab, width, hidden.stride(0), weight.stride(0), dlogits_nV.stride(0), softcap,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap > 0, HAS_SCALE=inv_temperature is not None,
            ENTROPY=dentropy is not None, **_meta(tile),
        )  # fmt: skip
        if needs[0]:
            dhidden_nH[chunk] = _matmul(dlogits_nV, weight)
        if needs[1]:
            _add_matmul(dweight_VH, dlogits_nV.T, hidden[rows[rows_n]])
        if needs[2]:
            dbias_V += dlogits_nV.sum(dim=0, dtype=torch.float32)
    dhidden_RH = _sum_rows(dhidden_nH, rows[live], n_hidden if needs[0] else 0, dtype)
    return dhidden_RH, dweight_VH.to(dtype), dbias_V.to(dtype)


@head_backward.register_fake
def _(
    dlogp, dentropy, hidden, weight, bias, target, rows, inv_temperature, lse, entropy, softcap, operand_dtype, needs
):  # fmt: skip
    (n_hidden, width), n_vocab = hidden.shape, weight.shape[0]
    return (
        hidden.new_empty(n_hidden if needs[0] else 0, width),
        weight.new_empty(n_vocab if needs[1] else 0, width),
        weight.new_empty(n_vocab if needs[2] else 0),
    )


def _setup(ctx, inputs, output):
    hidden, weight, bias, target, rows, inv_temperature, softcap, operand_dtype, entropy = inputs
    ctx.save_for_backward(hidden, weight, bias, target, rows, inv_temperature, output[2], output[1])
    ctx.softcap, ctx.operand_dtype, ctx.entropy = softcap, operand_dtype, entropy
    ctx.set_materialize_grads(False)


def _backward(ctx, dlogp, dentropy, dlse):
    assert dlse is None, "the log-sum-exp is internal"
    hidden, weight, bias, target, rows, inv_temperature, lse, entropy = ctx.saved_tensors
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    if dlogp is None:
        dlogp = torch.zeros_like(lse)
    gradients = head_backward(
        dlogp.contiguous(), dentropy.contiguous() if ctx.entropy and dentropy is not None else None,
        hidden, weight, bias, target, rows, inv_temperature, lse, entropy, ctx.softcap, ctx.operand_dtype,
        needs,
    )  # fmt: skip
    return *(gradient if need else None for gradient, need in zip(gradients, needs)), *(None,) * 6


head_forward.register_autograd(_backward, setup_context=_setup)


def _operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in ``dtype``, with unit stride along H."""
    hidden, weight = (value if value.stride(-1) == 1 else value.contiguous() for value in (hidden, weight))
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype).contiguous()


def _live_rows(dlogp: Tensor, dentropy: Tensor | None) -> Tensor:
    """Rows where c and e are not both exactly 0 (NaN counts as not 0)."""
    return (dlogp != 0 if dentropy is None else (dlogp != 0) | (dentropy != 0)).nonzero()[:, 0]


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right accumulated and returned in float32."""
    if left.dtype == torch.float32 or not left.is_cuda:  # the CPU has no matmul that widens
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def _add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in float32."""
    if left.dtype == torch.float32 or not left.is_cuda:
        total.addmm_(left.float(), right.float())
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def _sum_rows(value_nH: Tensor, rows_n: Tensor, n_hidden: int, dtype: torch.dtype) -> Tensor:
    """[n_hidden, H]: the sum of the lines of ``value_nH`` that belong to each hidden row, in order."""
    width = value_nH.shape[1]
    out = value_nH.new_empty(n_hidden, width, dtype=dtype)
    if out.numel():
        ordered, order = rows_n.sort(stable=True)
        start = torch.searchsorted(ordered, torch.arange(n_hidden + 1, device=rows_n.device))
        gather_sum_kernel[(n_hidden, triton.cdiv(width, BLOCK_GATHER))](
            value_nH, order, start, out, width, value_nH.stride(0), out.stride(0), BLOCK_H=BLOCK_GATHER
        )
    return out
