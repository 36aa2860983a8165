"""The multi-turn loop: what is recorded, where it stops, and that the expert trace never reaches it."""

import json
import logging
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import pact.envs
from pact.engines.transformers import TransformersEngine
from pact.envs import Score, Task
from pact.rollout import CallRules, Completion, RolloutLimits, Sampling, run_rollouts
from pact.trace import Component, end_of_turn_id, render_observation, render_prompt, render_trace

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two whole numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


def call(a, b, name="add"):
    arguments = json.dumps({"a": a, "b": b}, separators=(",", ":"))
    return f'<tool_call>{{"name":"{name}","arguments":{arguments}}}</tool_call>'


class Arithmetic:
    """One tool, ``add``; the answer is the sum. ``questions`` more user turns follow the first answer."""

    def __init__(self, questions=0, broken=False):
        self.questions, self.broken, self.opened, self.closed = questions, broken, 0, 0

    def tasks(self, split):
        return [
            Task(f"{split}-{n}", [{"role": "user", "content": f"What is {n} + 2?"}], [ADD], data=n) for n in range(4)
        ]

    def start(self, task):
        self.opened += 1
        return ArithmeticEpisode(self, task)


class ArithmeticEpisode:
    def __init__(self, env, task):
        self.env, self.task, self.questions, self.tools = env, task, env.questions, task.tools
        assert task.expert is None

    def call(self, name, arguments):
        if self.env.broken:
            raise KeyError("lost")
        return str(arguments["a"] + arguments["b"]) if name == "add" else f"error: there is no tool {name}"

    def user_turn(self):
        self.questions -= 1
        return [{"role": "user", "content": "Again?"}] if self.questions >= 0 else None

    def score(self, messages):
        turns = [float(m.get("content") == str(self.task.data + 2)) for m in messages if m["role"] == "assistant"]
        return Score(turns[-1] if turns else 0.0, turns, {"solved": turns[-1] if turns else 0.0})

    def close(self):
        self.env.closed += 1


class Scripted:
    """A Generator that says what it is told: ``turns[i]`` is the text of the i-th turn of every row."""

    def __init__(self, tokenizer, turns, max_batch=64, context_length=None):
        self.tokenizer, self.turns, self.max_batch, self.context_length = tokenizer, turns, max_batch, context_length
        self.sessions, self.together = [], False

    def open(self, prompts, *, stop_id, sampling, seeds):
        self.sessions.append(ScriptedSession(self, prompts, stop_id, seeds))
        return self.sessions[-1]


class ScriptedSession:
    def __init__(self, generator, prompts, stop_id, seeds):
        self.generator, self.prompts, self.stop_id, self.seeds = generator, prompts, stop_id, seeds
        self.contexts = [list(prompt) for prompt in prompts]
        self.turn = [0] * len(prompts)
        self.going, self.closed = {}, False

    def generate(self, append, max_new_tokens):
        self.going |= max_new_tokens
        for row, ids in append.items():
            self.contexts[row] += ids
        row = max(self.going)  # one row at a time, the last one first: rows end in any order
        text = self.generator.turns[self.turn[row]]
        ids = [*self.generator.tokenizer(text, add_special_tokens=False).input_ids, self.stop_id]
        ids = ids[: self.going.pop(row)]
        self.turn[row] += 1
        self.contexts[row] += ids
        return {row: Completion(ids, [-0.5] * len(ids), ids[-1] == self.stop_id)} | self.others()

    def others(self):
        """The rows that end with this one: with ``together`` all of them."""
        return self.generate({}, {}) if self.generator.together and self.going else {}

    def close(self):
        self.closed = True


@pytest.fixture(scope="module")
def tokenizer():
    return pact.envs.make("toybox", train=1, test=1).tokenizer()


def roll(tokenizer, turns, env=None, n=1, tasks=1, max_batch=64, context_length=None, together=False, **options):
    env = env or Arithmetic()
    generator = Scripted(tokenizer, turns, max_batch, context_length)
    generator.together = together
    trajectories = run_rollouts(env, env.tasks("test")[:tasks], generator, tokenizer, n=n, **options)
    assert env.opened == env.closed
    assert all(session.closed for session in generator.sessions)
    return trajectories, generator


def check_record(trajectory, tokenizer):
    """Lists of one length; observations are the ids render_observation gives for the messages between two turns."""
    length = len(trajectory.ids)
    assert length == len(trajectory.sampled) == len(trajectory.logp) == len(trajectory.component)
    assert [m["role"] for m in trajectory.messages].count("assistant") == len(trajectory.turns)
    for position in range(length):
        in_turn = any(start <= position < end for start, end in trajectory.turns)
        assert trajectory.sampled[position] == in_turn
        assert (trajectory.logp[position] != 0.0) == in_turn
        assert (trajectory.component[position] == Component.OBSERVATION) == (not in_turn)
    between, blocks = [], []
    for message in trajectory.messages[1:]:
        if message["role"] == "assistant":
            blocks.append(render_observation(between, tokenizer))
            between = []
        else:
            between.append(message)
    bounds = zip([end for _, end in trajectory.turns], [start for start, _ in trajectory.turns[1:]])
    assert [trajectory.ids[end:start] for end, start in bounds] == blocks


def test_a_trajectory_is_what_the_trace_of_its_messages_would_be(tokenizer):
    turns = [f"<think>Add them. Quick.</think>{call(0, 2)}{call(1, 2)}", "<think>Done.</think>2"]
    [[trajectory]], generator = roll(tokenizer, turns)
    check_record(trajectory, tokenizer)
    assert trajectory.stop_reason == "answer"
    assert [m["role"] for m in trajectory.messages] == ["assistant", "tool", "tool", "assistant"]
    assert [m["content"] for m in trajectory.messages[1:3]] == ["2", "3"]
    assert trajectory.score == Score(1.0, [0.0, 1.0], {"solved": 1.0})
    task = Arithmetic().tasks("test")[0]
    head_ids, suffix_ids = render_prompt(task.messages, task.tools, tokenizer)
    assert trajectory.prompt_ids == head_ids + suffix_ids
    assert generator.sessions[0].contexts[0] == trajectory.prompt_ids + trajectory.ids
    trace = render_trace(trajectory.messages, task.tools, tokenizer)
    assert trace.ids == trajectory.ids
    labels = [label for label, sampled in zip(trace.component, trajectory.sampled) if sampled]
    assert labels == [label for label, sampled in zip(trajectory.component, trajectory.sampled) if sampled]


def test_malformed_calls_are_answered(tokenizer):
    turns = ['<tool_call>\n{"name": "add", "arguments"\n</tool_call>', "<tool_call>\n{}", call(1, 2, "sub"), "3"]
    [[trajectory]], _ = roll(tokenizer, turns)
    check_record(trajectory, tokenizer)
    replies = [m for m in trajectory.messages if m["role"] == "tool"]
    assert [reply["name"] for reply in replies] == ["error", "error", "sub"]
    assert "not valid JSON" in replies[0]["content"]
    assert "not closed" in replies[1]["content"]
    assert replies[2]["content"] == "error: there is no tool sub"
    assert trajectory.stop_reason == "answer"


def test_user_turns_follow_answers(tokenizer):
    [[trajectory]], _ = roll(tokenizer, ["1", "2", call(1, 1), "2"], Arithmetic(questions=2))
    check_record(trajectory, tokenizer)
    assert [m["role"] for m in trajectory.messages] == ["assistant", "user"] * 2 + ["assistant", "tool", "assistant"]
    assert trajectory.stop_reason == "answer"
    assert len(trajectory.turns) == 4


def test_turn_limit_still_runs_the_last_calls(tokenizer):
    [[trajectory]], _ = roll(tokenizer, [call(0, 1)] * 9, limits=RolloutLimits(max_turns=3))
    assert trajectory.stop_reason == "turn_limit"
    assert [m["role"] for m in trajectory.messages] == ["assistant", "tool"] * 3
    assert trajectory.turns[-1][1] == len(trajectory.ids)
    [[trajectory]], _ = roll(tokenizer, [call(0, 1), "2"], limits=RolloutLimits(max_turns=2))
    assert trajectory.stop_reason == "answer"


def test_steps_within_a_user_turn_are_limited(tokenizer):
    """The calls of the step that reaches the limit are executed; an answer before it opens a new count."""
    limits = RolloutLimits(max_user_turn_steps=2)
    [[trajectory]], _ = roll(tokenizer, [call(0, 1), "1", call(0, 1), call(0, 2), "2"], Arithmetic(1), limits=limits)
    assert trajectory.stop_reason == "turn_limit"
    assert [m["role"] for m in trajectory.messages] == [
        *("assistant", "tool", "assistant"),
        *("user", "assistant", "tool", "assistant", "tool"),
    ]
    assert trajectory.messages[-1]["content"] == "2"
    check_record(trajectory, tokenizer)
    [[trajectory]], _ = roll(tokenizer, [call(0, 1), "2", call(0, 1), "2"], Arithmetic(1), limits=limits)
    assert trajectory.stop_reason == "answer"


def test_malformed_calls_may_be_skipped_as_the_released_evaluations_do(tokenizer):
    bad = "<tool_call>oops</tool_call>"
    skip = CallRules(malformed="skip")
    [[trajectory]], _ = roll(tokenizer, [call(0, 1) + bad, f"2{bad}", "never"], rules=skip)
    assert [(m["role"], m["content"]) for m in trajectory.messages] == [
        ("assistant", ""),
        ("tool", "1"),
        ("assistant", "2"),
    ]
    assert trajectory.stop_reason == "answer"
    check_record(trajectory, tokenizer)


def test_calls_as_json_in_the_text(tokenizer):
    text = '<think>Add.</think>I call {"name": "add", "arguments": {"a": 0, "b": 2}} now'
    [[trajectory]], _ = roll(tokenizer, [text, "2"], rules=CallRules(form="json"))
    assert [m["content"] for m in trajectory.messages] == ["I call\nnow", "2", "2"]
    check_record(trajectory, tokenizer)
    labelled = [token for token, kind in zip(trajectory.ids, trajectory.component) if kind == Component.TOOL_CALL]
    assert tokenizer.decode(labelled).strip() == '{"name": "add", "arguments": {"a": 0, "b": 2}}'
    [[trajectory]], _ = roll(tokenizer, [text, "2"])
    assert trajectory.stop_reason == "answer"


class Meeting(Arithmetic):
    """Its calls wait until those of all four tasks have come, the last task's first: only threads get through."""

    workers = 4

    def __init__(self, broken=()):
        super().__init__()
        self.broken, self.barrier = broken, threading.Barrier(4, timeout=20)

    def start(self, task):
        self.opened += 1
        return MeetingEpisode(self, task)


class MeetingEpisode(ArithmeticEpisode):
    def call(self, name, arguments):
        self.env.barrier.wait()
        time.sleep(0.02 * (4 - self.task.data))
        if self.task.data in self.env.broken:
            raise KeyError(self.task.id)
        return str(arguments["a"] + self.task.data)


def test_calls_of_different_episodes_run_at_once_and_keep_their_order(tokenizer):
    env = Meeting()
    turns = [call(0, 1) + call(5, 1), "2"]
    groups, _ = roll(tokenizer, turns, env, tasks=4, together=True)
    for number, [trajectory] in enumerate(groups):
        assert [m["content"] for m in trajectory.messages[1:3]] == [str(number), str(5 + number)]
        check_record(trajectory, tokenizer)
    env = Meeting(broken=(1, 2))
    with pytest.raises(RuntimeError, match="Meeting raised KeyError in tool 'add' of task 'test-2'"):
        roll(tokenizer, [call(0, 1)], env, tasks=4, together=True)  # rows end last first
    assert env.opened == env.closed == 4


def test_an_observation_that_is_no_text_is_named(tokenizer):
    env = Arithmetic()
    env.start = lambda task: NoText(env, task)
    with pytest.raises(RuntimeError, match=r"Arithmetic answered NoneType in tool 'add' of task 'test-0'. .* is text"):
        run_rollouts(env, env.tasks("test")[:1], Scripted(tokenizer, [call(0, 1)]), tokenizer, n=1)


class NoText(ArithmeticEpisode):
    def call(self, name, arguments):
        return None


@pytest.mark.parametrize("limit", ["max_turn_tokens", "max_response_tokens", "context_length"])
def test_a_turn_cut_by_a_limit_ends_the_episode(tokenizer, limit):
    text = f"<think>Long.</think>\n\n{call(0, 1)}\n and so on and on and on"
    [[whole]], _ = roll(tokenizer, [text, "2"])
    cut = whole.turns[0][1] - 2
    tokens = cut + len(whole.prompt_ids) if limit == "context_length" else cut
    [[trajectory]], _ = roll(tokenizer, [text, "2"], limits=RolloutLimits(**{limit: tokens}))
    assert trajectory.stop_reason == ("context_limit" if limit == "context_length" else "token_limit")
    assert trajectory.ids == whole.ids[:cut]
    assert end_of_turn_id(tokenizer) not in trajectory.ids
    # The call was never made, so the message does not claim it.
    assert [m["role"] for m in trajectory.messages] == ["assistant"]
    assert not trajectory.messages[0].get("tool_calls")
    assert trajectory.messages[0]["cut"] is True
    assert not any("cut" in message for message in whole.messages)


@pytest.mark.parametrize("limit", ["max_response_tokens", "context_length"])
def test_an_observation_that_leaves_no_room_ends_the_episode(tokenizer, limit):
    [[whole]], _ = roll(tokenizer, [call(0, 1), "2"])
    start = whole.turns[1][0]
    tokens = start + len(whole.prompt_ids) if limit == "context_length" else start
    [[trajectory]], _ = roll(tokenizer, [call(0, 1), "2"], limits=RolloutLimits(**{limit: tokens}))
    assert trajectory.stop_reason == ("context_limit" if limit == "context_length" else "token_limit")
    assert trajectory.ids == whole.ids[: whole.turns[0][1]]
    assert trajectory.messages == whole.messages[:2]
    [[trajectory]], _ = roll(tokenizer, [call(0, 1), "2"], limits=RolloutLimits(**{limit: tokens + 1}))
    assert trajectory.ids == whole.ids[: start + 1]


def test_a_prompt_that_does_not_fit(tokenizer):
    with pytest.raises(ValueError, match=r"prompt of task 'test-0' has .* longer context"):
        roll(tokenizer, ["2"], context_length=20)
    env = Arithmetic()
    tasks = env.tasks("test")[:2]
    tasks[0] = replace(tasks[0], messages=[{"role": "user", "content": "word " * 300}])
    head_ids, suffix_ids = render_prompt(tasks[1].messages, tasks[1].tools, tokenizer)
    generator = Scripted(tokenizer, ["3"], context_length=len(head_ids + suffix_ids) + 40)
    [[long], [short]] = run_rollouts(env, tasks, generator, tokenizer, n=1, fail_long_prompts=True)
    assert (long.stop_reason, long.ids, long.turns, long.score.reward) == ("context_limit", [], [], 0.0)
    assert short.score.reward == 1.0


def test_batches_and_seeds(tokenizer):
    """Every episode has a seed of its own, which neither the batch size nor the number of rollouts changes."""
    seeds = {}
    for n, max_batch, batch_size in [(3, 64, None), (3, 4, None), (3, 64, 2), (2, 64, None)]:
        trajectories, generator = roll(
            tokenizer, ["2"], n=n, tasks=4, max_batch=max_batch, batch_size=batch_size, seed=5
        )
        assert [[t.task.id for t in group] for group in trajectories] == [[f"test-{i}"] * n for i in range(4)]
        assert max(len(session.prompts) for session in generator.sessions) <= min(max_batch, batch_size or max_batch)
        seeds[n, max_batch, batch_size] = np.concatenate([s.seeds for s in generator.sessions]).reshape(4, n)
    reference = seeds[3, 64, None]
    assert len(np.unique(reference)) == 12
    for key, found in seeds.items():
        np.testing.assert_array_equal(found, reference[:, : key[0]])
    _, generator = roll(tokenizer, ["2"], n=3, tasks=4, seed=6)
    assert not set(generator.sessions[0].seeds) & set(reference.ravel().tolist())


def test_an_environment_that_raises_is_named(tokenizer):
    env = Arithmetic(broken=True)
    with pytest.raises(RuntimeError, match="Arithmetic raised KeyError in tool 'add' of task 'test-0'"):
        run_rollouts(env, env.tasks("test")[:1], Scripted(tokenizer, [call(0, 1)]), tokenizer, n=1)
    assert env.opened == env.closed == 1


def test_bad_settings():
    for options in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Sampling(**options)
    for options in ({"form": "xml"}, {"malformed": "raise"}):
        with pytest.raises(ValueError, match=next(iter(options.values()))):
            CallRules(**options)
    for name in ("max_turns", "max_turn_tokens", "max_response_tokens", "context_length", "max_user_turn_steps"):
        with pytest.raises(ValueError, match=name):
            RolloutLimits(**{name: 0})


def test_zero_rollouts_are_refused(tokenizer):
    with pytest.raises(ValueError, match="n must be at least 1"):
        roll(tokenizer, ["2"], n=0)


def tiny_policy(tokenizer):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        initializer_range=0.1,
    )
    return Qwen3ForCausalLM(config)


def test_rollouts_are_bit_identical_whatever_the_expert_says(tokenizer, caplog):
    env = pact.envs.make("toybox", train=3, test=1)
    tasks = list(env.tasks("train"))
    other = [replace(task, expert=[{"role": "assistant", "content": "SECRET"}]) for task in tasks]
    none = [replace(task, expert=None) for task in tasks]
    assert all(task.expert for task in tasks)
    engine = TransformersEngine(tiny_policy(tokenizer))
    limits = RolloutLimits(max_turns=3, max_turn_tokens=24)
    with caplog.at_level(logging.WARNING):
        runs = [
            run_rollouts(env, given, engine, tokenizer, n=4, limits=limits, seed=1) for given in (tasks, other, none)
        ]
    for run in runs:
        for group in run:
            assert all(trajectory.task.expert is None for trajectory in group)
    records = [[[(t.ids, t.logp, t.messages, t.score) for t in group] for group in run] for run in runs]
    assert records[0] == records[1] == records[2]
    assert len({tuple(t.ids) for t in runs[0][0]}) == 4


def test_recorded_logprobs_are_those_of_the_recorded_ids(tokenizer):
    """Prompt and trajectory in one stock forward give the log-probs that sampling recorded, turn after turn."""
    env = Arithmetic(questions=3)
    model = tiny_policy(tokenizer)
    with torch.no_grad():  # turns end soon, so that there are several
        model.lm_head.weight[end_of_turn_id(tokenizer)] *= 20.0
    engine = TransformersEngine(model)
    limits = RolloutLimits(max_turns=4, max_turn_tokens=60)
    groups = run_rollouts(env, env.tasks("test")[:2], engine, tokenizer, n=4, limits=limits, sampling=Sampling(0.9))
    assert sum(len(t.turns) > 1 for group in groups for t in group) > 4
    for group in groups:
        for trajectory in group:
            check_record(trajectory, tokenizer)
            ids = torch.tensor([trajectory.prompt_ids + trajectory.ids])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, len(trajectory.prompt_ids) - 1 : -1] / 0.9
            expected = logits.log_softmax(-1).gather(1, torch.tensor(trajectory.ids)[:, None])[:, 0].numpy()
            expected[~np.array(trajectory.sampled)] = 0.0
            np.testing.assert_allclose(trajectory.logp, expected, rtol=0, atol=1e-5)
