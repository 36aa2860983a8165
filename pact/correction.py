"""Truncated importance weights for rollouts of an engine whose log-probs differ from the trainer's. Runs no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pact.groups import Rollout


def correct(rollouts: Sequence[Rollout], trainer_logp: Sequence[Sequence[float]], cap: float) -> dict[str, float]:
    """Set ``Rollout.correction`` to ``min(pi_old / mu, cap)`` a token and return SUMS that describe the mismatch.

    ``pi_old`` is the trainer's policy when the rollout arrived, ``mu`` what the engine sampled from, both prompt-only
    (truncated importance sampling: Yao et al., "Your efficient RL framework secretly brings you off-policy RL
    training", 2025). The ratio of the objective stays that of two trainer log-probs.

    Args:
        rollouts: with ``engine_logp``.
        trainer_logp: the trainer's log-prob (nats) of each token, a list a rollout; read where ``sampled``.
        cap: largest weight; infinity leaves the weights untruncated, 0 sets none and only measures.

    Returns:
        Over the sampled tokens: ``tokens``, ``engine_kl`` (k3 estimate of KL(mu || pi_old), ``r - 1 - log r``),
        ``engine_ratio`` (sum of ratios), ``engine_truncated`` (number above the cap), ``engine_gap`` (sum of
        |log-prob difference|), and ``engine_gap_max``.

    Raises:
        ValueError: a rollout without the engine's log-probs, or log-probs that are not finite.
    """
    gaps = []
    for number, (rollout, ours) in enumerate(zip(rollouts, trainer_logp, strict=True)):
        if rollout.engine_logp is None:
            raise ValueError(f"rollout {number} has no engine_logp: keep the log-probs that the engine returned")
        sampled = np.asarray(rollout.sampled, dtype=bool)
        gap = np.where(sampled, np.subtract(ours, rollout.engine_logp), 0.0)
        if not np.isfinite(gap).all():
            raise ValueError(f"rollout {number} has log-probs that are not finite: engine or trainer has diverged")
        with np.errstate(over="ignore"):
            rollout.correction = np.minimum(np.exp(gap), cap).tolist() if cap > 0 else None
        gaps.append(gap[sampled])
    gap_N = np.concatenate(gaps) if gaps else np.zeros(0)
    with np.errstate(over="ignore"):
        ratio_N = np.exp(gap_N)
    return {
        "tokens": float(len(gap_N)),
        "engine_kl": float((np.expm1(gap_N) - gap_N).sum()),
        "engine_ratio": float(ratio_N.sum()),
        "engine_truncated": float((ratio_N > (cap or np.inf)).sum()),
        "engine_gap": float(np.abs(gap_N).sum()),
        "engine_gap_max": float(np.abs(gap_N).max(initial=0.0)),
    }
