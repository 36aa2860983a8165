"""The specification of cotrain_loss: the formulas of DESIGN section 3 in plain torch. Kernels never import it."""

from __future__ import annotations

import torch
from torch import Tensor

from pact_kernels.terms import N_BRANCHES, N_COMPONENTS, N_KINDS, RL, CoTrainResult, TokenTerms


def cotrain_loss_reference(
    logp: Tensor,
    terms: TokenTerms,
    *,
    entropy: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    clip_dual: float | None = None,
) -> CoTrainResult:
    """``sum_i weight_i l_i`` and its metrics, differentiable any number of times, in the dtype of ``logp``."""
    is_rl = terms.kind == RL
    ratio = torch.exp(logp - (logp.detach() if terms.old_logp is None else terms.old_logp))
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    plain = ratio * terms.advantage
    surrogate = torch.minimum(plain, clipped_ratio * terms.advantage)
    if clip_dual is not None:
        floor = clip_dual * terms.advantage
        surrogate = torch.where(terms.advantage < 0, torch.maximum(surrogate, floor), surrogate)
    rl_loss = -surrogate
    k3 = torch.zeros_like(logp)
    if terms.ref_logp is not None:
        d = terms.ref_logp - logp
        k3 = torch.exp(d) - d - 1
        rl_loss = rl_loss + kl_coef * k3
    if entropy is not None:
        rl_loss = rl_loss - entropy_coef * entropy
    row_loss = torch.where(is_rl, rl_loss, -logp)

    live = terms.weight != 0
    loss = (terms.weight[live].to(logp.dtype) * row_loss[live]).sum()

    weighted = torch.zeros_like(logp)
    weighted[live] = terms.weight[live].to(logp.dtype) * row_loss[live]
    is_clipped = (surrogate < plain) | (surrogate > plain)
    zero = torch.zeros_like(logp)
    columns = {
        "tokens": torch.ones_like(logp),
        "weight": terms.weight,
        "loss": weighted,
        "logp": logp,
        "ratio": torch.where(is_rl, ratio, zero),
        "clipped": is_rl & is_clipped,
        "kl": torch.where(is_rl, k3, zero),
        "entropy": zero if entropy is None else entropy,
    }
    return CoTrainResult(loss, {name: _by_cell(column, terms) for name, column in columns.items()})


def _by_cell(values: Tensor, terms: TokenTerms) -> Tensor:
    """Sum of ``values`` over the rows of each kind, branch and component."""
    values = values.detach().double()
    branch = torch.zeros_like(terms.kind) if terms.branch is None else terms.branch
    component = torch.zeros_like(terms.kind) if terms.component is None else terms.component
    total = values.new_zeros(N_KINDS, N_BRANCHES, N_COMPONENTS)
    for kind in range(N_KINDS):
        for b in range(N_BRANCHES):
            for c in range(N_COMPONENTS):
                total[kind, b, c] = values[(terms.kind == kind) & (branch == b) & (component == c)].sum()
    return total
