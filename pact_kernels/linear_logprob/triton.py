"""Triton kernels of linear_logprob: forward over vocabulary splits, their combine, and dL/du of a chunk of rows.

Launches, autograd and custom operators are in ``ops.py``. Logits exist in registers only,
in float32, and are never rounded on the way to a log-prob. No atomics; every sum has one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pact_kernels.primitives import NEGATIVE_INFINITY, dot_rows, tanh


@triton.jit
def scored_tile(
    p_hidden, o_hidden, m_n, b_scale, p_weight, p_bias, o_v, m_v, n_width, stride_weight, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``z = softcap tanh(u / softcap) / T`` of one tile, and ``tanh`` (0 without softcap); columns past V are -inf."""
    b_u = dot_rows(
        p_hidden, o_hidden, m_n, p_weight, o_v, m_v, n_width, stride_weight, BLOCK_N, BLOCK_V, BLOCK_H, UPCAST
    )
    if HAS_BIAS:
        b_u += tl.load(p_bias + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
    b_tanh = tl.zeros_like(b_u)
    if HAS_SOFTCAP:
        b_tanh = tanh(b_u / softcap)
        b_u = b_tanh * softcap
    return tl.where(m_v[None, :], b_u * b_scale[:, None], NEGATIVE_INFINITY), b_tanh


@triton.jit
def head_forward_kernel(
    p_hidden, p_weight, p_bias, p_target, p_rows, p_scale, p_max, p_sum, p_zsum, p_target_z,
    n_rows, n_vocab, n_width, n_per_split, stride_hidden, stride_weight, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_N rows and one split of the vocabulary: maximum m, ``sum e^(z-m)``, ``sum e^(z-m) (z-m)``, target z.

    Row blocks are the fast axis of the grid, so that programs in flight share the split's part of the weight. The
    split that holds a row's target is the only one to write its z.
    """
    i_n, i_split = tl.program_id(0), tl.program_id(1)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n_rows
    b_target = tl.load(p_target + o_n, mask=m_n, other=-1)
    o_hidden = tl.load(p_rows + o_n, mask=m_n, other=0) * stride_hidden
    b_scale = tl.full([BLOCK_N], 1.0, dtype=tl.float32)
    if HAS_SCALE:
        b_scale = tl.load(p_scale + o_n, mask=m_n, other=1.0)
    b_max = tl.full([BLOCK_N], NEGATIVE_INFINITY, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    b_zsum = tl.zeros([BLOCK_N], dtype=tl.float32)
    begin = i_split * n_per_split
    end = tl.minimum(begin + n_per_split, n_vocab)
    for i_v in range(begin, end, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        m_v = o_v < end
        b_z, _ = scored_tile(
            p_hidden, o_hidden, m_n, b_scale, p_weight, p_bias, o_v, m_v, n_width, stride_weight, softcap,
            HAS_BIAS, HAS_SOFTCAP, BLOCK_N, BLOCK_V, BLOCK_H, UPCAST,
        )  # fmt: skip
        m_hit = o_v[None, :] == b_target[:, None]
        b_hit = tl.sum(m_hit.to(tl.int32), 1) > 0
        tl.store(p_target_z + o_n, tl.sum(tl.where(m_hit, b_z, 0.0), 1), mask=m_n & b_hit)
        b_new = tl.maximum(b_max, tl.max(b_z, 1))
        # A row of -inf so far has nothing to rescale: -inf - -inf would be NaN.
        b_centre = tl.where(b_new == NEGATIVE_INFINITY, 0.0, b_new)
        b_shift = tl.where(b_max == NEGATIVE_INFINITY, 0.0, b_max - b_centre)
        b_old = tl.exp(b_shift)
        b_exp = tl.exp(b_z - b_centre[:, None])
        if ENTROPY:
            b_term = tl.where(b_exp > 0, b_exp * (b_z - b_centre[:, None]), 0.0)
            b_zsum = b_old * (b_zsum + b_shift * b_sum) + tl.sum(b_term, 1)
        b_sum = b_old * b_sum + tl.sum(b_exp, 1)
        b_max = b_new
    o_part = i_split.to(tl.int64) * n_rows + o_n
    tl.store(p_max + o_part, b_max, mask=m_n)
    tl.store(p_sum + o_part, b_sum, mask=m_n)
    if ENTROPY:
        tl.store(p_zsum + o_part, b_zsum, mask=m_n)


@triton.jit
def head_combine_kernel(
    p_max, p_sum, p_zsum, p_target_z, p_logp, p_entropy, p_lse, n_rows, n_splits,
    ENTROPY: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Join the splits in order. Centred on the row's maximum m: ``logp = z - m - log t``, ``H = log t - w / t``."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n_rows
    b_max = tl.full([BLOCK_N], NEGATIVE_INFINITY, dtype=tl.float32)
    o_part = o_n
    for _ in range(n_splits):
        b_max = tl.maximum(b_max, tl.load(p_max + o_part, mask=m_n, other=0.0))
        o_part += n_rows
    b_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    b_zsum = tl.zeros([BLOCK_N], dtype=tl.float32)
    o_part = o_n
    for _ in range(n_splits):
        b_part_sum = tl.load(p_sum + o_part, mask=m_n, other=1.0)
        b_shift = tl.load(p_max + o_part, mask=m_n, other=0.0) - b_max
        b_scale = tl.exp(b_shift)
        if ENTROPY:
            b_part = tl.load(p_zsum + o_part, mask=m_n, other=0.0)
            b_zsum += tl.where(b_scale > 0, b_scale * (b_part + b_shift * b_part_sum), 0.0)
        b_sum += b_scale * b_part_sum
        o_part += n_rows
    b_log = tl.log(b_sum)
    b_target_z = tl.load(p_target_z + o_n, mask=m_n, other=0.0)
    tl.store(p_logp + o_n, b_target_z - b_max - b_log, mask=m_n)
    tl.store(p_lse + o_n, b_max + b_log, mask=m_n)
    if ENTROPY:
        tl.store(p_entropy + o_n, b_log - b_zsum / b_sum, mask=m_n)


@triton.jit
def head_dlogits_kernel(
    p_hidden, p_weight, p_bias, p_target, p_rows, p_scale, p_live, p_lse, p_entropy, p_dlogp, p_dentropy, p_out,
    n_live, n_vocab, n_width, stride_hidden, stride_weight, stride_out, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``dL/du = (1 - tanh^2) / T [c (onehot - p) - e p (log p + H)]`` of BLOCK_N live rows and BLOCK_V columns.

    ``p_live`` [n_live] are the rows whose c and e are not both 0; the output has one line for each of them.
    """
    i_n, i_v = tl.program_id(0), tl.program_id(1)
    o_i = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_i < n_live
    o_n = tl.load(p_live + o_i, mask=m_n, other=0)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < n_vocab
    o_hidden = tl.load(p_rows + o_n, mask=m_n, other=0) * stride_hidden
    b_scale = tl.full([BLOCK_N], 1.0, dtype=tl.float32)
    if HAS_SCALE:
        b_scale = tl.load(p_scale + o_n, mask=m_n, other=1.0)
    b_z, b_tanh = scored_tile(
        p_hidden, o_hidden, m_n, b_scale, p_weight, p_bias, o_v, m_v, n_width, stride_weight, softcap,
        HAS_BIAS, HAS_SOFTCAP, BLOCK_N, BLOCK_V, BLOCK_H, UPCAST,
    )  # fmt: skip
    b_logp = b_z - tl.load(p_lse + o_n, mask=m_n, other=0.0)[:, None]
    b_p = tl.exp(b_logp)
    b_c = tl.load(p_dlogp + o_n, mask=m_n, other=0.0)[:, None]
    b_target = tl.load(p_target + o_n, mask=m_n, other=-1)
    b_grad = tl.where(o_v[None, :] == b_target[:, None], b_c, 0.0) - b_c * b_p
    if ENTROPY:
        b_e = tl.load(p_dentropy + o_n, mask=m_n, other=0.0)[:, None]
        b_entropy = tl.load(p_entropy + o_n, mask=m_n, other=0.0)[:, None]
        b_grad -= tl.where(b_p > 0, b_e * b_p * (b_logp + b_entropy), 0.0)
    b_grad = b_grad * b_scale[:, None]
    if HAS_SOFTCAP:
        b_grad = b_grad * (1.0 - b_tanh * b_tanh)
    o_out = o_i.to(tl.int64)[:, None] * stride_out + o_v[None, :]
    tl.store(p_out + o_out, b_grad.to(p_out.dtype.element_ty), mask=m_n[:, None] & m_v[None, :])


@triton.jit
def gather_sum_kernel(
    p_value, p_order, p_start, p_out, n_width, stride_value, stride_out, BLOCK_H: tl.constexpr
):  # fmt: skip
    """``out[r] = sum of value[order[k]] for start[r] <= k < start[r + 1]``, float32, in the order of k: a scatter-add
    without atomics."""
    i_r, i_h = tl.program_id(0), tl.program_id(1)
    o_h = i_h * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = o_h < n_width
    b_sum = tl.zeros([BLOCK_H], dtype=tl.float32)
    for i_k in range(tl.load(p_start + i_r), tl.load(p_start + i_r + 1)):
        i_n = tl.load(p_order + i_k)
        b_sum += tl.load(p_value + i_n * stride_value + o_h, mask=m_h, other=0.0).to(tl.float32)
    tl.store(p_out + i_r.to(tl.int64) * stride_out + o_h, b_sum.to(p_out.dtype.element_ty), mask=m_h)
