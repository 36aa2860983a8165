"""The Triton backend of tree_attention: launches of its kernels, as torch custom operators with autograd."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from pact_kernels.backend import INTERPRETED, require_triton
from pact_kernels.tiles import JOIN_WARPS, PIECE_TILES, PIECES, TreeTile, TreeTiles, tree_tiles
from pact_kernels.tree_attention.operators import differentiable, empty_like
from pact_kernels.tree_attention.triton import (
    tree_delta_kernel,
    tree_dkv_kernel,
    tree_dq_kernel,
    tree_forward_kernel,
    tree_join_kernel,
)
from pact_kernels.tree_attention.work import KEY_LISTS, QUERY_PIECES


def forward(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and the statistics of its rows."""
    q, k, v, scale = *(_unit_stride(x) for x in (q.neg() if scale < 0 else q, k, v)), abs(scale)
    (length, heads, _), tile = q.shape, _tiles(q).forward
    out, statistics = empty_like(q), statistics_like(q)
    tree_forward_kernel[(triton.cdiv(length, tile.block_q), heads)](
        q, k, v, subtree_end, *KEY_LISTS.of(subtree_end, tile.block_q, tile.block_k), out, *statistics, length,
        *_strides(q, k, v, out), scale, **_meta(q, k, tile),
    )  # fmt: skip
    return out, statistics


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, subtree_end: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each accumulated in float32 and rounded once."""
    if scale < 0:  # (-q, -scale) has the same scores
        dq, dk, dv = backward(dout, q.neg(), k, v, out, statistics, subtree_end, -scale)
        return dq.neg_(), dk, dv
    dout, q, k, v = (_unit_stride(x) for x in (dout, q, k, v))
    dq, dk, dv = (empty_like(x) for x in (q, k, v))
    delta = torch.empty_like(statistics[0])
    (length, heads, _), tiles = q.shape, _tiles(q)
    meta, grid = _meta(q, k, tiles.dq), (triton.cdiv(length, tiles.dq.block_q), heads)
    tree_delta_kernel[grid](
        out, dout, delta, length, *_strides(out, dout), D=meta["D"], BLOCK_D=meta["BLOCK_D"], BLOCK_Q=meta["BLOCK_Q"]
    )
    operands = (q, k, v, dout, *statistics, delta, subtree_end)
    lists = KEY_LISTS.of(subtree_end, tiles.dq.block_q, tiles.dq.block_k)
    tree_dq_kernel[grid](*operands, *lists, dq, length, *_strides(q, k, v, dout, dq), scale, **meta)

    meta = _meta(q, k, tiles.dkv)
    pieces = QUERY_PIECES.of(subtree_end, tiles.dkv.block_q, tiles.dkv.block_k, PIECE_TILES, PIECES)
    parts = delta.new_empty(2, pieces.n_slots, k.shape[1], meta["BLOCK_K"], meta["BLOCK_D"])
    tree_dkv_kernel[(pieces.tile.numel(), k.shape[1])](
        *operands, *pieces[:6], dk, dv, *parts, length, *_strides(q, k, v, dout, dk), scale, **meta
    )
    if pieces.n_slots:
        tree_join_kernel[(pieces.split.numel(), k.shape[1])](
            *parts, pieces.split, pieces.first, dk, dv, length, *_strides(dk),
            D=meta["D"], BLOCK_D=meta["BLOCK_D"], BLOCK_K=meta["BLOCK_K"], num_warps=JOIN_WARPS,
        )  # fmt: skip
    return dq, dk, dv


def statistics_like(q: Tensor) -> Tensor:
    """Room for the centre and the log-sum of each row, base 2: float32 [2, Hq, L]."""
    return q.new_empty(2, q.shape[1], q.shape[0], dtype=torch.float32)


tree_triton = differentiable("tree_triton", forward, backward, statistics_like)


def _tiles(q: Tensor) -> TreeTiles:
    return tree_tiles(require_triton("tree_attention", q.device), q.dtype.itemsize, q.shape[2])


def _meta(q: Tensor, k: Tensor, tile: TreeTile) -> dict[str, Any]:
    """The compile-time settings of a matmul kernel."""
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[2],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[2])),
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "UPCAST": INTERPRETED,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _unit_stride(x_LHD: Tensor) -> Tensor:
    return x_LHD if x_LHD.stride(-1) == 1 else x_LHD.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Those of rows and heads, tensor by tensor."""
    return [stride for x in tensors for stride in x.stride()[:2]]
