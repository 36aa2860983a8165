"""Triton kernels of tree attention: forward, dQ over ancestors, dK and dV over descendants and grouped heads.

Tiles come from the work lists (``work.py``): whole tiles without a mask, partial ones with ``key <= query < end[key]``.
float32 softmax and accumulation; every sum has one order, no atomics. Launches are in ``ops.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(p_base, o_row, n_length, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows [BLOCK, BLOCK_D] of one head; rows past the end read the last one, columns past D are 0."""
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_base + tl.minimum(o_row, n_length - 1).to(tl.int64)[:, None] * stride + o_d[None, :]
    if D == BLOCK_D:
        b_rows = tl.load(p_rows)
    else:
        b_rows = tl.load(p_rows, mask=(o_d < D)[None, :], other=0.0)
    if UPCAST:  # the interpreter's dot is wrong for bf16
        b_rows = b_rows.to(tl.float32)
    return b_rows


@triton.jit
def store_rows(p_base, b_rows, o_row, n_length, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    m_rows = (o_row < n_length)[:, None] & (o_d < D)[None, :]
    p_rows = p_base + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    tl.store(p_rows, b_rows.to(p_base.dtype.element_ty), mask=m_rows)


@triton.jit
def scores(b_q, b_k, o_q, o_k, p_end, n_length, scale, PARTIAL: tl.constexpr):
    """``scale log2(e) q k^T`` [M, N], -inf where the query does not see the key."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * (scale * LOG2E)  # [M, D] x [D, N]
    if PARTIAL:
        b_end = tl.load(p_end + o_k, mask=o_k < n_length, other=0)
        m_seen = (o_k[None, :] <= o_q[:, None]) & (o_q[:, None] < b_end[None, :])
        b_s = tl.where(m_seen, b_s, NEGATIVE_INFINITY)
    return b_s


@triton.jit
def forward_tile(
    b_q, b_acc, b_max, b_sum, p_k, p_v, p_end, o_q, i_k, n_length, stride_k, stride_v, scale,
    PARTIAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax."""
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    b_k = load_rows(p_k, o_k, n_length, stride_k, D, BLOCK_D, UPCAST)
    b_s = scores(b_q, b_k, o_q, o_k, p_end, n_length, scale, PARTIAL)
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_centre = tl.where(b_new == NEGATIVE_INFINITY, 0.0, b_new)  # a row that saw nothing yet
    b_alpha = tl.exp2(b_max - b_centre)
    b_p = tl.exp2(b_s - b_centre[:, None])
    b_v = load_rows(p_v, o_k, n_length, stride_v, D, BLOCK_D, UPCAST)
    b_acc = b_acc * b_alpha[:, None]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")  # [M, N] x [N, D]
    return b_acc, b_new, b_sum * b_alpha + tl.sum(b_p, 1)


@triton.jit
def tree_forward_kernel(
    p_q, p_k, p_v, p_end, p_start, p_middle, p_index, p_out, p_lse, n_length,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_out, stride_outh, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp (nats, [Hq, L]) of one tile of queries of one head."""
    i_q, i_h = tl.program_id(0), tl.program_id(1)
    i_g = i_h // GROUP
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_q = load_rows(p_q + i_h * stride_qh, o_q, n_length, stride_q, D, BLOCK_D, UPCAST)
    p_kh, p_vh = p_k + i_g * stride_kh, p_v + i_g * stride_vh
    b_acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_Q], NEGATIVE_INFINITY, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
    begin, middle, end = tl.load(p_start + i_q), tl.load(p_middle + i_q), tl.load(p_start + i_q + 1)
    for i_at in range(begin, middle):
        b_acc, b_max, b_sum = forward_tile(
            b_q, b_acc, b_max, b_sum, p_kh, p_vh, p_end, o_q, tl.load(p_index + i_at), n_length, stride_k, stride_v,
            scale, False, D, BLOCK_D, BLOCK_K, UPCAST,
        )  # fmt: skip
    for i_at in range(middle, end):
        b_acc, b_max, b_sum = forward_tile(
            b_q, b_acc, b_max, b_sum, p_kh, p_vh, p_end, o_q, tl.load(p_index + i_at), n_length, stride_k, stride_v,
            scale, True, D, BLOCK_D, BLOCK_K, UPCAST,
        )  # fmt: skip
    store_rows(p_out + i_h * stride_outh, b_acc / b_sum[:, None], o_q, n_length, stride_out, D, BLOCK_D)
    b_lse = (b_max + tl.log2(b_sum)) / LOG2E
    tl.store(p_lse + i_h.to(tl.int64) * n_length + o_q, b_lse, mask=o_q < n_length)


@triton.jit
def tree_delta_kernel(
    p_out, p_dout, p_delta, n_length, stride_out, stride_outh, stride_dout, stride_douth,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """``rowsum(dO O)``, float32 [Hq, L]."""
    i_q, i_h = tl.program_id(0), tl.program_id(1)
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_out = load_rows(p_out + i_h * stride_outh, o_q, n_length, stride_out, D, BLOCK_D, True)
    b_dout = load_rows(p_dout + i_h * stride_douth, o_q, n_length, stride_dout, D, BLOCK_D, True)
    tl.store(p_delta + i_h.to(tl.int64) * n_length + o_q, tl.sum(b_out * b_dout, 1), mask=o_q < n_length)


@triton.jit
def pair_gradient(
    b_q, b_k, b_v, b_dout, b_lse, b_delta, o_q, o_k, p_end, n_length, scale, PARTIAL: tl.constexpr
):  # fmt: skip
    """``P = exp(S - lse)`` and ``dS = scale P (dO V^T - delta)``, [M, N]."""
    b_s = scores(b_q, b_k, o_q, o_k, p_end, n_length, scale, PARTIAL)
    b_p = tl.exp2(b_s - (b_lse * LOG2E)[:, None])
    b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision="ieee")  # [M, D] x [D, N]
    return b_p, b_p * (b_dp - b_delta[:, None]) * scale


@triton.jit
def dq_tile(
    b_dq, b_q, b_dout, b_lse, b_delta, p_k, p_v, p_end, o_q, i_k, n_length, stride_k, stride_v, scale,
    PARTIAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``dQ += dS K`` of one tile of keys."""
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    b_k = load_rows(p_k, o_k, n_length, stride_k, D, BLOCK_D, UPCAST)
    b_v = load_rows(p_v, o_k, n_length, stride_v, D, BLOCK_D, UPCAST)
    _, b_ds = pair_gradient(b_q, b_k, b_v, b_dout, b_lse, b_delta, o_q, o_k, p_end, n_length, scale, PARTIAL)
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")  # [M, N] x [N, D]


@triton.jit
def tree_dq_kernel(
    p_q, p_k, p_v, p_dout, p_lse, p_delta, p_end, p_start, p_middle, p_index, p_dq, n_length,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_dout, stride_douth, stride_dq, stride_dqh,
    scale, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries of one head."""
    i_q, i_h = tl.program_id(0), tl.program_id(1)
    i_g = i_h // GROUP
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_q = o_q < n_length
    b_q = load_rows(p_q + i_h * stride_qh, o_q, n_length, stride_q, D, BLOCK_D, UPCAST)
    b_dout = load_rows(p_dout + i_h * stride_douth, o_q, n_length, stride_dout, D, BLOCK_D, UPCAST)
    b_lse = tl.load(p_lse + i_h.to(tl.int64) * n_length + o_q, mask=m_q, other=0.0)
    b_delta = tl.load(p_delta + i_h.to(tl.int64) * n_length + o_q, mask=m_q, other=0.0)
    p_kh, p_vh = p_k + i_g * stride_kh, p_v + i_g * stride_vh
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    begin, middle, end = tl.load(p_start + i_q), tl.load(p_middle + i_q), tl.load(p_start + i_q + 1)
    for i_at in range(begin, middle):
        b_dq = dq_tile(
            b_dq, b_q, b_dout, b_lse, b_delta, p_kh, p_vh, p_end, o_q, tl.load(p_index + i_at), n_length,
            stride_k, stride_v, scale, False, D, BLOCK_D, BLOCK_K, UPCAST,
        )  # fmt: skip
    for i_at in range(middle, end):
        b_dq = dq_tile(
            b_dq, b_q, b_dout, b_lse, b_delta, p_kh, p_vh, p_end, o_q, tl.load(p_index + i_at), n_length,
            stride_k, stride_v, scale, True, D, BLOCK_D, BLOCK_K, UPCAST,
        )  # fmt: skip
    store_rows(p_dq + i_h * stride_dqh, b_dq, o_q, n_length, stride_dq, D, BLOCK_D)


@triton.jit
def dkv_tile(
    b_dk, b_dv, b_k, b_v, p_q, p_dout, p_lse, p_delta, p_end, o_k, i_q, n_length, stride_q, stride_dout, scale,
    PARTIAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``dV += P^T dO`` and ``dK += dS^T Q`` of one tile of queries. A query past the end has P = 0."""
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_q = o_q < n_length
    b_q = load_rows(p_q, o_q, n_length, stride_q, D, BLOCK_D, UPCAST)
    b_dout = load_rows(p_dout, o_q, n_length, stride_dout, D, BLOCK_D, UPCAST)
    b_lse = tl.load(p_lse + o_q, mask=m_q, other=float("inf"))
    b_delta = tl.load(p_delta + o_q, mask=m_q, other=0.0)
    b_p, b_ds = pair_gradient(b_q, b_k, b_v, b_dout, b_lse, b_delta, o_q, o_k, p_end, n_length, scale, PARTIAL)
    b_dv = tl.dot(tl.trans(b_p.to(b_dout.dtype)), b_dout, b_dv, input_precision="ieee")  # [N, M] x [M, D]
    b_dk = tl.dot(tl.trans(b_ds.to(b_q.dtype)), b_q, b_dk, input_precision="ieee")  # [N, M] x [M, D]
    return b_dk, b_dv


@triton.jit
def tree_dkv_kernel(
    p_q, p_k, p_v, p_dout, p_lse, p_delta, p_end, p_start, p_middle, p_index, p_dk, p_dv, n_length,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_dout, stride_douth, stride_dk, stride_dkh,
    scale, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one key head: over the query heads that share it and the tiles below it."""
    i_k, i_g = tl.program_id(0), tl.program_id(1)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    b_k = load_rows(p_k + i_g * stride_kh, o_k, n_length, stride_k, D, BLOCK_D, UPCAST)
    b_v = load_rows(p_v + i_g * stride_vh, o_k, n_length, stride_v, D, BLOCK_D, UPCAST)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    begin, middle, end = tl.load(p_start + i_k), tl.load(p_middle + i_k), tl.load(p_start + i_k + 1)
    for i_h in range(i_g * GROUP, i_g * GROUP + GROUP):
        p_qh, p_douth = p_q + i_h * stride_qh, p_dout + i_h * stride_douth
        o_head = tl.cast(i_h, tl.int64) * n_length
        for i_at in range(begin, middle):
            b_dk, b_dv = dkv_tile(
                b_dk, b_dv, b_k, b_v, p_qh, p_douth, p_lse + o_head, p_delta + o_head, p_end, o_k,
                tl.load(p_index + i_at), n_length, stride_q, stride_dout, scale, False, D, BLOCK_D, BLOCK_Q, UPCAST,
            )  # fmt: skip
        for i_at in range(middle, end):
            b_dk, b_dv = dkv_tile(
                b_dk, b_dv, b_k, b_v, p_qh, p_douth, p_lse + o_head, p_delta + o_head, p_end, o_k,
                tl.load(p_index + i_at), n_length, stride_q, stride_dout, scale, True, D, BLOCK_D, BLOCK_Q, UPCAST,
            )  # fmt: skip
    store_rows(p_dk + i_g * stride_dkh, b_dk, o_k, n_length, stride_dk, D, BLOCK_D)
    store_rows(p_dv + i_g * stride_dkh, b_dv, o_k, n_length, stride_dk, D, BLOCK_D)
