"""Launches of the head kernels on plain tensors: scores of selected rows, dL/du of a chunk, gradients of the operands.

It knows no autograd and no losses; the custom operators in ``ops.py`` (here and beside the loss) are made of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from pact_kernels.backend import INTERPRETED, require_triton
from pact_kernels.linear_logprob.triton import (
    gather_sum_kernel,
    head_combine_kernel,
    head_dlogits_kernel,
    head_forward_kernel,
    head_kept_dlogits_kernel,
)
from pact_kernels.tiles import COMBINE_ROWS, GATHER_COLUMNS, HEAD_TILES, KEPT_TILE, SPLIT_COLUMNS, HeadTile

FLAGS = ("target", "rows", "temperature")  # what the flag's three numbers are about


@dataclass
class ChunkBudget:
    """``dlogits``: bytes of one chunk's dL/du, in the operands' dtype; never fewer rows than one tile.

    Few chunks: each reads and writes the float32 dWeight once.
    """

    dlogits: int = 2**30


BUDGET = ChunkBudget()


@dataclass(frozen=True)
class TritonHead:
    """The operands of one call in one dtype, with unit stride along H; ``softcap`` 0 is none."""

    hidden_RH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    target_N: Tensor
    rows_N: Tensor
    inv_temperature_N: Tensor | None
    softcap: float
    tile: HeadTile

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        rows: Tensor,
        inv_temperature: Tensor | None,
        softcap: float,
        dtype: torch.dtype,
    ) -> TritonHead:
        """Round to ``dtype`` and look up the tile."""
        tile = HEAD_TILES[require_triton("linear_logprob", hidden.device)][dtype.itemsize]
        hidden, weight = _aligned(hidden.to(dtype)), _aligned(weight.to(dtype))
        if weight.stride(0) * tile.block_v >= 2**31:  # offsets within a tile are 32-bit
            weight = weight.contiguous()
        bias = None if bias is None else bias.to(dtype).contiguous()
        inv_temperature = None if inv_temperature is None else inv_temperature.contiguous()
        rowwise = (target.contiguous(), rows.contiguous(), inv_temperature)
        return cls(hidden, weight, bias, *rowwise, softcap, tile)

    @property
    def n_vocab(self) -> int:
        """V."""
        return self.weight_VH.shape[0]

    def chunk_rows(self) -> int:
        """Rows of one chunk: whole tiles within the budget."""
        line = self.n_vocab * self.hidden_RH.dtype.itemsize
        return max(1, BUDGET.dlogits // line // self.tile.block_n) * self.tile.block_n

    def meta(self, tile: HeadTile) -> dict[str, int | bool]:
        """The compile-time settings of a matmul kernel."""
        return {
            "HAS_BIAS": self.bias_V is not None,
            "HAS_SOFTCAP": self.softcap > 0,
            "HAS_SCALE": self.inv_temperature_N is not None,
            "BLOCK_N": tile.block_n,
            "BLOCK_V": tile.block_v,
            "BLOCK_H": tile.block_h,
            "EVEN_H": self.hidden_RH.shape[1] % tile.block_h == 0,
            "UPCAST": INTERPRETED,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }


def _aligned(value: Tensor) -> Tensor:
    """``value`` [n, H] with unit stride along H and rows that begin at multiples of 16 elements: a copy where H is odd.

    The kernels are compiled for that alone: without it loads are narrow, and one of them spills on sm_90.
    """
    if value.stride(-1) == 1 and value.stride(0) % 16 == 0 and value.data_ptr() % 16 == 0:
        return value
    width = value.shape[1]
    padded = value.new_zeros(value.shape[0], triton.cdiv(width, 16) * 16)[:, :width]
    return padded.copy_(value)


@contextmanager
def plain_context(value: Tensor) -> Iterator[None]:
    """On the device of ``value``, where Triton launches, and without autocast, which would round the matmuls."""
    with torch.cuda.device_of(value), torch.autocast(value.device.type, enabled=False):
        yield


class Scores(NamedTuple):
    """Row-wise results [N], float32; ``centre`` is the row's maximum m, ``log_total`` is log of the sum of e^(z-m).

    ``entropy`` is empty unless asked for. ``flag`` [3] int32: see ``FLAGS``.
    """

    logp: Tensor
    entropy: Tensor
    centre: Tensor
    log_total: Tensor
    flag: Tensor

    @classmethod
    def empty(cls, n: int, entropy: bool, device: torch.device) -> Scores:
        """Room for n rows."""
        new = partial(torch.empty, dtype=torch.float32, device=device)
        flag = torch.zeros(len(FLAGS), dtype=torch.int32, device=device)
        return cls(new(n), new(n if entropy else 0), new(n), new(n), flag)


class Kept(NamedTuple):
    """A chunk's exponentials, one line a row of the chunk, and the maximum each tile was centred on [tiles, lines]."""

    exp: Tensor  # whole tiles: see ``tile_buffer``
    max_Tn: Tensor

    @classmethod
    def empty(cls, head: TritonHead, n: int) -> Kept:
        """Room for a chunk of n rows."""
        tiles = triton.cdiv(head.n_vocab, head.tile.block_v)
        return cls(tile_buffer(head, n), head.hidden_RH.new_empty(tiles, n, dtype=torch.float32))


def tile_buffer(head: TritonHead, n: int) -> Tensor:
    """Room for n lines of V columns in whole tiles, in the operands' dtype: stores need no mask, and lines begin where
    a matmul likes them whatever V is. Read ``[:n, :V]`` of it."""
    sizes = ((n, head.tile.block_n), (head.n_vocab, head.tile.block_v))
    return head.hidden_RH.new_empty(*(triton.cdiv(size, block) * block for size, block in sizes))


def score(head: TritonHead, select: Tensor, scores: Scores, kept: Kept | None = None) -> None:
    """Fill ``scores`` (and ``kept``, line by line) for the rows ``select`` [n]."""
    n, (n_hidden, width) = select.numel(), head.hidden_RH.shape
    if n == 0:
        return
    entropy = scores.entropy.numel() > 0
    per_split = triton.cdiv(SPLIT_COLUMNS, head.tile.block_v) * head.tile.block_v
    splits = triton.cdiv(head.n_vocab, per_split)
    new = head.hidden_RH.new_empty
    parts = new(3 if entropy else 2, splits, n, dtype=torch.float32)
    target_z = new(n, dtype=torch.float32)
    kept_exp, kept_max = kept if kept is not None else (None, None)
    head_forward_kernel[(triton.cdiv(n, head.tile.block_n), splits)](
        head.hidden_RH, head.weight_VH, head.bias_V, head.target_N, head.rows_N, head.inv_temperature_N, select,
        parts[0], parts[1], parts[-1], target_z, kept_exp, kept_max,
        n, n_hidden, head.n_vocab, width, per_split, head.hidden_RH.stride(0), head.weight_VH.stride(0),
        kept_exp.stride(0) if kept_exp is not None else 0, head.softcap,
        ENTROPY=entropy, KEEP=kept is not None, **head.meta(head.tile),
    )  # fmt: skip
    head_combine_kernel[(triton.cdiv(n, COMBINE_ROWS),)](
        select, head.target_N, head.rows_N, head.inv_temperature_N, parts[0], parts[1], parts[-1], target_z,
        *scores, n, n_hidden, head.n_vocab, splits,
        HAS_SCALE=head.inv_temperature_N is not None, ENTROPY=entropy, BLOCK_N=COMBINE_ROWS,
    )  # fmt: skip


def logit_gradient(head: TritonHead, select: Tensor, scores: Scores, dlogp: Tensor, dentropy: Tensor | None) -> Tensor:
    """dL/du [n, V] of the rows ``select``, logits computed anew; in the operands' dtype."""
    n, (n_hidden, width), tile = select.numel(), head.hidden_RH.shape, head.tile.backward(head.softcap > 0)
    out = tile_buffer(head, n)
    grid = (triton.cdiv(n, tile.block_n), triton.cdiv(head.n_vocab, tile.block_v))
    head_dlogits_kernel[grid](
        head.hidden_RH, head.weight_VH, head.bias_V, head.target_N, head.rows_N, head.inv_temperature_N, select,
        scores.centre, scores.log_total, scores.entropy, dlogp, dentropy, out,
        n, n_hidden, head.n_vocab, width, head.hidden_RH.stride(0), head.weight_VH.stride(0), out.stride(0),
        head.softcap, ENTROPY=dentropy is not None, **head.meta(tile),
    )  # fmt: skip
    return out[:n, : head.n_vocab]


def kept_logit_gradient(
    head: TritonHead, kept: Kept, source: Tensor, select: Tensor, scores: Scores, dlogp: Tensor, dentropy: Tensor | None
) -> Tensor:
    """dL/du of the lines ``source`` of ``kept`` (see ``fill_holes``), written over its first lines; no softcap."""
    n, lines, n_vocab = source.numel(), kept.max_Tn.shape[1], head.n_vocab
    rows, warps = KEPT_TILE
    head_kept_dlogits_kernel[(triton.cdiv(n, rows), triton.cdiv(n_vocab, head.tile.block_v))](
        *kept, source, select, head.target_N, head.inv_temperature_N,
        scores.centre, scores.log_total, scores.logp, scores.entropy, dlogp, dentropy,
        n, lines, n_vocab, kept.exp.stride(0),
        HAS_SCALE=head.inv_temperature_N is not None, ENTROPY=dentropy is not None,
        BLOCK_N=rows, BLOCK_V=head.tile.block_v, num_warps=warps,
    )  # fmt: skip
    return kept.exp[:n, :n_vocab]


def fill_holes(live_n: Tensor, n_live: int) -> Tensor:
    """Which line each of the first ``n_live`` lines takes: its own if it is live, else one from behind them.

    The lines behind are read and never written, so the lines may be moved in any order, by programs that do not wait
    for each other: the live lines close ranks without a copy of the chunk.
    """
    lines = torch.arange(n_live, device=live_n.device)
    spare = live_n[n_live:].nonzero()[:, 0] + n_live
    lines[~live_n[:n_live]] = spare
    return lines


class Gradients:
    """Sums of dL/dhidden, dL/dweight and dL/dbias over chunks, float32; None where nobody needs one.

    dHidden has one line a row that was added (at most ``n_lines``), summed into the hidden rows at the end.
    """

    def __init__(self, head: TritonHead, needs: list[bool], n_lines: int) -> None:
        hidden = head.hidden_RH
        self.head, self.end, width = head, 0, hidden.shape[1]
        self.line_nH = hidden.new_empty(n_lines, width, dtype=torch.float32) if needs[0] else None
        self.row_n = head.rows_N.new_empty(n_lines)
        self.weight_VH = hidden.new_zeros(head.n_vocab, width, dtype=torch.float32) if needs[1] else None
        self.bias_V = hidden.new_zeros(head.n_vocab, dtype=torch.float32) if needs[2] else None

    def add(self, rows: Tensor, gradient_nV: Tensor) -> None:
        """Add dL/du of ``rows``."""
        begin, self.end = self.end, self.end + rows.numel()
        hidden_rows = self.head.rows_N[rows]
        if self.line_nH is not None:
            self.row_n[begin : self.end] = hidden_rows
            self.line_nH[begin : self.end] = matmul(gradient_nV, self.head.weight_VH)
        if self.weight_VH is not None:
            add_matmul(self.weight_VH, gradient_nV.T, self.head.hidden_RH[hidden_rows])
        if self.bias_V is not None:
            self.bias_V += gradient_nV.sum(dim=0, dtype=torch.float32)

    def hidden_RH(self, dtype: torch.dtype) -> Tensor | None:
        """dL/dhidden, rounded once."""
        if self.line_nH is None:
            return None
        out = torch.empty_like(self.head.hidden_RH, dtype=dtype, memory_format=torch.contiguous_format)
        if out.numel():
            ordered, order = self.row_n[: self.end].sort(stable=True)
            start = torch.searchsorted(ordered, torch.arange(out.shape[0] + 1, device=out.device))
            gather_sum_kernel[(out.shape[0], triton.cdiv(out.shape[1], GATHER_COLUMNS))](
                self.line_nH, order, start, out, out.shape[1], out.shape[1], out.shape[1], BLOCK_H=GATHER_COLUMNS
            )
        return out


def live_rows(dlogp: Tensor, dentropy: Tensor | None) -> Tensor:
    """Whether c and e are not both exactly 0 (NaN counts as not 0)."""
    return dlogp != 0 if dentropy is None else (dlogp != 0) | (dentropy != 0)


SYNCHRONISES = (torch.Tag.cudagraph_unsafe,)  # tag of operators that read something back


@torch.library.custom_op("pact_kernels::scaled", mutates_args=())
def scaled(gradient: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * dloss`` in ``dtype``. An operator without a derivative: the losses are differentiable once, and a
    second derivative is an error."""
    return torch.mul(gradient, dloss, out=torch.empty_like(gradient, dtype=dtype))


@scaled.register_fake
def _(gradient, dloss, dtype):
    return torch.empty_like(gradient, dtype=dtype)


def raise_flag(flag: list[int], n_vocab: int, n_hidden: int) -> None:
    """ValueError for what the kernels found out of range."""
    ranges = (
        f"must lie in 0..{n_vocab - 1} (the vocabulary)",
        f"must lie in 0..{n_hidden - 1} (the rows of hidden)",
        "must be positive and finite in every row",
    )
    wrong = [f"{name} {what}" for name, what, bad in zip(FLAGS, ranges, flag, strict=True) if bad]
    if wrong:
        raise ValueError("; ".join(wrong) + ", and some are not")


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, accumulated and returned in float32."""
    if left.dtype == torch.float32 or not left.is_cuda:  # the CPU has no matmul that widens
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in float32."""
    if left.dtype == torch.float32 or not left.is_cuda:
        total.addmm_(left.float(), right.float())
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
