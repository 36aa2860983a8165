"""Rewards of one prompt's rollouts -> advantages. Pure functions on lists of floats; they know no tokens and no models.

Each takes one group: all rollouts of one prompt. Common to all: an empty group or a reward that is not finite raises
ValueError, and rewards that are all equal give exactly 0 (there is nothing to learn from; the trainer warns). Where the
text says "standardised", x becomes (x - mean) / (std + eps) with the unbiased standard deviation over the group; a
group of one takes mean 0 and std 1, so that a lone reward stands for itself (as in verl and MatchTIR's release).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def grpo(rewards: Sequence[float], eps: float = 1e-6) -> list[float]:
    """GRPO (arXiv 2402.03300): outcome rewards, standardised. One advantage a rollout.

    >>> [round(value, 3) for value in grpo([1.0, 0.0, 0.0, 1.0])]
    [0.866, -0.866, -0.866, 0.866]
    >>> grpo([1.0, 1.0])
    [0.0, 0.0]
    """
    return _standardise(_checked(rewards), eps)


def dr_grpo(rewards: Sequence[float]) -> list[float]:
    """Dr. GRPO (arXiv 2503.20783): r - mean, not divided by std. One advantage a rollout; 0 for a group of one.

    >>> dr_grpo([1.0, 0.0, 0.0, 1.0])
    [0.5, -0.5, -0.5, 0.5]
    """
    return _centre(_checked(rewards))


def rloo(rewards: Sequence[float]) -> list[float]:
    """RLOO (arXiv 2402.14740): r_i minus the mean of the others, = n / (n - 1) (r_i - mean). One advantage a rollout.

    >>> rloo([1.0, 0.0, 0.5])
    [0.75, -0.75, 0.0]

    Raises:
        ValueError: also for a group of one, which has no others.
    """
    values = _checked(rewards)
    if len(values) < 2:
        raise ValueError("rloo needs at least 2 rollouts a prompt: there is no other one to compare with")
    scale = len(values) / (len(values) - 1)
    return [scale * x for x in _centre(values)]


def turn_level(turn_rewards: Sequence[Sequence[float]], gamma: float = 0.9, eps: float = 1e-6) -> list[list[float]]:
    """Turn-level part of MatchTIR (arXiv 2601.10712): discounted returns, standardised turn by turn.

    R_it = sum over k >= t of gamma^(k - t) r_ik, standardised per turn index t over the rollouts that reach turn t.

    Args:
        turn_rewards: one list a rollout, one reward a turn; lengths may differ.
        gamma: discount a turn, 0..1.

    Returns:
        Advantages of the shape of ``turn_rewards``.

    >>> good, bad = turn_level([[0.0, 1.0], [0.0, 0.0]], gamma=0.5)
    >>> [round(value, 3) for value in good]
    [0.707, 0.707]
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in 0..1, got {gamma}")
    returns = []
    for rewards in _checked_turns(turn_rewards):
        total, backwards = 0.0, []
        for reward in reversed(rewards):
            total = reward + gamma * total
            backwards.append(total)
        returns.append(backwards[::-1])
    advantages = [[0.0] * len(rollout) for rollout in returns]
    for turn in range(max(map(len, returns))):
        reaching = [i for i, rollout in enumerate(returns) if len(rollout) > turn]
        for i, value in zip(reaching, _standardise([returns[i][turn] for i in reaching], eps), strict=True):
            advantages[i][turn] = value
    return advantages


def dual_level(
    turn_rewards: Sequence[Sequence[float]], gamma: float = 0.9, combine: str = "sum", eps: float = 1e-6
) -> list[list[float]]:
    """Dual-level advantage of MatchTIR (arXiv 2601.10712): trajectory part plus turn part, one value a turn.

    Trajectory part: the sum of a rollout's turn rewards, standardised in the group, the same for all its turns. Turn
    part: ``turn_level``.

    Args:
        turn_rewards: one list a rollout, one reward a turn; lengths may differ.
        combine: "sum" (the paper) or "mean", half of it (the released code).

    >>> good, bad = dual_level([[0.0, 1.0], [0.0, 0.0]])
    >>> [round(value, 3) for value in bad]
    [-1.414, -1.414]
    """
    if combine not in ("sum", "mean"):
        raise ValueError(f"combine must be 'sum' or 'mean', got {combine!r}")
    turns = turn_level(turn_rewards, gamma, eps)
    trajectories = _standardise([math.fsum(rewards) for rewards in turn_rewards], eps)
    scale = 1.0 if combine == "sum" else 0.5
    return [[scale * (whole + part) for part in parts] for whole, parts in zip(trajectories, turns, strict=True)]


def _centre(values: list[float]) -> list[float]:
    if max(values) == min(values):
        return [0.0] * len(values)  # exactly: the mean of equal numbers may be off by a rounding, and eps is small
    mean = math.fsum(values) / len(values)
    return [x - mean for x in values]


def _standardise(values: list[float], eps: float) -> list[float]:
    if len(values) == 1:
        return [values[0] / (1 + eps)]
    centred = _centre(values)
    scale = statistics.stdev(values) + eps
    return [x / scale for x in centred]


def _checked(rewards: Sequence[float]) -> list[float]:
    values = [float(reward) for reward in rewards]
    if not values:
        raise ValueError("no rewards: a prompt needs at least one rollout")
    for i, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"the reward of rollout {i} is {value}: rewards must be finite numbers")
    return values


def _checked_turns(turn_rewards: Sequence[Sequence[float]]) -> list[list[float]]:
    if not turn_rewards:
        raise ValueError("no rewards: a prompt needs at least one rollout")
    rollouts = [[float(reward) for reward in rewards] for rewards in turn_rewards]
    for i, rewards in enumerate(rollouts):
        if not rewards:
            raise ValueError(f"rollout {i} has no turn rewards: every rollout has at least one assistant turn")
        for t, reward in enumerate(rewards):
            if not math.isfinite(reward):
                raise ValueError(f"the reward of rollout {i}, turn {t} is {reward}: rewards must be finite numbers")
    return rollouts
