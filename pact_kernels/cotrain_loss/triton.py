"""Triton kernel of cotrain_loss: each row's loss, its derivatives c and e, the metrics' sums. [N]-sized work only."""

from __future__ import annotations

import triton
import triton.language as tl

from pact_kernels.primitives import exp_minus_line


@triton.jit(do_not_specialize=["n_select"])
def cotrain_rows_kernel(
    p_select, p_logp, p_entropy, p_old, p_advantage, p_weight, p_kind, p_component, p_branch, p_ref,
    p_dlogp, p_dentropy, p_sums, n_select, clip_low, clip_high, kl_coef, entropy_coef, clip_dual,
    HAS_ENTROPY: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_COMPONENT: tl.constexpr,
    HAS_BRANCH: tl.constexpr, SUMS: tl.constexpr, N_BRANCHES: tl.constexpr, N_COMPONENTS: tl.constexpr,
    CELLS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """c and e of the selected rows; with ``SUMS`` the program's float64 sums of every metric over its rows instead.

    ``dl/dlogp``: -r A where the clip lets it pass, plus ``kl_coef (1 - e^d)``; -1 on SFT rows. What has zero weight or
    zero advantage is selected away, not multiplied (0 * inf). ``p_sums`` is [programs, metrics, CELLS].
    """
    i_n = tl.program_id(0)
    o_i = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_i < n_select
    o_n = tl.load(p_select + tl.minimum(o_i, n_select - 1))
    b_logp = tl.load(p_logp + o_n)
    b_weight = tl.load(p_weight + o_n).to(tl.float32)
    b_advantage = tl.load(p_advantage + o_n).to(tl.float32)
    b_kind = tl.load(p_kind + o_n).to(tl.int32)
    m_rl = b_kind == 0
    b_old = b_logp
    if HAS_OLD:
        b_old = tl.load(p_old + o_n).to(tl.float32)
    b_ratio = tl.where(m_rl, tl.exp(b_logp - b_old), 0.0)
    m_gains = m_rl & (b_advantage != 0)
    m_high = (b_advantage > 0) & (b_ratio > 1 + clip_high)
    m_low = (b_advantage < 0) & (b_ratio < 1 - clip_low)
    m_bad = (b_advantage < 0) & (b_ratio > clip_dual)
    m_clipped = m_gains & (m_high | m_low | m_bad)
    b_edge = tl.where(m_high, 1 + clip_high, tl.where(m_bad, clip_dual, 1 - clip_low))
    b_kept = tl.where(m_clipped, b_edge, b_ratio)
    b_loss = tl.where(m_gains, -b_kept * b_advantage, 0.0)
    b_dlogp = tl.where(m_clipped, 0.0, b_loss)
    b_kl = tl.zeros_like(b_logp)
    if HAS_REF:
        b_d = tl.load(p_ref + o_n).to(tl.float32) - b_logp
        b_kl = tl.where(m_rl, exp_minus_line(b_d), 0.0)
        if kl_coef != 0:
            b_loss += kl_coef * b_kl
            b_slope = tl.where(tl.abs(b_d) < 0.5, b_d + b_kl, tl.exp(b_d) - 1.0)  # e^d - 1
            b_dlogp -= tl.where(m_rl, kl_coef * b_slope, 0.0)
    m_live = b_weight != 0
    b_entropy = tl.zeros_like(b_logp)
    b_dentropy = tl.zeros_like(b_logp)
    if HAS_ENTROPY:
        b_entropy = tl.load(p_entropy + o_n)
        if entropy_coef != 0:
            b_loss -= tl.where(m_rl, entropy_coef * b_entropy, 0.0)
            b_dentropy = tl.where(m_rl & m_live, -entropy_coef * b_weight, 0.0)
    if SUMS:
        b_loss = tl.where(m_live, b_weight * tl.where(m_rl, b_loss, -b_logp), 0.0)
        b_cell = b_kind * N_BRANCHES
        if HAS_BRANCH:
            b_cell += tl.load(p_branch + o_n).to(tl.int32)
        b_cell *= N_COMPONENTS
        if HAS_COMPONENT:
            b_cell += tl.load(p_component + o_n).to(tl.int32)
        o_cell = tl.arange(0, CELLS)
        m_cell = (b_cell[:, None] == o_cell[None, :]) & m_n[:, None]
        p_line = p_sums + i_n.to(tl.int64) * 8 * CELLS + o_cell
        store_sums(p_line, m_cell, tl.full([BLOCK_N], 1.0, tl.float32))
        store_sums(p_line + CELLS, m_cell, b_weight)
        store_sums(p_line + 2 * CELLS, m_cell, b_loss)
        store_sums(p_line + 3 * CELLS, m_cell, b_logp)
        store_sums(p_line + 4 * CELLS, m_cell, b_ratio)
        store_sums(p_line + 5 * CELLS, m_cell, m_clipped.to(tl.float32))
        store_sums(p_line + 6 * CELLS, m_cell, b_kl)
        store_sums(p_line + 7 * CELLS, m_cell, b_entropy)
    else:
        b_dlogp = tl.where(m_live, b_weight * tl.where(m_rl, b_dlogp, -1.0), 0.0)
        tl.store(p_dlogp + o_n, b_dlogp, mask=m_n)
        if HAS_ENTROPY:
            tl.store(p_dentropy + o_n, b_dentropy, mask=m_n)


@triton.jit
def store_sums(p_out, m_cell, b_value):
    """Sums of ``b_value`` over the rows of each cell, float64."""
    tl.store(p_out, tl.sum(tl.where(m_cell, b_value.to(tl.float64)[:, None], 0.0), 0))
