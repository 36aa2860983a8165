"""Triton kernels of linear_logprob: forward over vocabulary splits, their combine, and dL/du of a chunk of rows.

Launches are in ``launch.py``. A log-prob is made from float32 logits that exist in registers only. No atomics; every
sum has one order. Row lists (``p_select``, ``p_source``) are indices that exist; what a user passes (targets, rows,
temperatures) is checked here and reported in ``p_flag``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pact_kernels.primitives import NEGATIVE_INFINITY, NOT_A_NUMBER, dot_rows, tanh

# They change with every batch: one binary for all of them.
ROW_COUNTS = ["n_select", "n_hidden", "n_splits", "n_source", "n_lines"]

# Stands for -inf where a product with its exponential, 0, must not be NaN: e^LEAST is 0 in float32.
LEAST = tl.constexpr(-200.0)
SMALLEST = tl.constexpr(1.2e-38)  # whose logarithm stands for that of an exponential that was rounded to 0


@triton.jit
def hidden_offsets(p_rows, o_n, n_hidden, stride_hidden):
    """Offsets of the hidden rows of rows ``o_n``. An index outside is read as one inside; the combine reports it."""
    o_row = tl.load(p_rows + o_n)
    return tl.minimum(tl.maximum(o_row, 0), n_hidden - 1) * stride_hidden


@triton.jit
def load_target(p_target, o_n, n_vocab):
    """The targets of rows ``o_n`` in 32 bits, -1 for one outside the vocabulary."""
    b_target = tl.load(p_target + o_n)
    return tl.where((b_target >= 0) & (b_target < n_vocab), b_target, -1).to(tl.int32)


@triton.jit
def scored_tile(
    p_hidden, o_hidden, b_scale, p_weight, p_bias, i_v, end_v, n_width, stride_weight, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr, EVEN_H: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``z = softcap tanh(u / softcap) / T`` of columns i_v .. i_v + BLOCK_V - 1 and dz/du; z is -inf past the end.

    Columns past the end read the last one, so that no load needs a mask. Offsets within the tile are 32-bit.
    """
    o_weight = tl.minimum(tl.arange(0, BLOCK_V), end_v - 1 - i_v) * stride_weight
    p_tile = p_weight + tl.cast(i_v, tl.int64) * stride_weight
    b_u = dot_rows(p_hidden, o_hidden, p_tile, o_weight, n_width, BLOCK_N, BLOCK_V, BLOCK_H, EVEN_H, UPCAST)
    o_v = i_v + tl.arange(0, BLOCK_V)
    if HAS_BIAS:
        b_u += tl.load(p_bias + o_v, mask=o_v < end_v, other=0.0).to(tl.float32)[None, :]
    b_slope = b_scale[:, None]
    if HAS_SOFTCAP:
        b_tanh, b_slope = tanh(b_u / softcap)
        b_slope = b_slope * b_scale[:, None]
        b_u = b_tanh * softcap
    return tl.where((o_v < end_v)[None, :], b_u * b_scale[:, None], NEGATIVE_INFINITY), b_slope


@triton.jit
def store_tile(p_out, b_value, i_first, i_v, stride, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Store a tile into a buffer of whole tiles: no mask. Offsets are 32-bit, from the tile's first line on; ``i_v`` is
    part of them, so that they are not kept in registers from tile to tile."""
    o_i, o_v = tl.arange(0, BLOCK_N), i_v + tl.arange(0, BLOCK_V)
    p_lines = p_out + tl.cast(i_first, tl.int64) * stride
    tl.store(p_lines + (o_i[:, None] * stride + o_v[None, :]), b_value.to(p_out.dtype.element_ty))


@triton.jit(do_not_specialize=ROW_COUNTS)
def head_forward_kernel(
    p_hidden, p_weight, p_bias, p_target, p_rows, p_scale, p_select,
    p_max, p_sum, p_zsum, p_target_z, p_kept, p_kept_max,
    n_select, n_hidden, n_vocab, n_width, n_per_split, stride_hidden, stride_weight, stride_kept, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr, ENTROPY: tl.constexpr,
    KEEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_N rows and one split of the vocabulary: maximum m, ``sum e^(z-m)``, ``sum e^(z-m) (z-m)``, target z.

    Row blocks are the fast axis of the grid, so that programs in flight share the split's part of the weight. The
    split that holds a row's target is the only one to write its z. ``KEEP`` stores each tile's ``e^(z-m')`` in the
    operands' dtype with the maximum m' it was centred on, for the gradient alone: the sums are of the float32 values.
    """
    i_n, i_split = tl.program_id(0), tl.program_id(1)
    o_i = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_i < n_select
    o_n = tl.load(p_select + tl.minimum(o_i, n_select - 1))
    b_target = load_target(p_target, o_n, n_vocab)
    o_hidden = hidden_offsets(p_rows, o_n, n_hidden, stride_hidden)
    b_scale = tl.full([BLOCK_N], 1.0, dtype=tl.float32)
    if HAS_SCALE:
        b_scale = tl.load(p_scale + o_n)
    b_max = tl.full([BLOCK_N], NEGATIVE_INFINITY, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    b_zsum = tl.zeros([BLOCK_N], dtype=tl.float32)
    b_target_z = tl.full([BLOCK_N], NEGATIVE_INFINITY, dtype=tl.float32)
    begin = i_split * n_per_split
    end = tl.minimum(begin + n_per_split, n_vocab)
    for i_v in range(begin, end, BLOCK_V):
        b_z, _ = scored_tile(
            p_hidden, o_hidden, b_scale, p_weight, p_bias, i_v, end, n_width, stride_weight, softcap,
            HAS_BIAS, HAS_SOFTCAP, BLOCK_N, BLOCK_V, BLOCK_H, EVEN_H, UPCAST,
        )  # fmt: skip
        o_v = i_v + tl.arange(0, BLOCK_V)
        m_hit = o_v[None, :] == b_target[:, None]
        b_target_z = tl.maximum(b_target_z, tl.max(tl.where(m_hit, b_z, NEGATIVE_INFINITY), 1))
        b_new = tl.maximum(b_max, tl.max(b_z, 1))
        # A row of -inf so far has nothing to rescale: -inf - -inf would be NaN.
        b_centre = tl.where(b_new == NEGATIVE_INFINITY, 0.0, b_new)
        b_shift = tl.where(b_max == NEGATIVE_INFINITY, 0.0, b_max - b_centre)
        b_old = tl.exp(b_shift)
        b_z = tl.maximum(b_z - b_centre[:, None], LEAST, propagate_nan=tl.PropagateNan.ALL)
        b_exp = tl.exp(b_z)
        if ENTROPY:
            b_zsum = b_old * (b_zsum + b_shift * b_sum) + tl.sum(b_exp * b_z, 1)
        b_sum = b_old * b_sum + tl.sum(b_exp, 1)
        b_max = b_new
        if KEEP:
            tl.store(p_kept_max + tl.cast(i_v // BLOCK_V, tl.int64) * n_select + o_i, b_centre, mask=m_n)
            store_tile(p_kept, b_exp, i_n * BLOCK_N, i_v, stride_kept, BLOCK_N, BLOCK_V)
    o_part = i_split.to(tl.int64) * n_select + o_i
    tl.store(p_max + o_part, b_max, mask=m_n)
    tl.store(p_sum + o_part, b_sum, mask=m_n)
    if ENTROPY:
        tl.store(p_zsum + o_part, b_zsum, mask=m_n)
    tl.store(p_target_z + o_i, b_target_z, mask=m_n & (b_target >= begin) & (b_target < end))


@triton.jit(do_not_specialize=ROW_COUNTS)
def head_combine_kernel(
    p_select, p_target, p_rows, p_scale, p_max, p_sum, p_zsum, p_target_z, p_logp, p_entropy, p_centre, p_log_total,
    p_flag, n_select, n_hidden, n_vocab, n_splits,
    HAS_SCALE: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Join the splits in order. Centred on the row's maximum m: ``logp = z - m - log t``, ``H = log t - w / t``.

    ``p_flag`` [3] int32: 1 where a target, a row index, a temperature is out of its range; such rows are NaN.
    """
    o_i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_i < n_select
    o_n = tl.load(p_select + tl.minimum(o_i, n_select - 1))
    b_max = tl.full([BLOCK_N], NEGATIVE_INFINITY, dtype=tl.float32)
    o_part = o_i.to(tl.int64)
    for _ in range(n_splits):
        b_max = tl.maximum(b_max, tl.load(p_max + o_part, mask=m_n, other=0.0))
        o_part += n_select
    b_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    b_zsum = tl.zeros([BLOCK_N], dtype=tl.float32)
    o_part = o_i.to(tl.int64)
    for _ in range(n_splits):
        b_part_sum = tl.load(p_sum + o_part, mask=m_n, other=1.0)
        b_part_max = tl.load(p_max + o_part, mask=m_n, other=0.0)
        b_shift = tl.where(b_part_max == NEGATIVE_INFINITY, NEGATIVE_INFINITY, b_part_max - b_max)
        b_scale = tl.exp(b_shift)
        if ENTROPY:
            b_part = tl.load(p_zsum + o_part, mask=m_n, other=0.0)
            b_zsum += tl.where(b_scale > 0, b_scale * (b_part + b_shift * b_part_sum), 0.0)
        b_sum += b_scale * b_part_sum
        o_part += n_select
    b_log = tl.log(b_sum)

    b_target = tl.load(p_target + o_n)
    b_row = tl.load(p_rows + o_n)
    m_bad_target = (b_target < 0) | (b_target >= n_vocab)
    m_bad_row = (b_row < 0) | (b_row >= n_hidden)
    m_bad = m_bad_target | m_bad_row
    tl.store(p_flag + tl.zeros_like(o_i), 1, mask=m_n & m_bad_target)
    tl.store(p_flag + tl.full([BLOCK_N], 1, tl.int32), 1, mask=m_n & m_bad_row)
    if HAS_SCALE:
        b_inverse = tl.load(p_scale + o_n)
        m_bad_scale = ((b_inverse > 0) & (b_inverse < float("inf"))) == 0
        tl.store(p_flag + tl.full([BLOCK_N], 2, tl.int32), 1, mask=m_n & m_bad_scale)
        m_bad = m_bad | m_bad_scale
    b_target_z = tl.load(p_target_z + o_i, mask=m_n & (m_bad_target == 0), other=0.0)
    tl.store(p_logp + o_n, tl.where(m_bad, NOT_A_NUMBER, b_target_z - b_max - b_log), mask=m_n)
    tl.store(p_centre + o_n, b_max, mask=m_n)
    tl.store(p_log_total + o_n, b_log, mask=m_n)
    if ENTROPY:
        tl.store(p_entropy + o_n, tl.where(m_bad, NOT_A_NUMBER, b_log - b_zsum / b_sum), mask=m_n)


@triton.jit
def logit_gradient(b_logp, b_p, m_hit, p_dlogp, p_dentropy, p_entropy, o_n, ENTROPY: tl.constexpr):
    """``c (onehot - p) - e p (log p + H)`` of rows ``o_n``; ``b_logp`` is above -inf where p is 0."""
    b_c = tl.load(p_dlogp + o_n)[:, None]
    b_factor = tl.zeros_like(b_p) + b_c
    if ENTROPY:
        b_e = tl.load(p_dentropy + o_n)
        b_factor = b_c + b_e[:, None] * (b_logp + tl.load(p_entropy + o_n)[:, None])
    return tl.where(m_hit, b_c, 0.0) - b_p * b_factor


@triton.jit(do_not_specialize=ROW_COUNTS)
def head_dlogits_kernel(
    p_hidden, p_weight, p_bias, p_target, p_rows, p_scale, p_select,
    p_centre, p_log_total, p_entropy, p_dlogp, p_dentropy, p_out,
    n_select, n_hidden, n_vocab, n_width, stride_hidden, stride_weight, stride_out, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, EVEN_H: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``dL/du = (1 - tanh^2) / T [c (onehot - p) - e p (log p + H)]`` of the selected rows and BLOCK_V columns.

    ``log p = (z - m) - log t``, in this order: m + log t rounds away what is left of t where m is large.
    """
    i_n, i_v = tl.program_id(0), tl.program_id(1) * BLOCK_V
    o_i = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_n = tl.load(p_select + tl.minimum(o_i, n_select - 1))
    o_hidden = hidden_offsets(p_rows, o_n, n_hidden, stride_hidden)
    b_scale = tl.full([BLOCK_N], 1.0, dtype=tl.float32)
    if HAS_SCALE:
        b_scale = tl.load(p_scale + o_n)
    b_z, b_slope = scored_tile(
        p_hidden, o_hidden, b_scale, p_weight, p_bias, i_v, n_vocab, n_width, stride_weight, softcap,
        HAS_BIAS, HAS_SOFTCAP, BLOCK_N, BLOCK_V, BLOCK_H, EVEN_H, UPCAST,
    )  # fmt: skip
    b_z = tl.maximum(b_z - tl.load(p_centre + o_n)[:, None], LEAST, propagate_nan=tl.PropagateNan.ALL)
    b_logp = b_z - tl.load(p_log_total + o_n)[:, None]
    o_v = i_v + tl.arange(0, BLOCK_V)
    m_hit = o_v[None, :] == load_target(p_target, o_n, n_vocab)[:, None]
    b_grad = logit_gradient(b_logp, tl.exp(b_logp), m_hit, p_dlogp, p_dentropy, p_entropy, o_n, ENTROPY)
    b_grad = b_grad * b_slope
    store_tile(p_out, b_grad, i_n * BLOCK_N, i_v, stride_out, BLOCK_N, BLOCK_V)


@triton.jit(do_not_specialize=ROW_COUNTS)
def head_kept_dlogits_kernel(
    p_kept, p_kept_max, p_source, p_select, p_target, p_scale,
    p_centre, p_log_total, p_logp, p_entropy, p_dlogp, p_dentropy,
    n_source, n_lines, n_vocab, stride_kept,
    HAS_SCALE: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The same in place from kept exponentials (no softcap): ``p = e^(z-m') e^(m'-m) / t``. No matmul. The target's p
    comes from its float32 log-prob: what rounding left of the kept one would cancel in 1 - p.

    Line i takes its values from line ``p_source[i]`` (``launch.py`` says why no line is read after it was written);
    ``p_select`` maps lines to rows.
    """
    i_n, i_tile = tl.program_id(0), tl.program_id(1)
    o_i = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_i < n_source
    o_line = tl.load(p_source + tl.minimum(o_i, n_source - 1))
    o_n = tl.load(p_select + o_line)
    o_v = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    m_tile = m_n[:, None] & (o_v < n_vocab)[None, :]
    b_kept = tl.load(p_kept + o_line[:, None] * stride_kept + o_v[None, :], mask=m_tile, other=0.0).to(tl.float32)
    b_shift = tl.load(p_kept_max + tl.cast(i_tile, tl.int64) * n_lines + o_line) - tl.load(p_centre + o_n)
    # At most 0, but for a tile of -inf, which was centred on 0: its exponentials are 0 and must not meet an infinity.
    b_shift = tl.minimum(b_shift - tl.load(p_log_total + o_n), 0.0)
    b_p = b_kept * tl.exp(b_shift)[:, None]
    m_hit = o_v[None, :] == load_target(p_target, o_n, n_vocab)[:, None]
    b_target_logp = tl.load(p_logp + o_n)[:, None]
    b_p = tl.where(m_hit, tl.exp(b_target_logp), b_p)
    b_logp = b_p
    if ENTROPY:
        b_logp = tl.log(tl.maximum(b_kept, SMALLEST)) + b_shift[:, None]
        b_logp = tl.where(m_hit, tl.maximum(b_target_logp, LEAST), b_logp)
    b_grad = logit_gradient(b_logp, b_p, m_hit, p_dlogp, p_dentropy, p_entropy, o_n, ENTROPY)
    if HAS_SCALE:
        b_grad = b_grad * tl.load(p_scale + o_n)[:, None]
    p_lines = p_kept + tl.cast(i_n * BLOCK_N, tl.int64) * stride_kept  # masked: the lines behind are still to be read
    o_out = tl.arange(0, BLOCK_N)[:, None] * stride_kept + o_v[None, :]
    tl.store(p_lines + o_out, b_grad.to(p_kept.dtype.element_ty), mask=m_tile)


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
