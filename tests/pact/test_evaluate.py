"""Evaluation records, their summary and paired comparison."""

import numpy as np
import pytest
from test_rollout import Arithmetic, Scripted

import pact.envs
from pact.envs.base import Score
from pact.evaluate import EpisodeRecord, evaluate, load_records, paired_improvement, save_records, summarize


def records(values, prefix="t"):
    return [
        EpisodeRecord(f"{prefix}{i}", v, {"solved": 2 * v, "calls": 1.0}, 1, "answer") for i, v in enumerate(values)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return pact.envs.make("toybox", train=1, test=1).tokenizer()


def test_one_record_a_task_in_order(tokenizer):
    env = Arithmetic()
    engine = Scripted(tokenizer, ["3"])
    found = evaluate(engine, env, tokenizer, env.tasks("test"), batch_size=3)
    assert [record.id for record in found] == ["test-0", "test-1", "test-2", "test-3"]
    assert [record.reward for record in found] == [0.0, 1.0, 0.0, 0.0]
    assert found[1] == EpisodeRecord("test-1", 1.0, {"solved": 1.0}, 1, "answer")
    assert [len(session.prompts) for session in engine.sessions] == [3, 1]


def test_long_prompts_count_as_failed(tokenizer):
    env = Arithmetic()
    found = evaluate(Scripted(tokenizer, ["3"], context_length=8), env, tokenizer, env.tasks("test"))
    assert [(record.reward, record.turns, record.stop_reason) for record in found] == [(0.0, 0, "context_limit")] * 4


def test_summary_against_the_normal_interval():
    value = np.random.default_rng(0).normal(2.0, 3.0, 100)
    summary = summarize(records(value), seed=1)
    assert set(summary) == {"reward", "solved", "calls"}
    reward = summary["reward"]
    half = 1.96 * value.std() / 10
    assert (reward.mean, reward.n) == (pytest.approx(value.mean()), 100)
    assert (reward.mean - reward.lower, reward.upper - reward.mean) == pytest.approx((half, half), rel=0.08)
    assert summary["solved"].lower == pytest.approx(2 * reward.lower)
    assert (summary["calls"].lower, summary["calls"].upper) == (1.0, 1.0)
    assert summarize(records(value), seed=1) == summary


def test_pairing_removes_what_tasks_share():
    rng = np.random.default_rng(0)
    difficulty, gain = rng.normal(0, 5, 150), rng.normal(0.5, 1.0, 150)
    before, after = records(difficulty), records(difficulty + gain)
    mean, lower, n = paired_improvement(before, after[::-1], "reward")
    assert (mean, n) == (pytest.approx(gain.mean()), 150)
    assert mean - lower == pytest.approx(1.96 * gain.std() / np.sqrt(150), rel=0.08)
    doubled = paired_improvement(before, after, "solved")
    assert doubled[:2] == pytest.approx((2 * mean, 2 * lower))


def test_records_survive_a_file(tmp_path):
    kept = records([0.25, 1.0])
    save_records(kept, tmp_path / "records.jsonl")
    assert load_records(tmp_path / "records.jsonl") == kept


def test_a_reward_that_is_not_finite_names_the_task(tokenizer, monkeypatch):
    env = Arithmetic()
    monkeypatch.setattr("test_rollout.ArithmeticEpisode.score", lambda *_: Score(float("nan"), [], {}))
    with pytest.raises(ValueError, match="the reward of task 'test-0' is nan"):
        evaluate(Scripted(tokenizer, ["3"]), env, tokenizer, env.tasks("test"))


def test_bad_input(tokenizer):
    env = Arithmetic()
    engine = Scripted(tokenizer, ["3"])
    with pytest.raises(ValueError, match="no task"):
        evaluate(engine, env, tokenizer, [])
    with pytest.raises(ValueError, match="share an id"):
        evaluate(engine, env, tokenizer, env.tasks("test")[:1] * 2)
    with pytest.raises(ValueError, match="no record"):
        summarize([])
    with pytest.raises(ValueError, match="choose one of reward, calls, solved"):
        paired_improvement(records([1.0]), records([1.0]), "success")
    with pytest.raises(ValueError, match="2 before, 2 after, 0 in common"):
        paired_improvement(records([1.0, 2.0]), records([1.0, 2.0], "u"))
