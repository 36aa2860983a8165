"""The torch backend of tree attention: tiles of queries against the gathered keys of their paths. No [L, L] mask.

In pre-order the tokens before position ``a`` that any token at or after ``a`` can see are exactly the ancestors of
token ``a``. So a tile of consecutive queries ``[a, b)`` needs the keys of that one path and its own, whatever branches
inside it. Tiles of like length run as one padded batch, which keeps hundreds of short segments as cheap as a long one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pact_kernels.tree_attention.operators import differentiable
from pact_kernels.tree_attention.plans import Plans

# Queries a tile, and the mean path length from which the long tile pays: a long tile wastes pairs where it straddles
# branches (about TILE / mean path of the work), a short one gathers the same keys more often.
SHORT_TILE, LONG_TILE, LONG_PATH = 64, 128, 512
BATCH_KEYS = 4096  # gathered key rows of one batch: bounds the scratch memory and keeps the batch near the caches
MASK_CACHE_BYTES = 8 * 2**20  # bool masks of a whole tree are kept up to here, as long as the tree; else rebuilt


@dataclass(frozen=True)
class _Batch:
    """Tiles of like key count. ``end_TK`` is 0 where a key is padding, so that no query sees it."""

    tile_T: Tensor
    query_TB: Tensor
    key_TK: Tensor
    end_TK: Tensor

    def hidden(self) -> Tensor:
        """[T, 1, B, K] bool: true where the query does not see the key, that is unless ``key <= query < end``."""
        query_TB1, key_T1K = self.query_TB.int()[:, :, None], self.key_TK.int()[:, None, :]
        end_T1K = self.end_TK[:, None, :]
        return (key_T1K > query_TB1).logical_or_(query_TB1 >= end_T1K)[:, None]


class Plan:
    """What the attention of one tree reads where: built once for each tree, used by every layer and by backward."""

    def __init__(self, subtree_end: Tensor):
        length, device = subtree_end.numel(), subtree_end.device
        end = np.append(subtree_end.cpu().numpy(), np.int32(0))  # position `length` stands for a padded key
        n_visible = end[:length].sum(dtype=np.int64) - length * (length - 1) // 2  # sum of subtree_end[k] - k
        self.tile = min(length, LONG_TILE if n_visible >= LONG_PATH * length else SHORT_TILE)
        self.n_tiles = -(-length // self.tile)
        keys = _tile_keys(end, length, self.tile)
        self.batches = []
        for tiles in _group([key.size for key in keys]):
            key_TK = np.full((len(tiles), max(keys[t].size for t in tiles)), length)
            for row, t in enumerate(tiles):
                key_TK[row, : keys[t].size] = keys[t]
            query_TB = np.minimum(np.array(tiles)[:, None] * self.tile + np.arange(self.tile), length - 1)
            columns = (np.array(tiles), query_TB, np.where(key_TK < length, key_TK, 0), end[key_TK])
            self.batches.append(_Batch(*(torch.from_numpy(column).to(device) for column in columns)))
        n_pairs = self.tile * sum(batch.key_TK.numel() for batch in self.batches)
        self._hidden = [batch.hidden() for batch in self.batches] if n_pairs <= MASK_CACHE_BYTES else None

    def masked_batches(self, dtype: torch.dtype) -> Iterator[tuple[_Batch, Tensor]]:
        """Each batch with its additive mask, 0 or -inf in ``dtype``."""
        for i, batch in enumerate(self.batches):
            hidden = batch.hidden() if self._hidden is None else self._hidden[i]
            yield batch, torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def _tile_keys(end: np.ndarray, length: int, tile: int) -> list[np.ndarray]:
    """Ascending key positions of each tile: the ancestors of its first query, then its own range."""
    keys = []
    path = np.empty(0, np.int64)
    for first in range(0, length, tile):
        keys.append(np.append(path, np.arange(first, min(first + tile, length))))
        path = keys[-1][end[keys[-1]] > first + tile]
    return keys


def _group(n_keys: list[int]) -> list[list[int]]:
    """Tiles of neighbouring key counts together, as many as ``BATCH_KEYS`` holds (at least one)."""
    groups: list[list[int]] = []
    for t in sorted(range(len(n_keys)), key=lambda t: -n_keys[t]):
        if not groups or (len(groups[-1]) + 1) * n_keys[groups[-1][0]] > BATCH_KEYS:
            groups.append([])
        groups[-1].append(t)
    return groups


PLANS = Plans(Plan)


def forward(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp. Tiles compute in at least float32."""
    work, plan = torch.promote_types(q.dtype, torch.float32), PLANS.of(subtree_end)
    k, v = k.contiguous(), v.contiguous()  # rows are gathered for every batch
    q_TBHD = _tiles(q, plan)
    out_TBHD = torch.empty_like(q_TBHD)
    lse_TBH = q_TBHD.new_empty(q_TBHD.shape[:3], dtype=work)
    for batch, mask in plan.masked_batches(work):
        q_THBD = q_TBHD[batch.tile_T].to(work).transpose(1, 2)
        out_THBD, lse_THB = attend(q_THBD, _paths(k, batch, work), _paths(v, batch, work), mask, scale)
        out_TBHD[batch.tile_T] = out_THBD.transpose(1, 2).to(q.dtype)
        lse_TBH[batch.tile_T] = lse_THB.transpose(1, 2)
    length = q.shape[0]
    return out_TBHD.flatten(0, 1)[:length], lse_TBH.flatten(0, 1)[:length].T.contiguous()


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, subtree_end: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; those of keys and values add up in at least float32."""
    work, plan, length = lse.dtype, PLANS.of(subtree_end), q.shape[0]
    k, v = k.contiguous(), v.contiguous()
    # Padded queries have zero gradient and add nothing to the keys.
    tiled = [_tiles(x, plan) for x in (dout, q, out)]
    lse_TBH = _tiles(lse.T[..., None], plan)[..., 0]
    dq_TBHD = torch.empty_like(tiled[1])
    dk, dv = (torch.zeros(x.shape, dtype=work, device=x.device) for x in (k, v))
    for batch, mask in plan.masked_batches(work):
        do_THBD, q_THBD, out_THBD = (x[batch.tile_T].to(work).transpose(1, 2) for x in tiled)
        k_TGKD, v_TGKD = _paths(k, batch, work), _paths(v, batch, work)
        lse_THB = lse_TBH[batch.tile_T].transpose(1, 2)
        grads = attend_backward(do_THBD, q_THBD, k_TGKD, v_TGKD, out_THBD, lse_THB, mask, scale)
        dq_TBHD[batch.tile_T] = grads[0].transpose(1, 2).to(q.dtype)
        for total, grad_TGKD in zip((dk, dv), grads[1:]):
            total.index_add_(0, batch.key_TK.flatten(), grad_TGKD.transpose(1, 2).flatten(0, 1))
    return dq_TBHD.flatten(0, 1)[:length], dk.to(k.dtype), dv.to(v.dtype)


tree_tiled = differentiable("tree_tiled", forward, backward)


def _tiles(x_LHD: Tensor, plan: Plan) -> Tensor:
    """[tiles, TILE, H, D], the last tile padded with zero rows."""
    missing = plan.n_tiles * plan.tile - x_LHD.shape[0]
    padded = torch.nn.functional.pad(x_LHD, (0, 0, 0, 0, 0, missing)) if missing else x_LHD.contiguous()
    return padded.unflatten(0, (plan.n_tiles, plan.tile))


def _paths(x_LHD: Tensor, batch: _Batch, work: torch.dtype) -> Tensor:
    """[T, H, K, D]: the keys (values) that each tile reads."""
    rows = x_LHD.flatten(1).index_select(0, batch.key_TK.flatten())
    return rows.to(work).view(*batch.key_TK.shape, *x_LHD.shape[1:]).transpose(1, 2)


def has_flash(x: Tensor) -> bool:
    """Whether torch's flash operators with additive mask, GQA and log-sum-exp exist here; else matmuls do it."""
    return x.device.type == "cpu"


def attend(q_THBD: Tensor, k_TGKD: Tensor, v_TGKD: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of tiles, G key heads for H query heads: output [T, H, B, D] and log-sum-exp [T, H, B]."""
    if has_flash(q_THBD):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_THBD, k_TGKD, v_TGKD, 0.0, False, attn_mask=mask, scale=scale
        )
    score_THBK = _scores(q_THBD, k_TGKD, mask, scale)
    lse_THB = score_THBK.logsumexp(-1)
    return _times_keys(score_THBK.sub_(lse_THB[..., None]).exp_(), v_TGKD), lse_THB


def attend_backward(
    do_THBD: Tensor,
    q_THBD: Tensor,
    k_TGKD: Tensor,
    v_TGKD: Tensor,
    out_THBD: Tensor,
    lse_THB: Tensor,
    mask: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v.

    With P = exp(S - lse) of ``attend``:  dV = P^T dO,  dS = scale P (dO V^T - rowsum(dO O)),  dQ = dS K,  dK = dS^T Q.
    """
    if has_flash(q_THBD):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do_THBD, q_THBD, k_TGKD, v_TGKD, out_THBD, lse_THB, 0.0, False, attn_mask=mask, scale=scale
        )
    p_THBK = _scores(q_THBD, k_TGKD, mask, scale).sub_(lse_THB[..., None]).exp_()
    dv_TGKD = _over_queries(p_THBK, do_THBD, k_TGKD.shape[1])
    delta_THB1 = (do_THBD * out_THBD).sum(-1, keepdim=True)
    ds_THBK = _scores(do_THBD, v_TGKD, None, 1.0).sub_(delta_THB1).mul_(p_THBK).mul_(scale)
    return _times_keys(ds_THBK, k_TGKD), _over_queries(ds_THBK, q_THBD, k_TGKD.shape[1]), dv_TGKD


def _scores(q_THBD: Tensor, k_TGKD: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """scale q k^T + mask, [T, H, B, K]; the query heads of one key head multiply it as one block."""
    n_groups = k_TGKD.shape[1]
    score = q_THBD.unflatten(1, (n_groups, -1)).flatten(2, 3) @ k_TGKD.transpose(-1, -2)
    score_THBK = score.mul_(scale).view(*q_THBD.shape[:3], -1)
    return score_THBK if mask is None else score_THBK.add_(mask)


def _times_keys(p_THBK: Tensor, k_TGKD: Tensor) -> Tensor:
    """p k, [T, H, B, D]."""
    product = p_THBK.unflatten(1, (k_TGKD.shape[1], -1)).flatten(2, 3) @ k_TGKD
    return product.view(*p_THBK.shape[:3], -1)


def _over_queries(p_THBK: Tensor, x_THBD: Tensor, n_groups: int) -> Tensor:
    """p^T x summed over the query heads of each key head, [T, G, K, D]."""
    p_TGQK, x_TGQD = (y.unflatten(1, (n_groups, -1)).flatten(2, 3) for y in (p_THBK, x_THBD))
    return p_TGQK.transpose(-1, -2) @ x_TGQD
