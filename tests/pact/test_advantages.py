"""Advantages against numpy written from the formulas, and the inputs they refuse."""

import math

import numpy as np
import pytest
import torch

from pact.advantages import dr_grpo, dual_level, grpo, rloo, turn_level

REWARDS = [0.25, 1.0, 0.0, 0.5, 0.5]
TURNS = [[0.5, 1.0, 0.25], [0.0], [1.0, 0.0], [0.2, 0.7, 0.9, 0.1]]
GROUP_FUNCTIONS = [grpo, dr_grpo, rloo]
TURN_FUNCTIONS = [turn_level, dual_level]


def standardised(values, eps=1e-6):
    values = np.asarray(values)
    if len(values) == 1:
        return values / (1 + eps)
    return (values - values.mean()) / (values.std(ddof=1) + eps)


def numpy_turn_level(turn_rewards, gamma):
    returns = [
        [sum(gamma ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))] for row in turn_rewards
    ]
    columns = {}
    for t in range(max(map(len, returns))):
        reaching = [i for i, row in enumerate(returns) if t < len(row)]
        columns |= {(i, t): v for i, v in zip(reaching, standardised([returns[i][t] for i in reaching]))}
    return [[columns[i, t] for t in range(len(row))] for i, row in enumerate(returns)]


def test_outcome_advantages_equal_the_formulas():
    rewards = np.array(REWARDS)
    np.testing.assert_allclose(grpo(REWARDS), standardised(rewards), rtol=1e-12)
    np.testing.assert_allclose(dr_grpo(REWARDS), rewards - rewards.mean(), rtol=1e-12)
    leave_one_out = [r - np.delete(rewards, i).mean() for i, r in enumerate(rewards)]
    np.testing.assert_allclose(rloo(REWARDS), leave_one_out, rtol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_turn_level_equals_numpy(gamma):
    for ours, theirs in zip(turn_level(TURNS, gamma), numpy_turn_level(TURNS, gamma), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("combine", "scale"), [("sum", 1.0), ("mean", 0.5)])
def test_dual_level_equals_numpy(combine, scale):
    whole = standardised([sum(row) for row in TURNS])
    expected = [[scale * (w + part) for part in row] for w, row in zip(whole, numpy_turn_level(TURNS, 0.9))]
    for ours, theirs in zip(dual_level(TURNS, combine=combine), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_random_groups_in_float64_torch():
    """As the released code goes about it: rewards on a padded grid, statistics a column, torch's unbiased std."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        turns = [rng.random(rng.integers(1, 6)).round(1).tolist() for _ in range(rng.integers(2, 9))]
        grid = torch.full((len(turns), max(map(len, turns))), torch.nan, dtype=torch.float64)
        for i, row in enumerate(turns):
            grid[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
        whole = grid.nansum(1)
        outcome = (whole - whole.mean()) / (whole.std() + 1e-6)
        returns = grid.nan_to_num()
        for t in reversed(range(grid.shape[1] - 1)):
            returns[:, t] += 0.9 * returns[:, t + 1]
        part = torch.zeros_like(grid)
        for t in range(grid.shape[1]):
            reached = ~grid[:, t].isnan()
            column = returns[reached, t]
            if len(column) > 1:
                column = (column - column.mean()) / (column.std() + 1e-6)
            part[reached, t] = column
        for i, row in enumerate(turns):
            expected = outcome[i] + part[i, : len(row)]
            np.testing.assert_allclose(dual_level(turns)[i], expected, atol=1e-5)
            np.testing.assert_allclose(dual_level(turns, combine="mean")[i], expected / 2, atol=1e-5)
        np.testing.assert_allclose(grpo(whole.tolist()), outcome, atol=1e-9)
        n = len(turns)
        np.testing.assert_allclose(rloo(whole.tolist()), n / (n - 1) * (whole - whole.mean()), atol=1e-12)
        np.testing.assert_allclose(dr_grpo(whole.tolist()), whole - whole.mean(), atol=1e-12)


def test_a_turn_that_one_rollout_reaches_stands_for_itself():
    assert turn_level(TURNS)[3][3] == pytest.approx(0.1, rel=1e-5)
    assert grpo([2.0]) == [pytest.approx(2.0, rel=1e-5)]
    assert dr_grpo([2.0]) == [0.0]


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, -1e9])
def test_equal_rewards_give_exactly_zero(value):
    for function in GROUP_FUNCTIONS:
        assert function([value] * 3) == [0.0] * 3
    for function in TURN_FUNCTIONS:
        assert function([[value, value]] * 3) == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("function", GROUP_FUNCTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_named(function, bad):
    with pytest.raises(ValueError, match=r"rollout 1 is (nan|inf)"):
        function([0.0, bad])


@pytest.mark.parametrize("function", TURN_FUNCTIONS)
def test_a_turn_reward_that_is_not_finite_is_named(function):
    with pytest.raises(ValueError, match="rollout 1, turn 2 is nan"):
        function([[0.0], [0.0, 1.0, math.nan]])


@pytest.mark.parametrize("function", GROUP_FUNCTIONS + TURN_FUNCTIONS)
def test_no_rollouts_is_an_error(function):
    with pytest.raises(ValueError, match="at least one rollout"):
        function([])


def test_other_bad_input():
    with pytest.raises(ValueError, match="at least 2 rollouts"):
        rloo([1.0])
    with pytest.raises(ValueError, match="rollout 0 has no turn rewards"):
        dual_level([[], [1.0]])
    with pytest.raises(ValueError, match="combine"):
        dual_level(TURNS, combine="max")
    with pytest.raises(ValueError, match="gamma"):
        turn_level(TURNS, gamma=1.5)
