"""Triton helpers that several kernels share: a product of rows, tanh, e^x - 1 - x. They launch nothing.

Names: ``i_`` index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``b_`` block in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
NOT_A_NUMBER = tl.constexpr(float("nan"))


@triton.jit
def tanh(b_x):
    """tanh x and its slope ``1 - tanh^2``, from ``q = e^-2|x|``: ``(1 - q) / (1 + q)`` and ``4 q / (1 + q)^2``.

    The slope cancels nowhere; tanh does near 0, where the polynomial of Cephes' tanhf (2 ulp) takes over.
    """
    b_q = tl.exp(-2.0 * tl.abs(b_x))
    b_inverse = 1.0 / (1.0 + b_q)
    b_far = (1.0 - b_q) * b_inverse
    b_square = b_x * b_x
    b_poly = -5.70498872745e-3 * b_square + 2.06390887954e-2
    b_poly = b_poly * b_square - 5.37397155531e-2
    b_poly = b_poly * b_square + 1.33314422036e-1
    b_poly = b_poly * b_square - 3.33332819422e-1
    b_near = b_x + b_x * b_square * b_poly
    b_tanh = tl.where(tl.abs(b_x) < 0.625, b_near, tl.where(b_x < 0, -b_far, b_far))
    return b_tanh, 4.0 * b_q * b_inverse * b_inverse


@triton.jit
def exp_minus_line(b_x):
    """``e^x - 1 - x``, the k3 estimator, without its cancellation near 0: x^2/2 (1 + x/3 (1 + x/4 (...))) there."""
    b_tail = 1.0 + b_x / 10.0
    for i_term in tl.static_range(7):
        b_tail = 1.0 + b_x / (9.0 - i_term) * b_tail
    return tl.where(tl.abs(b_x) < 0.5, 0.5 * b_x * b_x * b_tail, tl.exp(b_x) - 1.0 - b_x)


@triton.jit
def dot_rows(
    p_hidden,
    o_hidden,
    p_weight,
    o_weight,
    n_width,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Rows of hidden times rows of weight, float32 [BLOCK_N, BLOCK_V]; the offsets are of whole rows that exist.

    A mask along H is paid only where H is no multiple of the block. ``UPCAST`` widens the operands first: the
    interpreter's dot is wrong for bf16.
    """
    o_h = tl.arange(0, BLOCK_H)
    p_left = p_hidden + o_hidden[:, None] + o_h[None, :]
    p_right = p_weight + o_weight[None, :] + o_h[:, None]
    b_u = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    for i_h in range(0, n_width, BLOCK_H):
        if EVEN_H:
            b_hidden = tl.load(p_left)
            b_weight = tl.load(p_right)
        else:
            m_h = o_h < n_width - i_h
            b_hidden = tl.load(p_left, mask=m_h[None, :], other=0.0)
            b_weight = tl.load(p_right, mask=m_h[:, None], other=0.0)
        if UPCAST:
            b_hidden = b_hidden.to(tl.float32)
            b_weight = b_weight.to(tl.float32)
        b_u = tl.dot(b_hidden, b_weight, b_u, input_precision="ieee")  # [N, H] x [H, V]
        p_left += BLOCK_H
        p_right += BLOCK_H
    return b_u
