"""The toybox environment: its tasks, its episodes, its traces and its tokenizer."""

import json
import zlib

import pytest

from pact.envs import make
from pact.envs.base import Environment, Episode
from pact.envs.toybox import NAMES, SIDES, Toybox


@pytest.fixture(scope="module")
def env():
    return Toybox(train=400, test=200, hops=(1, 3), flaky=0.1)


def calls(messages):
    return [c["function"] for m in messages for c in m.get("tool_calls") or ()]


def test_is_an_environment(env):
    assert isinstance(env, Environment)
    assert isinstance(env.start(env.tasks("test")[0]), Episode)


def test_same_settings_same_tasks_and_any_size():
    small, large = Toybox(train=20), Toybox(train=50)
    assert [t.messages for t in small.tasks("train")] == [t.messages for t in large.tasks("train")[:20]]
    assert small.tasks("train")[7].expert == large.tasks("train")[7].expert
    assert Toybox(train=20, seed=1).tasks("train")[0].messages != small.tasks("train")[0].messages


def test_splits_share_no_prompt(env):
    train, test = ({t.messages[0]["content"] for t in env.tasks(split)} for split in ("train", "test"))
    assert len(train) > 300
    assert len(test) > 100
    assert not train & test


def test_expert_traces_solve_their_tasks_and_cut_traces_do_not(env):
    for task in [*env.tasks("train"), *env.tasks("test")]:
        score = env.start(task).score(task.expert)
        assert score.reward == 1.0
        assert sum(score.turn_rewards) == pytest.approx(1.0)
        assert len(score.turn_rewards) == sum(m["role"] == "assistant" for m in task.expert)
        cut = env.start(task).score(task.expert[:-1])
        assert cut.reward == 0.0
        assert sum(cut.turn_rewards) == pytest.approx(0.5)


def test_trace_observations_are_those_of_an_episode(env):
    for task in env.tasks("train")[:50]:
        episode = env.start(task)
        observed = [episode.call(c["name"], c["arguments"]) for c in calls(task.expert)]
        assert observed == [m["content"] for m in task.expert if m["role"] == "tool"]


def test_turns_are_two_to_eight(env):
    turns = [sum(m["role"] == "assistant" for m in t.expert) for t in env.tasks("train")]
    assert min(turns) == 2
    assert 5 <= max(turns) <= 8


def test_look_alike_sources_differ_in_their_name_alone_and_one_holds_the_fact(env):
    for task in env.tasks("train")[:100]:
        for hop in task.data.hops:
            alike = [t["function"] for t in task.tools if t["function"]["description"].startswith(hop.relation.name)]
            assert len(alike) == 3
            assert len({json.dumps(s | {"name": ""}) for s in alike}) == 1
            assert [s["name"] for s in alike if hop.subject in task.data.facts[s["name"]]] == [hop.tool]


def test_the_prompt_does_not_tell_the_right_source():
    """Over many tasks the right source is first, second and third among its look-alikes equally often."""
    position, tasks = [0, 0, 0], Toybox(train=3000, hops=(1, 1)).tasks("train")
    for task in tasks:
        hop = task.data.hops[0]
        alike = [t["function"]["name"] for t in task.tools if t["function"]["name"].startswith(hop.relation.base + "_")]
        position[alike.index(hop.tool)] += 1
        assert hop.tool not in task.messages[0]["content"]
    assert all(abs(n - 1000) < 130 for n in position)  # 5 standard deviations of a fair draw


def test_recoveries_are_marked_and_as_frequent_as_asked():
    tasks = Toybox(train=1000, recovery_share=0.25, flaky=0.0).tasks("train")
    failed = [[m for m in t.expert if m.get("supervised") is False] for t in tasks]
    assert 0.19 < sum(map(bool, failed)) / 1000 < 0.31
    assert {len(messages) for messages in failed} == {0, 1, 2}
    assert all(len({c["name"] for c in calls(messages)}) == len(messages) for messages in failed)
    for task, messages in zip(tasks, failed, strict=True):
        for message in messages:
            observation = task.expert[task.expert.index(message) + 1]["content"]
            assert "has no entry for" in observation
    assert not any(m.get("supervised") is False for t in Toybox(recovery_share=0.0).tasks("train") for m in t.expert)


def test_the_validation_split_is_taken_from_training():
    """Asking for one leaves test tasks as they are, and no question is in two splits."""
    options = {"train": 400, "test": 100, "arithmetic": 0.0}
    env, without = Toybox(validation=100, **options), Toybox(**options)
    asked = {s: {t.messages[0]["content"] for t in env.tasks(s)} for s in ("train", "validation", "test")}
    assert len(env.tasks("validation")) == 100
    assert not asked["train"] & asked["validation"]
    assert not asked["validation"] & asked["test"]
    assert not asked["train"] & asked["test"]
    assert [t.messages for t in env.tasks("test")] == [t.messages for t in without.tasks("test")]
    assert without.tasks("validation") == []
    assert {zlib.crc32(t.messages[0]["content"].encode()) % 5 for t in without.tasks("train")} == {1, 2, 3, 4}


def sides_of(task):
    return {name.split("_")[1] for name in task.data.relations}


def test_sides_are_drawn_anew_for_every_relation():
    env = Toybox(train=200, test=50, sides=["north", "south", "east", "west"], sources=2, distractors=2)
    drawn = []
    for task in env.tasks("train"):
        for hop in task.data.hops:
            alike = [tool for tool, relation in task.data.relations.items() if relation is hop.relation]
            assert len(alike) == 2
            assert hop.tool in alike
            drawn.append(frozenset(tool.split("_")[1] for tool in alike))
    assert len(set(drawn)) == 6  # every pair
    assert set().union(*map(sides_of, env.tasks("train"))) == {"north", "south", "east", "west"}
    unseen = Toybox(test=50, sides=["upper", "lower", "west"]).tasks("test")
    assert set().union(*map(sides_of, unseen)) == {"upper", "lower", "west"}


def test_a_second_source_answers_too():
    env = Toybox(train=1000, hops=(1, 1), second_source=0.5, flaky=0.0, arithmetic=0.0, recovery_share=1.0)
    twice = 0
    for task in env.tasks("train"):
        [hop] = task.data.hops
        alike = [tool for tool, relation in task.data.relations.items() if relation is hop.relation]
        holders = [tool for tool in alike if task.data.facts[tool].get(hop.subject) == hop.value]
        assert hop.tool in holders
        twice += len(holders) == 2
        failed = calls([m for m in task.expert if m.get("supervised") is False])
        assert failed
        assert not {call["name"] for call in failed} & set(holders)
        for tool in holders:  # each is a way to full marks
            episode = env.start(task)
            observation = episode.call(tool, {hop.relation.subject: hop.subject})
            done = [{"role": "assistant", "content": ""}, {"role": "tool", "content": observation}]
            score = episode.score([*done, {"role": "assistant", "content": task.data.answer}])
            assert (score.reward, score.turn_rewards) == (1.0, [0.5, 0.5])
    assert 0.42 < twice / 1000 < 0.58


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sides": ["north", "down", "west"]}, "different ones of north, south"),
        ({"sides": ["north", "north", "west"]}, "different ones of north, south"),
        ({"sides": "north"}, "different ones of north, south"),
        ({"sides": ["north", "west"]}, "3 sources need as many sides, not 2"),
        ({"second_source": 1.5}, "second_source is a share"),
        ({"validation": -1}, "train, test and validation must be at least 0"),
    ],
)
def test_options_that_cannot_be(options, says):
    with pytest.raises(ValueError, match=says):
        Toybox(**options)


def test_trace_share():
    tasks = Toybox(train=1000, trace_share=0.4).tasks("train")
    assert 0.34 < sum(t.expert is not None for t in tasks) / 1000 < 0.46


def numeric_task(env):
    return next(t for t in env.tasks("train") if t.data.addend is not None)


def test_calls_are_checked(env):
    task = numeric_task(env)
    episode = env.start(task)
    hop = task.data.hops[0]
    key = hop.relation.subject
    assert episode.call("no_such_tool", {}) == "error: there is no tool no_such_tool"
    assert episode.call(hop.tool, {}) == f"error: missing argument {key}"
    assert episode.call(hop.tool, {key: 3}) == f"error: argument {key} must be a string"
    assert episode.call("calc", {"a": "1", "b": 2}) == "error: argument a must be a integer"
    assert episode.call("calc", {"a": True, "b": 2}).startswith("error")
    assert episode.call("calc", {"a": 1, "b": 2, "c": 3}) == "error: unknown argument c"
    assert episode.call("calc", {"a": 1, "b": 2}) == '{"sum": 3}'
    assert "has no entry for Nobody" in [episode.call(hop.tool, {key: "Nobody"}) for _ in range(2)][-1]


def test_busy_sources_answer_at_the_second_call():
    env = Toybox(train=50, flaky=1.0)
    task = env.tasks("train")[0]
    hop, episode = task.data.hops[0], env.start(task)
    arguments = {hop.relation.subject: hop.subject}
    assert episode.call(hop.tool, arguments).endswith("is busy, call it again")
    assert json.loads(episode.call(hop.tool, arguments)) == {hop.relation.name: hop.value}


def test_score_wants_the_answer_last_and_pays_a_fact_once(env):
    task = next(t for t in env.tasks("test") if len(t.data.hops) == 2 and t.data.addend is None)
    episode = env.start(task)
    assert episode.score([]).reward == 0.0
    assert episode.score([{"role": "assistant", "content": f" {task.data.answer.upper()} "}]).reward == 1.0
    assert episode.score([{"role": "assistant", "content": f"maybe {task.data.answer}"}]).reward == 0.0
    tool = next(m for m in task.expert if m["role"] == "tool" and not m["content"].startswith("error"))
    twice = episode.score([{"role": "assistant", "content": "", "tool_calls": []}, tool, tool])
    assert twice.turn_rewards == [0.25]
    assert twice.metrics["success"] == 0.0


def test_reward_setting():
    task = Toybox(train=30).tasks("train")[0]
    assert Toybox(reward="turn").start(task).score(task.expert[:-1]).reward == pytest.approx(0.5)
    assert Toybox(reward="outcome").start(task).score(task.expert[:-1]).reward == 0.0


@pytest.mark.parametrize(
    "options",
    [{"flaky": 2}, {"hops": (2, 1)}, {"hops": (1, 9)}, {"sources": 0}, {"sources": 7}, {"train": -1}, {"reward": "x"}],
)
def test_bad_settings(options):
    with pytest.raises(ValueError, match="toybox"):
        Toybox(**options)


def test_unknown_environment_and_split(env):
    with pytest.raises(ValueError, match="unknown environment 'toolbox': choose one of"):
        make("toolbox")
    with pytest.raises(ValueError, match="unknown split 'dev': choose train, validation, test"):
        env.tasks("dev")


def test_tokenizer_round_trips_and_spells_names_alike(env):
    tokenizer = env.tokenizer()
    for text in (
        "Grüße, 漢字 \n\t<b>",
        json.dumps({"a": [1, 2.5]}),
        *(t.messages[0]["content"] for t in env.tasks("test")),
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for subject in (name for names in NAMES.values() for name in names):
        (token,) = tokenizer.encode(subject)
        for text in (f'{{"person": "{subject}"}}', f"of {subject}.", f"no entry for {subject}"):
            assert tokenizer.encode(text).count(token) == 1
    for side in SIDES:  # look-alike sources differ in one token
        base, last = tokenizer.encode(f"staff_{side}")
        assert [tokenizer.decode([base]), tokenizer.decode([last])] == ["staff", f"_{side}"]
