"""Evaluation records, their summary and paired comparison."""

import numpy as np
import pytest
from test_rollout import ADD, Arithmetic, ArithmeticEpisode, Scripted

import pact.envs
from pact.engines.replay import ReplayEngine
from pact.envs.base import Score, Staged, Task
from pact.evaluate import (
    EpisodeRecord,
    Play,
    counted,
    differences,
    evaluate,
    evaluate_in_batches,
    load_records,
    markdown,
    paired_improvement,
    save_records,
    summarize,
    tabulate,
)
from pact.rollout import CallRules, RolloutLimits, Sampling


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
    assert found[1] == EpisodeRecord(
        "test-1", 1.0, {"solved": 1.0}, 1, "answer", prompt_tokens=found[1].prompt_tokens, response_tokens=2,
        messages=[{"role": "assistant", "reasoning_content": "", "content": "3", "tool_calls": []}],
    )  # fmt: skip
    assert found[1].prompt_tokens == len(engine.sessions[0].prompts[1])
    assert [len(session.prompts) for session in engine.sessions] == [3, 1]


def test_long_prompts_count_as_failed(tokenizer):
    env = Arithmetic()
    found = evaluate(Scripted(tokenizer, ["3"], context_length=8), env, tokenizer, env.tasks("test"))
    assert [(record.reward, record.turns, record.overlong) for record in found] == [(0.0, 0, True)] * 4


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
    message = {"role": "assistant", "content": "\ud800"}
    whole = EpisodeRecord("w", 1.0, {}, 1, "answer", "group", 3, 4, [message], {"kept": [1]})
    kept = [*records([0.25, 1.0]), whole]
    save_records(kept, tmp_path / "records.jsonl")
    assert load_records(tmp_path / "records.jsonl") == kept


def test_records_of_older_runs_are_read(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"id": "t", "reward": 1.0, "metrics": {"solved": 1.0}, "turns": 2, "stop_reason": "answer"}\n')
    assert load_records(path) == [EpisodeRecord("t", 1.0, {"solved": 1.0}, 2, "answer")]


def of_groups(**values):
    return [
        EpisodeRecord(f"{group}{i}", value, {"solved": value}, 1, "answer", None if group == "none" else group)
        for group, listed in values.items()
        for i, value in enumerate(listed)
    ]


def test_a_table_has_groups_averages_and_a_total():
    rng = np.random.default_rng(0)
    large, small = rng.normal(0.0, 1.0, 300), rng.normal(1.0, 2.0, 60)
    found = of_groups(large=large, none=[100.0, 100.0], small=small)
    table = tabulate(found, {"both": ["large", "small"], "absent": ["large", "missing"]})
    assert list(table) == ["large", "small", "both", "total"]
    assert len(counted(found)) == table["total"]["solved"].n == table["both"]["solved"].n == 360
    assert table["large"] == summarize(found[:300])
    assert table["total"]["solved"].mean == pytest.approx(np.concatenate([large, small]).mean())
    both = table["both"]["solved"]
    assert both.mean == pytest.approx((large.mean() + small.mean()) / 2)
    # Each group is resampled on its own: the variance of half the sum of two independent means.
    half = 1.96 * np.sqrt(large.var() / 300 + small.var() / 60) / 2
    assert (both.mean - both.lower, both.upper - both.mean) == pytest.approx((half, half), rel=0.08)


def test_without_any_group_all_records_count():
    found = of_groups(none=[0.0, 1.0])
    assert list(tabulate(found)) == ["total"]
    assert summarize(found)["reward"].n == 2


def test_a_table_as_markdown():
    table = tabulate(of_groups(a=[1.0], b=[0.0, 0.0]))
    assert markdown(table).splitlines() == [
        "|  | n | solved |",
        "| --- | ---: | ---: |",
        "| a | 1 | 1.0000 [1.0000, 1.0000] |",
        "| b | 2 | 0.0000 [0.0000, 0.0000] |",
        f"| total | 3 | {table['total']['solved']} |",
    ]
    assert markdown(tabulate(records([0.25]))).startswith("|  | n | reward | solved | calls |")


def test_differences_are_paired_by_task():
    before, after = of_groups(a=[0.0, 1.0], none=[5.0]), of_groups(a=[0.5, 1.0], none=[9.0])
    found = differences(before, after[::-1])
    assert [(record.id, record.reward, record.metrics, record.group) for record in found] == [
        ("a0", 0.5, {"solved": 0.5}, "a"),
        ("a1", 0.0, {"solved": 0.0}, "a"),
    ]


def test_batches_come_one_by_one_and_what_is_done_is_not_played_again(tokenizer):
    env = Arithmetic()
    tasks = env.tasks("test")
    play = Play(batch_size=2)
    first = next(evaluate_in_batches(Scripted(tokenizer, ["3"]), env, tokenizer, tasks, play))
    assert [record.id for record in first] == ["test-0", "test-1"]
    assert first[0].messages == [{"role": "assistant", "reasoning_content": "", "content": "3", "tool_calls": []}]
    engine, seen = Scripted(tokenizer, ["3"]), []
    done = {first[0].id: first[0], "test-2": first[0]}
    rest = list(
        evaluate_in_batches(engine, env, tokenizer, tasks, play, done=done, prepare=lambda batch: seen.append(batch))
    )
    assert [[record.id for record in batch] for batch in rest] == [["test-1"], ["test-3"]]
    assert seen == [[tasks[1]], [tasks[3]]]


def test_a_sampled_episode_is_the_same_after_a_stop(tokenizer):
    """The stream of a batch depends on the seed and its place among all tasks, whether or not earlier ones are done."""
    env = Arithmetic()
    tasks, play = env.tasks("test"), Play(sampling=Sampling(1.0), batch_size=2, seed=7)
    whole, resumed = Scripted(tokenizer, ["3"]), Scripted(tokenizer, ["3"])
    batches = list(evaluate_in_batches(whole, env, tokenizer, tasks, play))
    done = {record.id: record for record in batches[0]}
    list(evaluate_in_batches(resumed, env, tokenizer, tasks, play, done=done))
    assert whole.sessions[1].seeds == resumed.sessions[0].seeds
    assert whole.sessions[0].seeds != whole.sessions[1].seeds


class Remembering:
    """Staged: task t-1 tells a number, which task t-0 asks for; t-1 comes second in the list and must come first."""

    def __init__(self):
        self.known = None

    def tasks(self, split):
        return [Task("t-0", [], [ADD], data=1, group="asked"), Task("t-1", [], [ADD], data=0)]

    def stage(self, task):
        return 1 - int(task.id[-1])

    def ready(self, task):
        return Task(task.id, [{"role": "user", "content": f"Known: {self.known}"}], [ADD], data=task.data)

    def keep(self, task, artifact):
        self.known = artifact

    def start(self, task):
        return RememberingEpisode(Arithmetic(), task)


class RememberingEpisode(ArithmeticEpisode):
    def score(self, messages):
        return Score(1.0, [1.0], {}, artifact=f"{self.task.id} said {messages[-1]['content']}")


def test_stages_are_played_in_order_and_hear_of_what_was_kept(tokenizer):
    env = Remembering()
    assert isinstance(env, Staged)
    engine = ReplayEngine(tokenizer)
    prompts = []

    def prepare(batch):
        for task in batch:
            prompts.append(task.messages[0]["content"])
            engine.learn(task, [{"role": "assistant", "content": "5"}])

    batches = list(evaluate_in_batches(engine, env, tokenizer, env.tasks("test"), Play(), prepare=prepare))
    assert prompts == ["Known: None", "Known: t-1 said 5"]
    assert [[record.id for record in batch] for batch in batches] == [["t-1"], ["t-0"]]
    fresh = Remembering()
    done = {"t-1": batches[0][0]}
    list(evaluate_in_batches(engine, fresh, tokenizer, fresh.tasks("test"), Play(), done=done, prepare=prepare))
    assert prompts[2:] == ["Known: t-1 said 5"]
    with pytest.raises(
        ValueError, match="no script"
    ):  # evaluate goes through the stages too, here to an unknown prompt
        evaluate(ReplayEngine(tokenizer), Remembering(), tokenizer, env.tasks("test"))


def test_the_group_is_that_of_the_task_as_listed(tokenizer):
    """``ready`` may return any task; what counts was decided by the list."""
    env, engine = Remembering(), Scripted(tokenizer, ["5"])
    assert [record.group for record in evaluate(engine, env, tokenizer, env.tasks("test"))] == ["asked", None]


def test_rules_and_limits_reach_the_rollouts(tokenizer):
    env = Arithmetic()
    turns = ["<tool_call>{</tool_call>", "2"]
    task = env.tasks("test")[:1]
    [observed] = evaluate(Scripted(tokenizer, turns), env, tokenizer, task)
    [skipped] = evaluate(Scripted(tokenizer, turns), env, tokenizer, task, rules=CallRules(malformed="skip"))
    [limited] = evaluate(Scripted(tokenizer, turns), env, tokenizer, task, limits=RolloutLimits(max_turns=1))
    assert [record.turns for record in (observed, skipped, limited)] == [2, 1, 1]
    assert [record.stop_reason for record in (observed, skipped, limited)] == ["answer", "answer", "turn_limit"]


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
