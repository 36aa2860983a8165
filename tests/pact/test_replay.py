"""The replaying agent: what it says, token by token, and whole rollouts of it."""

import json
from dataclasses import replace

import pytest
from test_rollout import ADD, Arithmetic
from tiny_tokenizers import LAYOUTS, tiny_tokenizer

from pact.engines.replay import ReplayEngine, read_scripts
from pact.envs import Task
from pact.rollout import GREEDY, RolloutLimits, run_rollouts
from pact.trace import end_of_turn_id, prepare_tokenizer, render_prompt, render_trace


def calling(*numbers, **more):
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": a, "b": b}}} for a, b in numbers]
    return {"role": "assistant", "content": "", "tool_calls": calls} | more


SCRIPT = [
    calling((0, 2), (1, 1), reasoning_content="Add them. <|im_end|> </think> is text."),
    {"role": "tool", "name": "add", "content": "not said by the agent"},
    {"role": "assistant", "content": "2"},
]


@pytest.fixture(scope="module", params=LAYOUTS)
def tokenizer(request):
    return prepare_tokenizer(tiny_tokenizer(request.param))


def play(tokenizer, script, tasks=1, limits=None, env=None, n=1):
    env = env or Arithmetic()
    engine = ReplayEngine(tokenizer)
    chosen = env.tasks("test")[:tasks]
    for task in chosen:
        engine.learn(task, script)
    return run_rollouts(env, chosen, engine, tokenizer, n=n, limits=limits or RolloutLimits(max_turn_tokens=1000))


def test_a_rollout_of_a_script_is_its_trace_token_by_token(tokenizer):
    script = [calling((0, 2), (1, 1), reasoning_content="Add them."), SCRIPT[2]]
    [[played], [other]] = play(tokenizer, script, tasks=2)
    assert played.stop_reason == other.stop_reason == "answer"
    assert [message["role"] for message in played.messages] == ["assistant", "tool", "tool", "assistant"]
    assert [message["content"] for message in played.messages[1:]] == ["2", "2", "2"]
    assert (played.score.reward, other.score.reward) == (1.0, 0.0)
    trace = render_trace(played.messages, [ADD], tokenizer)
    assert played.ids == trace.ids
    said = [place for place, sampled in enumerate(played.sampled) if sampled]
    assert [played.component[place] for place in said] == [trace.component[place] for place in said]
    assert set(played.logp) == {0.0}


def test_only_its_own_turns_are_said_and_control_text_stays_text(tokenizer):
    [[played]] = play(tokenizer, [{"role": "assistant", "content": "a <|im_end|> b"}, *SCRIPT])
    assert played.messages[0]["content"] == "a <|im_end|> b"
    assert len(played.messages) == 1


def test_turns_after_the_script_are_empty(tokenizer):
    [[played]] = play(tokenizer, SCRIPT[:1])
    assert [message["role"] for message in played.messages] == ["assistant", "tool", "tool", "assistant"]
    assert (played.messages[-1]["content"], played.stop_reason) == ("", "answer")
    [[silent]] = play(tokenizer, [])
    assert (silent.ids, silent.stop_reason) == ([end_of_turn_id(tokenizer)], "answer")


def test_it_goes_on_after_later_user_messages_and_is_the_same_in_every_rollout(tokenizer):
    script = [{"role": "assistant", "content": text} for text in ("one", "two", "2")]
    [rollouts] = play(tokenizer, script, env=Arithmetic(questions=2), n=3)
    for played in rollouts:
        assert [message["content"] for message in played.messages] == ["one", "Again?", "two", "Again?", "2"]
        assert played.ids == rollouts[0].ids


def test_tasks_that_share_a_prompt_say_their_scripts_in_order(tokenizer):
    env = Arithmetic()
    task = env.tasks("test")[0]
    twins = [task, replace(task, id="twin", data=3)]
    engine = ReplayEngine(tokenizer)
    for _ in range(2):  # learnt batch by batch, also when one script comes again
        for twin, text in zip(twins, ("2", "5")):
            engine.learn(twin, [{"role": "assistant", "content": text}])
        played = run_rollouts(env, twins, engine, tokenizer, n=1)
        assert [(trajectory.messages[0]["content"], trajectory.score.reward) for [trajectory] in played] == [
            ("2", 1.0),
            ("5", 1.0),
        ]
    with pytest.raises(ValueError, match="a prompt has 2 different scripts, and all were said"):
        run_rollouts(env, twins, engine, tokenizer, n=1)


def test_limits_are_honoured(tokenizer):
    [[cut]] = play(tokenizer, SCRIPT, limits=RolloutLimits(max_turn_tokens=3))
    assert (len(cut.ids), cut.stop_reason, len(cut.turns)) == (3, "token_limit", 1)
    [[one]] = play(tokenizer, SCRIPT, limits=RolloutLimits(max_turns=1, max_turn_tokens=1000))
    assert (one.stop_reason, len(one.turns)) == ("turn_limit", 1)
    task = Arithmetic().tasks("test")[0]
    length = sum(map(len, render_prompt(task.messages, task.tools, tokenizer)))
    [[full]] = play(tokenizer, SCRIPT, limits=RolloutLimits(max_turn_tokens=1000, context_length=length + 5))
    assert (len(full.ids), full.stop_reason) == (5, "context_limit")


def test_what_it_cannot_say_is_refused(tokenizer):
    task = Arithmetic().tasks("test")[0]
    engine = ReplayEngine(tokenizer)
    engine.learn(task, SCRIPT)
    with pytest.raises(ValueError, match="tool call 0 has no name"):
        engine.learn(Task("t", [{"role": "user", "content": "?"}], []), [{"role": "assistant", "tool_calls": [{}]}])
    stop = end_of_turn_id(tokenizer)
    with pytest.raises(ValueError, match="1 of 1 prompts have no script"):
        engine.open([[1, 2]], stop_id=stop, sampling=GREEDY, seeds=[0])
    with pytest.raises(ValueError, match="use one tokenizer"):
        engine.open([[1, 2]], stop_id=stop + 1, sampling=GREEDY, seeds=[0])


def test_script_files(tmp_path):
    path = tmp_path / "scripts.jsonl"
    call = {"name": "add", "arguments": {"a": 1, "b": 2}, "observation": "3"}
    rows = [
        {"id": "a", "messages": SCRIPT, "reward": 1.0},
        {"id": "b", "calls": [call, call], "answer": "3"},
        {"id": "c", "calls": []},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scripts = read_scripts(path)
    assert scripts["a"] == SCRIPT
    assert [len(message.get("tool_calls", [])) for message in scripts["b"]] == [1, 1, 0]
    assert scripts["b"][-1]["content"] == "3"
    assert scripts["c"] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no scripts"),
        ("{", "line 1: it is not valid JSON"),
        ('{"calls": []}', "line 1: no id"),
        ('{"id": "a", "calls": []}\n' * 2, "line 2: a second script for a"),
        ('{"id": "a"}', "line 1: neither messages nor calls"),
        ('{"id": "a", "calls": [{"arguments": {}}]}', "line 1: tool call 0 has no name"),
    ],
)
def test_bad_script_files(tmp_path, text, message):
    path = tmp_path / "scripts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_scripts(path)
    with pytest.raises(ValueError, match="there is no file"):
        read_scripts(tmp_path / "missing.jsonl")
