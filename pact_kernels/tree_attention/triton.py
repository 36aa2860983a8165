"""Triton kernels of tree attention: forward, dQ over ancestors, dK and dV over descendants and grouped heads.

Tiles come from the work lists (``work.py``): whole tiles without a mask, partial ones with ``key <= query < end[key]``.
float32 softmax and accumulation; every sum has one order, no atomics. Launches are in ``ops.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e38)  # maximum of nothing: finite, so that differences and products with it are numbers
# Changes with every tree: not compiled anew for a length that 16 divides.
CHANGING = ("n_length",)


@triton.jit
def load_tile(
    p_base, i_tile, n_length, stride, CLAMP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Tile [BLOCK, BLOCK_D] of one head; columns past D are 0. CLAMP: rows past the end read the last one."""
    o_row, o_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    if CLAMP:
        o_row = tl.minimum(o_row, n_length - 1 - i_tile * BLOCK)
    p_tile = p_base + i_tile.to(tl.int64) * BLOCK * stride + (o_row[:, None] * stride + o_d[None, :])
    if D == BLOCK_D:
        b_tile = tl.load(p_tile)
    else:
        b_tile = tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)
    if UPCAST:  # the interpreter's dot is wrong for bf16
        b_tile = b_tile.to(tl.float32)
    return b_tile


@triton.jit
def store_tile(
    p_base, b_tile, i_tile, n_length, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The rows of the tile that exist, rounded to the type they are stored in."""
    o_row, o_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    m_tile = (o_row < n_length - i_tile * BLOCK)[:, None] & (o_d < D)[None, :]
    p_tile = p_base + i_tile.to(tl.int64) * BLOCK * stride + (o_row[:, None] * stride + o_d[None, :])
    tl.store(p_tile, b_tile.to(p_base.dtype.element_ty), mask=m_tile)


@triton.jit
def load_line(p_line, i_tile, n_length, CLAMP: tl.constexpr, BLOCK: tl.constexpr):
    """One number a row of the tile [BLOCK]."""
    o_row = i_tile * BLOCK + tl.arange(0, BLOCK)
    if CLAMP:
        o_row = tl.minimum(o_row, n_length - 1)
    return tl.load(p_line + o_row)


@triton.jit
def exponentials(b_dot, b_centre, scale):
    """``2^(scale log2(e) dot - centre)``. One rounding of the difference: the product alone has many digits before the
    point where scores are peaked, and they would be lost behind it."""
    return tl.exp2(tl.fma(b_dot, scale * LOG2E, -b_centre))


@triton.jit
def centre_of(b_max, scale):
    """``scale log2(e) max``, rounded. An fma that adds 0: a product might be fused into one use and rounded in another,
    and the exponentials and the factor between two centres must mean the same number."""
    return tl.fma(b_max, scale * LOG2E, 0.0)


@triton.jit
def forward_tile(
    b_q, b_acc, b_max, b_sum, p_k, p_v, p_end, o_q, i_k, n_length, stride_k, stride_v, scale,
    PARTIAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax; the maximum is that of ``q k^T``, which scale >= 0 does not turn around."""
    b_k = load_tile(p_k, i_k, n_length, stride_k, PARTIAL, D, BLOCK_K, BLOCK_D, UPCAST)
    b_dot = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [M, D] x [D, N]
    if PARTIAL:  # a key past the end is a copy of the last one at a position that nobody sees
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        b_end = load_line(p_end, i_k, n_length, True, BLOCK_K)
        m_seen = (o_k[None, :] <= o_q[:, None]) & (o_q[:, None] < b_end[None, :])
        b_new = tl.maximum(b_max, tl.max(tl.where(m_seen, b_dot, LOWEST), 1))
        b_centre = centre_of(b_new, scale)
        b_p = tl.where(m_seen, exponentials(b_dot, b_centre[:, None], scale), 0.0)
    else:
        b_new = tl.maximum(b_max, tl.max(b_dot, 1))
        b_centre = centre_of(b_new, scale)
        b_p = exponentials(b_dot, b_centre[:, None], scale)
    b_alpha = tl.where(b_max == b_new, 1.0, tl.exp2(centre_of(b_max, scale) - b_centre))
    b_v = load_tile(p_v, i_k, n_length, stride_v, PARTIAL, D, BLOCK_K, BLOCK_D, UPCAST)
    b_acc = b_acc * b_alpha[:, None]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")  # [M, N] x [N, D]
    return b_acc, b_new, b_sum * b_alpha + tl.sum(b_p, 1)


@triton.jit(do_not_specialize=CHANGING)
def tree_forward_kernel(
    p_q, p_k, p_v, p_end, p_start, p_middle, p_index, p_out, p_centre, p_logsum, n_length,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_out, stride_outh, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Output of one tile of queries of one head; centre and log-sum, [Hq, L] each, such that
    ``P = 2^(scale log2(e) q k^T - centre - logsum)``."""
    i_q, i_h = tl.program_id(0), tl.program_id(1)
    i_g = i_h // GROUP
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_q = load_tile(p_q + i_h.to(tl.int64) * stride_qh, i_q, n_length, stride_q, True, D, BLOCK_Q, BLOCK_D, UPCAST)
    p_kh, p_vh = p_k + i_g.to(tl.int64) * stride_kh, p_v + i_g.to(tl.int64) * stride_vh
    b_acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_Q], LOWEST, dtype=tl.float32)
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
    # A row past the end has seen nothing: 1 keeps its unused numbers finite.
    b_sum = tl.where(o_q < n_length, b_sum, 1.0)
    b_out, p_outh = b_acc / b_sum[:, None], p_out + i_h.to(tl.int64) * stride_outh
    store_tile(p_outh, b_out, i_q, n_length, stride_out, D, BLOCK_Q, BLOCK_D)
    o_line, m_q = i_h.to(tl.int64) * n_length + o_q, o_q < n_length
    tl.store(p_centre + o_line, centre_of(b_max, scale), mask=m_q)
    tl.store(p_logsum + o_line, tl.log2(b_sum), mask=m_q)


@triton.jit(do_not_specialize=CHANGING)
def tree_delta_kernel(
    p_out, p_dout, p_delta, n_length, stride_out, stride_outh, stride_dout, stride_douth,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """``rowsum(dO O)``, float32 [Hq, L]."""
    i_q, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_out = load_tile(p_out + i_h * stride_outh, i_q, n_length, stride_out, True, D, BLOCK_Q, BLOCK_D, True)
    b_dout = load_tile(p_dout + i_h * stride_douth, i_q, n_length, stride_dout, True, D, BLOCK_Q, BLOCK_D, True)
    tl.store(p_delta + i_h * n_length + o_q, tl.sum(b_out * b_dout, 1), mask=o_q < n_length)


@triton.jit
def dq_tile(
    b_dq, b_q, b_dout, b_centre, b_delta, p_k, p_v, p_end, o_q, i_k, n_length, stride_k, stride_v, scale,
    PARTIAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``dQ += dS K`` of one tile of keys, with ``dS = P (dO V^T - delta)`` times the row's sum."""
    b_k = load_tile(p_k, i_k, n_length, stride_k, PARTIAL, D, BLOCK_K, BLOCK_D, UPCAST)
    b_v = load_tile(p_v, i_k, n_length, stride_v, PARTIAL, D, BLOCK_K, BLOCK_D, UPCAST)
    b_dot = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [M, D] x [D, N]
    b_p = exponentials(b_dot, b_centre[:, None], scale)
    if PARTIAL:
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        b_end = load_line(p_end, i_k, n_length, True, BLOCK_K)
        m_seen = (o_k[None, :] <= o_q[:, None]) & (o_q[:, None] < b_end[None, :])
        b_p = tl.where(m_seen, b_p, 0.0)
    b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision="ieee")  # [M, D] x [D, N]
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")  # [M, N] x [N, D]


@triton.jit(do_not_specialize=CHANGING)
def tree_dq_kernel(
    p_q, p_k, p_v, p_dout, p_centre, p_logsum, p_delta, p_end, p_start, p_middle, p_index, p_dq, n_length,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_dout, stride_douth, stride_dq, stride_dqh,
    scale, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries of one head."""
    i_q, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_g = i_h // GROUP
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_q = load_tile(p_q + i_h * stride_qh, i_q, n_length, stride_q, True, D, BLOCK_Q, BLOCK_D, UPCAST)
    b_dout = load_tile(p_dout + i_h * stride_douth, i_q, n_length, stride_dout, True, D, BLOCK_Q, BLOCK_D, UPCAST)
    b_centre = load_line(p_centre + i_h * n_length, i_q, n_length, True, BLOCK_Q)
    b_logsum = load_line(p_logsum + i_h * n_length, i_q, n_length, True, BLOCK_Q)
    b_delta = load_line(p_delta + i_h * n_length, i_q, n_length, True, BLOCK_Q)
    p_kh, p_vh = p_k + i_g * stride_kh, p_v + i_g * stride_vh
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    begin, middle, end = tl.load(p_start + i_q), tl.load(p_middle + i_q), tl.load(p_start + i_q + 1)
    for i_at in range(begin, middle):
        b_dq = dq_tile(
            b_dq, b_q, b_dout, b_centre, b_delta, p_kh, p_vh, p_end, o_q, tl.load(p_index + i_at), n_length,
            stride_k, stride_v, scale, False, D, BLOCK_D, BLOCK_K, UPCAST,
        )  # fmt: skip
    for i_at in range(middle, end):
        b_dq = dq_tile(
            b_dq, b_q, b_dout, b_centre, b_delta, p_kh, p_vh, p_end, o_q, tl.load(p_index + i_at), n_length,
            stride_k, stride_v, scale, True, D, BLOCK_D, BLOCK_K, UPCAST,
        )  # fmt: skip
    b_dq = b_dq * (scale * tl.exp2(-b_logsum))[:, None]
    store_tile(p_dq + i_h * stride_dqh, b_dq, i_q, n_length, stride_dq, D, BLOCK_Q, BLOCK_D)


@triton.jit
def dkv_tile(
    b_dk, b_dv, b_k, b_v, p_q, p_dout, p_centre, p_logsum, p_delta, b_end, o_k, i_q, n_length, stride_q, stride_dout,
    scale, PARTIAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``dV += P^T dO`` and ``dK += dS^T Q`` of one tile of queries. P and dS are made transposed, so that they are the
    left operands as they stand."""
    b_q = load_tile(p_q, i_q, n_length, stride_q, PARTIAL, D, BLOCK_Q, BLOCK_D, UPCAST)
    b_centre = load_line(p_centre, i_q, n_length, PARTIAL, BLOCK_Q)
    b_logsum = load_line(p_logsum, i_q, n_length, PARTIAL, BLOCK_Q)
    b_dot = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [N, D] x [D, M]
    b_pt = exponentials(b_dot, b_centre[None, :], scale) * tl.exp2(-b_logsum)[None, :]
    if PARTIAL:  # a query past the end is at or after every end
        o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
        m_seen = (o_k[:, None] <= o_q[None, :]) & (o_q[None, :] < b_end[:, None])
        b_pt = tl.where(m_seen, b_pt, 0.0)
    b_dout = load_tile(p_dout, i_q, n_length, stride_dout, PARTIAL, D, BLOCK_Q, BLOCK_D, UPCAST)
    b_dv = tl.dot(b_pt.to(b_dout.dtype), b_dout, b_dv, input_precision="ieee")  # [N, M] x [M, D]
    b_dpt = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")  # [N, D] x [D, M]
    b_delta = load_line(p_delta, i_q, n_length, PARTIAL, BLOCK_Q)
    b_dst = b_pt * (b_dpt - b_delta[None, :])
    b_dk = tl.dot(b_dst.to(b_q.dtype), b_q, b_dk, input_precision="ieee")  # [N, M] x [M, D]
    return b_dk, b_dv


@triton.jit(do_not_specialize=CHANGING)
def tree_dkv_kernel(
    p_q, p_k, p_v, p_dout, p_centre, p_logsum, p_delta, p_end, p_tile, p_begin, p_middle, p_stop, p_slot, p_index,
    p_dk, p_dv, p_part_dk, p_part_dv, n_length,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_dout, stride_douth, stride_dk, stride_dkh,
    scale, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one key head, or what one piece of its queries adds to them (``Pieces``): over
    the query heads that share it and the tiles of queries below it."""
    i_piece, i_g, n_g = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    i_k = tl.load(p_tile + i_piece)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    b_k = load_tile(p_k + i_g * stride_kh, i_k, n_length, stride_k, True, D, BLOCK_K, BLOCK_D, UPCAST)
    b_v = load_tile(p_v + i_g * stride_vh, i_k, n_length, stride_v, True, D, BLOCK_K, BLOCK_D, UPCAST)
    b_end = load_line(p_end, i_k, n_length, True, BLOCK_K)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    begin, middle, stop = tl.load(p_begin + i_piece), tl.load(p_middle + i_piece), tl.load(p_stop + i_piece)
    for i_in_group in range(GROUP):
        i_h = i_g * GROUP + i_in_group
        p_qh, p_douth = p_q + i_h * stride_qh, p_dout + i_h * stride_douth
        o_line = i_h * n_length
        for i_at in range(begin, middle):
            b_dk, b_dv = dkv_tile(
                b_dk, b_dv, b_k, b_v, p_qh, p_douth, p_centre + o_line, p_logsum + o_line, p_delta + o_line, b_end,
                o_k, tl.load(p_index + i_at), n_length, stride_q, stride_dout, scale, False, D, BLOCK_D, BLOCK_Q,
                UPCAST,
            )  # fmt: skip
        for i_at in range(middle, stop):
            b_dk, b_dv = dkv_tile(
                b_dk, b_dv, b_k, b_v, p_qh, p_douth, p_centre + o_line, p_logsum + o_line, p_delta + o_line, b_end,
                o_k, tl.load(p_index + i_at), n_length, stride_q, stride_dout, scale, True, D, BLOCK_D, BLOCK_Q,
                UPCAST,
            )  # fmt: skip
    b_dk = b_dk * scale
    i_slot = tl.load(p_slot + i_piece)
    if i_slot < 0:
        store_tile(p_dk + i_g * stride_dkh, b_dk, i_k, n_length, stride_dk, D, BLOCK_K, BLOCK_D)
        store_tile(p_dv + i_g * stride_dkh, b_dv, i_k, n_length, stride_dk, D, BLOCK_K, BLOCK_D)
    else:
        o_part = tl.arange(0, BLOCK_K)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        o_slot = (i_slot * n_g + i_g) * (BLOCK_K * BLOCK_D)
        tl.store(p_part_dk + o_slot + o_part, b_dk)
        tl.store(p_part_dv + o_slot + o_part, b_dv)


@triton.jit(do_not_specialize=CHANGING)
def tree_join_kernel(
    p_part_dk, p_part_dv, p_tile, p_first, p_dk, p_dv, n_length, stride_dk, stride_dkh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one head whose pieces are in the slots ``first[i] : first[i + 1]``, in order."""
    i_split, i_g, n_g = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    o_part = tl.arange(0, BLOCK_K)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    for i_slot in range(tl.load(p_first + i_split), tl.load(p_first + i_split + 1)):
        o_slot = (i_slot * n_g + i_g) * (BLOCK_K * BLOCK_D)
        b_dk += tl.load(p_part_dk + o_slot + o_part)
        b_dv += tl.load(p_part_dv + o_slot + o_part)
    i_k = tl.load(p_tile + i_split)
    store_tile(p_dk + i_g * stride_dkh, b_dk, i_k, n_length, stride_dk, D, BLOCK_K, BLOCK_D)
    store_tile(p_dv + i_g * stride_dkh, b_dv, i_k, n_length, stride_dk, D, BLOCK_K, BLOCK_D)
