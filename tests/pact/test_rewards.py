"""Rewards against hand-worked cases, brute force, and the optimality conditions of entropic transport."""

import itertools
import warnings
from collections import Counter

import numpy as np
import pytest
from scipy.special import logsumexp

from pact.rewards import (
    REWARDS,
    Gold,
    Reward,
    Turn,
    answer_f1,
    answer_verify,
    call_similarity,
    match_rewards,
    solve_f1_reward,
    solve_metrics,
    strike,
    toolrl_correctness,
    transport_plan,
    well_formed,
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


def test_answer_f1_of_a_text_without_tags():
    assert answer_f1("New York!", "new york", tags=False) == 1.0
    assert answer_f1("It is New York", "new york", tags=False) == pytest.approx(2 * 2 / (4 + 2))
    assert answer_f1("", "new york", tags=False) == 0.0


@pytest.mark.parametrize(
    ("solved", "calls", "expected", "text", "solve_rate", "reward"),
    [
        (1, 1, 1, "", 0.0, 1.0),
        (1, 3, 1, "", 0.0, 2 / 4),
        (0, 2, 1, "1,024", 0.0, 0.0),  # a call was made: the text does not count
        (2, 2, 2, "", 0.0, 4 / 3),  # two at once is more than 1, as released
        (0, 0, 2, " \n", 1.0, -0.5),
        (0, 0, 2, "it is 1024 <tool_call>{", 1.0, -0.3),
        (0, 0, 2, "1024</tool_call>", 0.0, -0.3),
        (0, 0, 2, "It is 1024.", 0.0, 1 / 3),
        (0, 0, 0, "It is 1,024.", 1.0, 1.0),
        (0, 0, 0, "I do not know", 1.0, 0.5),
        (0, 0, 2, "I do not know", 0.5, 0.0),
    ],
)
def test_solve_f1_reward(solved, calls, expected, text, solve_rate, reward):
    assert solve_f1_reward(solved, calls, expected, text, "1,024", solve_rate) == pytest.approx(reward)


def test_solve_f1_reward_of_no_step():
    with pytest.raises(ValueError, match="no such step: 2 solved by 1 calls of 3"):
        solve_f1_reward(2, 1, 3, "", "x")


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


def test_transport_without_pot_is_refused_before_any_rollout(monkeypatch):
    monkeypatch.setattr("pact.rewards.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="transport needs POT: pip install"):
        Reward("matchtir", "transport")
    assert Reward("toolrl", "transport").name == "toolrl"


def test_unknown_assignment():
    with pytest.raises(ValueError, match="one of optimal, greedy, transport"):
        match_rewards(PREDICTED, GOLD, "hungarian")


def released_toolrl(gold_calls, pred_calls):
    """ToolRL's correctness as its release computes it, with lists and counters (float64)."""

    def overlap(one, other):
        if one == other:
            return 1.0
        if not one or not other:
            return 0.0
        one, other = Counter(one), Counter(other)
        shared = sum(min(one[k], other[k]) for k in one)
        return shared / (sum(one.values()) + sum(other.values()) - shared)

    score = overlap(sorted(c["name"] for c in gold_calls), sorted(c["name"] for c in pred_calls))
    most, used = 1.0, set()
    for gold in gold_calls:
        most += 1 + len(gold["arguments"])
        best, best_index = 0.0, None
        for i, pred in enumerate(pred_calls):
            if i not in used and pred["name"] == gold["name"]:
                value = overlap(sorted(gold["arguments"]), sorted(pred["arguments"]))
                value += sum(pred["arguments"].get(k, None) == v for k, v in gold["arguments"].items())
                if value > best:
                    best, best_index = value, i
        if best_index is not None:
            used.add(best_index)
            score += best
    return 6 * score / most - 3


def random_calls(rng, least):
    names, keys = ["f", "g", "h"], ["a", "b", "c"]
    return [
        call(str(rng.choice(names)), **{k: int(rng.integers(3)) for k in keys[: rng.integers(0, 4)]})
        for _ in range(rng.integers(least, 6))
    ]


def test_toolrl_correctness_is_the_released_one():
    rng = np.random.default_rng(0)
    for _ in range(300):
        pred, gold = random_calls(rng, 0), random_calls(rng, 1)
        assert toolrl_correctness(pred, gold) == pytest.approx(released_toolrl(gold, pred), abs=1e-12)
        assert -3 <= toolrl_correctness(pred, gold) <= 3


def test_toolrl_correctness_at_its_ends():
    assert toolrl_correctness(GOLD, GOLD) == 3.0
    assert toolrl_correctness([], GOLD) == -3.0
    assert toolrl_correctness([call("other")], GOLD) == -3.0
    assert toolrl_correctness(GOLD, []) == toolrl_correctness([], []) == 0.0
    # names 1/1, argument names 1/2, values 1 of 2: 6 * 2.5 / 4 - 3
    assert toolrl_correctness([call("f", a=1)], [call("f", a=1, b=1)]) == pytest.approx(6 * 2.5 / 4 - 3)


# One episode: a right call, then a call that repeats it beside a wrong one, then the answer.
TURNS = [
    Turn("", [call("f", a=1)], ["paris"], True),
    Turn("", [call("f", a=1), call("g")], ["paris", "paris"], True),
    Turn("It is <answer>Lyon, France</answer>", [], [], True),
]
WANTED = Gold([call("f", a=1), call("g", b=2)], "lyon", {"f": ["paris"], "g": ["rome"]})
OWN = (0.25, [0.0, 0.25, 0.0])


def test_the_environments_own_reward_stays():
    assert Reward().is_own
    assert Reward().of(TURNS, Gold(), OWN) == (0.25, [0.0, 0.25, 0.0])
    assert not Reward(format_weight=0.5).is_own
    assert Reward(format_weight=0.5).of(TURNS, Gold(), OWN) == (0.75, [0.0, 0.25, 0.5])


def test_solve_f1_of_an_episode():
    """Whole episode: 1 struck by 3 calls. Turns: FTRL's steps, with what is still open; Rome is never struck."""
    reward, turns = Reward("solve_f1").of(TURNS, WANTED, OWN)
    assert reward == 2 * 1 / (3 + 1)
    assert turns == [2 * 1 / (1 + 1), 0.0, 1 / (1 + 1)]
    silent = [Turn("", [], [], False)]
    assert Reward("solve_f1").of(silent, WANTED, OWN) == (-0.5, [-0.5])
    broken = [Turn("<tool_call>{</tool_call>", [], [], False), Turn("lyon", [], [], True)]
    assert Reward("solve_f1").of(broken, WANTED, OWN) == (-0.3, [-0.3, 1 / 3])


def test_toolrl_of_an_episode():
    calls = [c for turn in TURNS for c in turn.calls]
    correct = toolrl_correctness(calls, WANTED.calls)
    assert Reward("toolrl").of(TURNS, WANTED, OWN) == (correct + 1, [0.0, 0.0, correct + 1])
    assert Reward("toolrl", format_weight=0.0).of(TURNS, WANTED, OWN) == (correct, [0.0, 0.0, correct])


def test_matchtir_of_an_episode():
    """Each gold call is given once: the call that repeats the first one is unmatched."""
    answer = 2 * 1 / (2 + 1)  # {lyon, france} against {lyon}
    g = (1 + 0 + 0) / 3
    for assignment in ("optimal", "greedy"):
        reward, turns = Reward("matchtir", assignment).of(TURNS, WANTED, OWN)
        assert turns == pytest.approx([1.0, g / 2, answer])
        assert reward == pytest.approx(sum(turns))
    _, turns = Reward("matchtir", match_unmatched=-0.5).of(TURNS, WANTED, OWN)
    assert turns == pytest.approx([1.0, (g - 0.5) / 2, answer])
    _, turns = Reward("matchtir", "transport").of(TURNS, WANTED, OWN)
    similarity = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, g]])
    shares = (log_domain_plan(similarity) * similarity).sum(axis=1)
    assert turns == pytest.approx([shares[0], (shares[1] + shares[2]) / 2, answer])
    assert Reward("matchtir").of(TURNS, Gold([], "lyon"), OWN)[1] == [0.0, 0.0, pytest.approx(answer)]
    assert Reward("matchtir").of(TURNS[:2], WANTED, OWN)[1] == pytest.approx([1.0, g / 2])  # cut: no answer


def test_answer_f1_of_an_episode():
    assert Reward("answer_f1").of(TURNS, WANTED, OWN) == (pytest.approx(2 / 3), [0.0, 0.0, pytest.approx(2 / 3)])
    assert Reward("answer_f1").of(TURNS[:2], WANTED, OWN) == (0.0, [0.0, 0.0])
    plain = [Turn("Lyon", [], [], True)]
    assert Reward("answer_f1").of(plain, WANTED, OWN) == (0.0, [0.0])
    assert Reward("answer_f1", answer_tags=False).of(plain, WANTED, OWN) == (1.0, [1.0])


@pytest.mark.parametrize(
    ("turns", "tagged", "plain"),
    [
        (TURNS, True, True),
        (TURNS[:2], False, False),  # ends with a call
        ([Turn("<answer>a</answer><answer>b</answer>", [], [], True)], False, True),
        ([Turn("<answer>a", [], [], True)], False, True),
        ([Turn("a", [], [], True)], False, True),
        ([Turn(" ", [], [], True)], False, False),
        ([Turn("", [], [], False), Turn("<answer>a</answer>", [], [], True)], False, False),
    ],
)
def test_format_term(turns, tagged, plain):
    assert well_formed(turns) is tagged
    assert well_formed(turns, answer_tags=False) is plain


def test_what_a_reward_needs():
    missing = {name: Reward(name).missing(Gold()) for name in REWARDS}
    assert missing == {
        "env": [],
        "solve_f1": ["expected", "answer"],
        "toolrl": ["calls"],
        "matchtir": ["calls", "answer"],
        "answer_f1": ["answer"],
    }
    assert all(Reward(name).missing(WANTED) == [] for name in REWARDS)
