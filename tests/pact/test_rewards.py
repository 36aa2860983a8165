"""Rewards against hand-worked cases, brute force, and the optimality conditions of entropic transport."""

import itertools
import warnings

import numpy as np
import pytest
from scipy.special import logsumexp

from pact.rewards import (
    answer_f1,
    answer_verify,
    call_similarity,
    match_rewards,
    solve_metrics,
    strike,
    transport_plan,
)


def call(name, **arguments):
    return {"name": name, "arguments": arguments}


@pytest.mark.parametrize(
    ("observation", "gold", "verified"),
    [
        ("Abdel Fattah el-Sisi. won", "abdel fattah EL-SISI", True),
        ("a total of 1,024 GB", "1,024", True),
        ("a total of 1024 GB", "1,024", True),
        ('["Cambridge, Massachusetts"]', "Massachusetts, Cambridge", True),  # every part, in any order
        ("Cambridge", "Cambridge, Massachusetts", False),
        ("12 casualties", "2", True),  # a substring is enough: the original's rule
        ("", "x", False),
    ],
)
def test_answer_verify(observation, gold, verified):
    assert answer_verify(observation, gold) is verified


def test_a_call_strikes_one_answer_of_its_own_tool():
    unsolved = {"find": ["paris", "lyon", "paris"], "sum": ["3"]}
    assert strike(unsolved, "find", "Paris and Lyon")
    assert unsolved == {"find": ["lyon", "paris"], "sum": ["3"]}
    assert not strike(unsolved, "sum", "paris")
    assert not strike(unsolved, "other", "3")
    assert strike(unsolved, "sum", "3")
    assert not strike(unsolved, "sum", "3")


def test_solve_metrics():
    assert solve_metrics(2, 4, 3) == {"solve_p": 0.5, "solve_r": 2 / 3, "solve_f1": 4 / 7}
    assert solve_metrics(0, 0, 3) == {"solve_p": 1.0, "solve_r": 0.0, "solve_f1": 0.0}
    with pytest.raises(ValueError, match="no such score"):
        solve_metrics(3, 2, 3)
    with pytest.raises(ValueError, match="no such score"):
        solve_metrics(0, 2, 0)


@pytest.mark.parametrize(
    ("text", "gold", "f1"),
    [
        ("<answer>New York</answer>", "new york", 1.0),
        ("so <answer>the New-York\nsubway</answer> <answer>x</answer>", "new york", 2 * 2 / (4 + 2)),
        ("New York", "new york", 0.0),
        ("<answer></answer>", "new york", 0.0),
        ("<answer>London</answer>", "new york", 0.0),
    ],
)
def test_answer_f1(text, gold, f1):
    assert answer_f1(text, gold) == pytest.approx(f1)


def test_call_similarity():
    gold = call("Find", city="Paris", year=2020)
    assert call_similarity(call("find", city="Paris", year=2020), gold) == 1.0
    assert call_similarity(call("find", city="Rome", year=2020), gold) == (1 + 1 + 1) / 4
    assert call_similarity(call("find", city="Paris", month=1), gold) == pytest.approx((1 + 1 / 3 + 1) / 4)
    assert call_similarity(call("find"), gold) == 1 / 4
    assert call_similarity(call("search", city="Paris", year=2020), gold) == 0.0
    assert call_similarity(call("now"), call("now")) == 1.0
    assert call_similarity(call("now", zone=1), call("now")) == 1 / 2


# S = [[1, 5/6], [5/8, 1/3], [0, 0]]: greed takes the exact pair and leaves the second call the poor one.
PREDICTED = [call("f", a=1, b=1), call("f", b=1), call("g")]
GOLD = [call("f", a=1, b=1), call("f", a=1)]
SIMILARITY_PG = np.array([[1, 5 / 6], [5 / 8, 1 / 3], [0, 0]])


def test_optimal_is_the_best_assignment():
    best = max(sum(SIMILARITY_PG[i, j] for j, i in enumerate(rows)) for rows in itertools.permutations(range(3), 2))
    rewards = match_rewards(PREDICTED, GOLD, unmatched=-0.5)
    assert sum(rewards[:2]) == pytest.approx(best)
    assert rewards == [pytest.approx(5 / 6), pytest.approx(5 / 8), -0.5]


def test_greedy_takes_the_best_pair_first():
    assert match_rewards(PREDICTED, GOLD, "greedy") == [1.0, pytest.approx(1 / 3), 0.0]


def test_a_partner_that_shares_nothing_is_no_partner():
    for assignment in ("optimal", "greedy"):
        assert match_rewards([call("g")], GOLD, assignment, unmatched=-0.5) == [-0.5]


@pytest.mark.parametrize("assignment", ["optimal", "greedy", "transport"])
def test_an_empty_side_divides_by_nothing(assignment):
    assert match_rewards([], GOLD, assignment) == []
    assert match_rewards(PREDICTED, [], assignment, unmatched=-1.0) == [-1.0] * 3


SLOW = np.array([[1, 0], [0.54, 1], [0, 1], [1, 0], [1, 0], [0, 0.54]])


def log_domain_plan(similarity, reg=0.1, steps=1000):
    """Sinkhorn in the log domain, from the formula: T_ij = exp(S_ij / reg + a_i + b_j) with uniform marginals."""
    scaled = similarity / reg
    rows, columns = scaled.shape
    b = np.zeros(columns)
    for _ in range(steps):
        a = -np.log(rows) - logsumexp(scaled + b, axis=1)
        b = -np.log(columns) - logsumexp(scaled + a[:, None], axis=0)
    return np.exp(scaled + a[:, None] + b)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 4), (4, 1), (3, 5), (8, 8)])
def test_transport_equals_the_log_domain_formula(rows, columns):
    """And T is the plan iff its marginals are uniform and log T - S / reg = a_i + b_j for some a, b."""
    similarity = np.random.default_rng(rows * 10 + columns).random((rows, columns)).round(1)
    plan = transport_plan(similarity)
    np.testing.assert_allclose(plan, log_domain_plan(similarity), rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(plan.sum(axis=0), 1 / columns, atol=1e-8)
    np.testing.assert_allclose(plan.sum(axis=1), 1 / rows, atol=1e-8)
    rest = np.log(plan) - similarity / 0.1
    double_centred = rest - rest.mean(axis=0) - rest.mean(axis=1, keepdims=True) + rest.mean()
    np.testing.assert_allclose(double_centred, 0, atol=1e-9)


@pytest.mark.parametrize("similarity", [np.zeros((3, 2)), np.ones((2, 3)), np.eye(12), np.tri(12, 5), SLOW])
def test_transport_is_quiet_and_sound_at_the_extremes(similarity):
    """``SLOW`` stops after 1,000 steps with columns off by 1e-4; rows are exact all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = transport_plan(similarity)
    rows, columns = similarity.shape
    np.testing.assert_allclose(plan.sum(axis=1), 1 / rows, rtol=1e-12)
    np.testing.assert_allclose(plan.sum(axis=0), 1 / columns, atol=1e-3)
    np.testing.assert_allclose(plan, log_domain_plan(similarity), atol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1])
def test_transport_takes_similarities_only(bad):
    with pytest.raises(ValueError, match=r"0\.\.1"):
        transport_plan(np.array([[0.5, bad]]))


def test_transport_rewards():
    expected = (transport_plan(SIMILARITY_PG) * SIMILARITY_PG).sum(axis=1)
    np.testing.assert_allclose(match_rewards(PREDICTED, GOLD, "transport"), expected)
    assert match_rewards([call("f", a=1)], [call("f", a=1)], "transport") == [pytest.approx(1.0)]


def test_unknown_assignment():
    with pytest.raises(ValueError, match="one of optimal, greedy, transport"):
        match_rewards(PREDICTED, GOLD, "hungarian")
