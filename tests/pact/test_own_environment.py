"""Own JSONL, own functions, own rewards: from the line to the model, and every way a line can be wrong."""

import asyncio
import gc
import json
import math
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pact.cli import main
from pact.engines.replay import ReplayEngine
from pact.envs import Environment, make
from pact.envs.own import ToolEnvironment, final_answer, tool_schema
from pact.own_reward import OwnReward, run_reward
from pact.rewards import Gold, Reward, Turn, answer_match
from pact.rollout import run_rollouts
from pact.samples import check_tasks, with_reward
from pact.user_code import load_object

EXAMPLES = Path(__file__).parents[2] / "examples"
CALCULATOR = f"{EXAMPLES / 'own_environment.py'}:Calculator"
DATA = EXAMPLES / "calculator_traces.jsonl"


def add(a: int, b: int = 1) -> int:
    """Add two integers.

    Args:
        a: one of them
        b: the other one
    """
    return a + b


def shout(text: str, mood: str | None = None, times: float = 1.0) -> str:
    """Say it louder.

    Args:
        text: what to say
        mood: how (choices: ["glad", "sad"])
        times: how much louder
    """
    if text == "boom":
        raise KeyError(text)
    return text.upper()


class Little(ToolEnvironment):
    tools = (add, shout)
    system = "Use the tools."


ASKS = {"role": "user", "content": "1 + 2?"}
CALLS = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}],
}
RETURNS = {"role": "tool", "name": "add", "content": "3"}
ANSWERS = {"role": "assistant", "content": "3"}
EXPERT = [CALLS, RETURNS, ANSWERS]
LINE = {"question": "1 + 2?", "expert": EXPERT}


def write(folder, *rows):
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def call_with(**arguments):
    return {**CALLS, "tool_calls": [{"function": {"name": "add", "arguments": arguments}}]}


# -- the lines ---------------------------------------------------------------------------------------------------------


def test_the_fields_of_a_line(tmp_path):
    rows = [
        {"question": "1 + 2?", "answer": 3},
        {"id": 7, "prompt": "1 + 2?", "expert": EXPERT, "split": "test", "level": "easy"},
        {"id": "c", "prompt": [{"role": "system", "content": "Mine."}, ASKS], "answer": "3", "tools": ["shout"]},
        {"id": "d", "messages": [ASKS], "expert": EXPERT, "answer": "three"},
        {"id": "e", "messages": [ASKS, *EXPERT], "tools": [tool_schema(add)]},
        {"id": "f", "messages": [ASKS, ANSWERS, ASKS], "answer": "3"},
    ]
    env = Little(write(tmp_path, *rows))
    assert env.splits == ("train", "test")
    first, own_system, given, whole, history = env.tasks("train")
    [test] = env.tasks("test")
    assert first.messages == [{"role": "system", "content": "Use the tools."}, ASKS]
    assert (first.id, first.answer, first.expert) == ("line-1", "3", None)
    assert (test.id, test.answer, test.expert, test.data) == ("7", "3", EXPERT, {"level": "easy"})
    assert own_system.messages[0]["content"] == "Mine."
    assert [schema["function"]["name"] for schema in own_system.tools] == ["shout"]
    assert [schema["function"]["name"] for schema in first.tools] == ["add", "shout"]
    assert (given.answer, given.expert) == ("three", EXPERT)
    assert (whole.messages[1:], whole.expert, whole.answer) == ([ASKS], EXPERT, "3")
    assert (history.messages[1:], history.expert) == ([ASKS, ANSWERS, ASKS], None)
    check_tasks([*env.tasks("train"), test])
    with pytest.raises(ValueError, match=r"has no split 'dev', only train, test: choose one .* \"split\": \"dev\""):
        env.tasks("dev")


def failing(message):
    return {**message, "supervised": False}


WRONG_LINES = [
    ({}, "messages", "it is missing; write one of messages, prompt, question"),
    ({"question": "?", "prompt": "?", "answer": 1}, "question", "prompt and question are both there"),
    ({"question": ["?"], "answer": 1}, "question", "it is list; write text"),
    ({"question": "  ", "answer": 1}, "question", "it is empty"),
    ({"messages": "1 + 2?", "answer": 1}, "messages", "it is str; write a list of messages"),
    ({"prompt": {"role": "user"}, "answer": 1}, "prompt", "it is dict; write text or a list of messages"),
    ({"messages": [], "answer": 1}, "messages", "empty prompt"),
    ({"messages": [{"role": "human", "content": "?"}], "answer": 1}, "messages", "role 'human'; use system, user"),
    (
        {"messages": [{"role": "user", "content": None}], "answer": 1},
        "messages",
        "content is NoneType; give it as text",
    ),
    ({"prompt": [ASKS, ANSWERS], "answer": 1}, "prompt", "it ends with role assistant; the last message of a prompt"),
    ({"question": "1 + 2?"}, "answer", "it is missing, and there is no expert to take it from; write the final answer"),
    ({"question": "?", "answer": ["3"]}, "answer", "it is list; write text or a number"),
    ({"question": "?", "answer": True}, "answer", "it is bool; write text or a number"),
    ({"question": "?", "answer": ""}, "answer", "it is empty"),
    ({"question": "?", "answer": 1, "id": {}}, "id", "it is dict"),
    ({"question": "?", "answer": 1, "split": 1}, "split", "it is int; write text"),
    ({"question": "?", "answer": 1, "tools": "add"}, "tools", "it is str; write a list of tool names or of schemas"),
    ({"question": "?", "answer": 1, "tools": ["sub"]}, "tools", "no function is called sub; the environment has add"),
    ({"question": "?", "answer": 1, "tools": [{"name": "add"}]}, "tools", "tool 0: give {'type': 'function'"),
    ({"question": "?", "answer": 1, "tools": ["add", "add"]}, "tools", "two tools are called add"),
    ({"question": "?", "expert": "3"}, "expert", "it is str; write the list of messages"),
    ({"question": "?", "expert": []}, "expert", "empty trace"),
    ({"question": "?", "expert": [ASKS, ANSWERS]}, "expert", "a trace starts with an assistant turn"),
    ({"question": "?", "expert": [CALLS, ANSWERS]}, "expert", "trace message 0: 1 of its calls have no result"),
    ({"question": "?", "expert": [CALLS, RETURNS]}, "expert", "it ends with role tool, without an answer; end it with"),
    ({"question": "?", "expert": [{**ANSWERS, "content": " ", "reasoning_content": "Hm."}]}, "expert", "it ends with"),
    ({"messages": [ASKS, CALLS, RETURNS]}, "messages", "it ends with role tool, without an answer"),
    (
        {"question": "?", "expert": [CALLS, RETURNS, {"role": "robot"}]},
        "expert",
        "role 'robot'",
    ),
    ({"question": "?", "expert": [call_with(b=1), RETURNS, ANSWERS]}, "expert", "wrongly: argument a is missing"),
    ({"question": "?", "expert": [call_with(a="1"), RETURNS, ANSWERS]}, "expert", "argument a must be of type integer"),
    ({"question": "?", "expert": [call_with(a=1, c=2), RETURNS, ANSWERS]}, "expert", "no such argument; it takes a, b"),
    ({"question": "?", "expert": [failing(call_with(a="1")), RETURNS, ANSWERS], "answer": []}, "answer", "it is list"),
    (
        {"question": "?", "expert": [{**CALLS, "supervised": "no"}, RETURNS, ANSWERS]},
        "expert",
        "must be true or false",
    ),
    (
        {"question": "?", "expert": EXPERT, "tools": ["shout"]},
        "expert",
        "calls 'add', and the tools are shout;",
    ),
    (
        {"question": "?", "expert": [{**CALLS, "tool_calls": [{"function": {"name": "add"}}]}, RETURNS, ANSWERS]},
        "expert",
        "the call of add has no arguments; write an object, {} if it takes none",
    ),
    *(
        ({"question": "?", "expert": [{**CALLS, "tool_calls": calls}, RETURNS, ANSWERS]}, "expert", message)
        for calls, message in (
            (5, "tool_calls is int; give a list of calls"),
            (True, "tool_calls is bool; give a list of calls"),
            ([{"function": "add"}], "tool call 0 has no name"),
            ([{"function": ["add"]}], "tool call 0 has no name"),
            ([{"function": {"name": "add", "arguments": "[" * 100_000}}], "its arguments are not JSON"),
            ([{"function": {"name": "add", "arguments": f'{{"a": {"9" * 5000}}}'}}], "its arguments are not JSON"),
            ([{"function": {"name": "\x1b[2Jadd", "arguments": {}}}], "calls '\\x1b[2Jadd', and the tools are"),
        )
    ),
    ({**LINE, "id": "first"}, "id", "line 1 has the id 'first' too; give each line its own"),
]


@pytest.mark.parametrize(("row", "field", "message"), WRONG_LINES)
def test_a_wrong_line_says_file_line_field_and_mend(tmp_path, row, field, message):
    path = write(tmp_path, {**LINE, "id": "first"}, {**LINE, "id": "second"}, row)
    with pytest.raises(ValueError) as raised:
        Little(path)
    text = str(raised.value)
    assert text.startswith(f"{path}, line 3, field {field}: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty: write one JSON object a line, with id, messages"),
        (b"\n \n", "is empty"),
        (b'{"question": "?"', r"line 1: it is not valid JSON \(.*\); write one JSON object a line"),
        (b'\n{"question": NaN}\n', r"line 2: it is not valid JSON \(NaN is no JSON number"),
        (b'{"question": ' + b"9" * 5000 + b"}", "line 1: it is not valid JSON"),
        (b"[1]\n", "line 1: it is list; write one JSON object a line"),
        (b"[" * 100_000, "line 1: it is not valid JSON"),
        (b'{"question": "caf\xe9"}', "line 1: byte 18 is not UTF-8; save the file as UTF-8"),
        (b'\xef\xbb\xbf{"question": "?"}', "line 1: it begins with a byte order mark; save the file as UTF-8 without"),
        ('{"question": "?"}'.encode("utf-16"), "line 1: byte 1 is not UTF-8"),
    ],
)
def test_files_that_are_no_jsonl(tmp_path, data, message):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as raised:
        Little(path)
    assert str(raised.value).startswith(str(path))


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*nothing\.jsonl: give a JSONL file"):
        Little(tmp_path / "nothing.jsonl")


# -- tools and episodes ------------------------------------------------------------------------------------------------


@pytest.fixture
def episode(tmp_path):
    env = Little(write(tmp_path, LINE))
    return env.start(env.tasks("train")[0])


@pytest.mark.parametrize(
    ("name", "arguments", "observation"),
    [
        ("add", {"a": 1, "b": 2}, "3"),
        ("add", {"a": 1}, "2"),
        ("shout", {"text": "é", "mood": None, "times": 2}, "É"),
        ("shout", {"text": "boom"}, "error: KeyError: 'boom'"),
        ("shout", {"text": "x", "mood": "angry"}, "error: argument mood must be one of glad, sad"),
        ("add", {"a": True}, "error: argument a must be of type integer"),
        ("add", {"a": "42"}, "error: argument a must be of type integer"),
        ("add", {"a": None}, "error: argument a must be of type integer"),
        ("add", {}, "error: argument a is missing"),
        ("add", {"a": 1, "42": 1}, "error: there is no such argument; it takes a, b"),
        ("sub", {"a": 1}, "error: there is no tool of this name; the tools are add, shout"),
    ],
)
def test_calls(episode, name, arguments, observation):
    assert episode.call(name, arguments) == observation


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no message")


def test_what_a_function_may_return_and_raise(tmp_path):
    def odd(kind: str) -> object:
        """Return odd things.

        Args:
            kind: which
        """
        if kind == "exit":
            sys.exit(3)
        if kind == "cancelled":
            raise asyncio.CancelledError
        if kind == "mute":
            raise Mute
        circular: list = []
        circular.append(circular)
        return {"json": {"é": [1, None]}, "object": EXAMPLES, "circular": circular}[kind]

    class Odd(ToolEnvironment):
        tools = (odd,)

    env = Odd(write(tmp_path, {"question": "?", "answer": 1}))
    attempt = env.start(env.tasks("train")[0])
    assert attempt.call("odd", {"kind": "json"}) == '{"é": [1, null]}'
    assert attempt.call("odd", {"kind": "object"}) == json.dumps(str(EXAMPLES))
    assert attempt.call("odd", {"kind": "exit"}) == "error: SystemExit: 3"
    assert attempt.call("odd", {"kind": "circular"}).startswith("error: ValueError: Circular reference")
    assert attempt.call("odd", {"kind": "cancelled"}).startswith("error: CancelledError")
    assert attempt.call("odd", {"kind": "mute"}) == "error: Mute"


def test_a_function_cannot_change_what_the_policy_wrote(tmp_path):
    def smallest(numbers: list[int]) -> int:
        """Find the smallest number.

        Args:
            numbers: where
        """
        numbers.sort()
        return numbers[0]

    class Sorting(ToolEnvironment):
        tools = (smallest,)

    env = Sorting(write(tmp_path, {"question": "?", "answer": 1}))
    arguments = {"numbers": [3, 1, 2]}
    assert env.start(env.tasks("train")[0]).call("smallest", arguments) == "1"
    assert arguments == {"numbers": [3, 1, 2]}


def test_functions_of_an_episode_end_with_it(tmp_path):
    class Closing(ToolEnvironment):
        def functions(self, task):
            state = []

            def remember(text: str) -> int:
                """Remember a text.

                Args:
                    text: which
                """
                state.append(text)
                return len(state)

            self.last = weakref.ref(remember)
            return [remember]

    env = Closing(write(tmp_path, {"question": "?", "answer": 1}))
    attempt = env.start(env.tasks("train")[0])
    assert [attempt.call("remember", {"text": "a"}), attempt.call("remember", {"text": "b"})] == ["1", "2"]
    del attempt
    gc.collect()
    assert env.last() is None


class Counter:
    def __init__(self, start):
        self.value = start

    def count(self) -> int:
        """Count on."""
        self.value += 1
        return self.value


class Counting(ToolEnvironment):
    def functions(self, task):
        return [Counter(task.data["start"]).count]


def test_a_state_of_its_own_in_each_episode(tmp_path):
    env = Counting(
        write(tmp_path, {"question": "?", "answer": 1, "start": 4}, {"question": "?", "answer": 1, "start": 8})
    )
    four, eight = env.tasks("train")
    first, second, other = env.start(four), env.start(four), env.start(eight)
    assert [first.call("count", {}), first.call("count", {}), second.call("count", {})] == ["5", "6", "5"]
    assert other.call("count", {}) == "9"
    assert four.tools[0]["function"]["parameters"] == {"type": "object", "properties": {}}


def nameless(a: int, /, *b: int):
    """Nameless."""


async def later(a: int) -> int:
    """Wait.

    Args:
        a: what for
    """
    return a


def bare(a: int) -> int:
    return a


def untyped(a):
    """Untyped.

    Args:
        a: it
    """


def counted(a: int):
    """Count up to a."""
    yield a


def undescribed(a: int):
    """Undescribed."""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (nameless, r"tool nameless takes arguments without a name \(\*, \*\* or /\): name each of them"),
        (later, "tool later is async: write it as a plain function"),
        (bare, r"tool bare has no schema \(.*no docstring.*\): give it a docstring, and each argument a type hint"),
        (untyped, r"tool untyped has no schema \(.*missing a type hint"),
        (undescribed, r"tool undescribed has no schema \(.*no description for the argument 'a'"),
        (3, "a tool is a Python function, not 3"),
        (Counter, "tool Counter is a class: write a plain function"),
        (counted, "tool counted is a generator: write a plain function"),
        (max, "tool max has no signature .*: wrap it in a function of yours"),
    ],
)
def test_functions_without_a_schema(tmp_path, function, message):
    kind = type("Faulty", (ToolEnvironment,), {"tools": (function,)})
    with pytest.raises(ValueError, match=message):
        kind(write(tmp_path, {"question": "?", "answer": 1}))


def test_two_tools_of_one_name(tmp_path):
    with pytest.raises(ValueError, match="Twice has two tools called add: rename one"):
        type("Twice", (ToolEnvironment,), {"tools": (add, add)})(write(tmp_path, LINE))


# -- rewards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gold", "value"),
    [
        ("Lyon.", "lyon", 1.0),
        (" 1,234 ", "1234", 1.0),
        ("3.0", "3", 1.0),
        ("-3", "3", 0.0),
        ("3.5", "35", 0.0),
        ("It is 3", "3", 0.0),
        ("<answer>2</answer> or <answer> 3 </answer>", "<answer>3</answer>", 1.0),
        ("", "3", 0.0),
        ("nan", "nan", 1.0),
    ],
)
def test_answer_match(text, gold, value):
    assert answer_match(text, gold) == value


def test_the_reward_of_an_episode(episode):
    score = episode.score(EXPERT)
    assert (score.reward, score.turn_rewards, score.metrics) == (1.0, [0.0, 1.0], {"calls": 1.0})
    assert episode.score([CALLS, RETURNS]).reward == 0.0
    assert episode.score([{**ANSWERS, "cut": True}]).reward == 0.0
    assert episode.score([]).turn_rewards == []
    assert final_answer([]) == ""


def test_an_own_reward_in_the_class_needs_no_answer(tmp_path):
    class Terse(ToolEnvironment):
        def reward(self, task, messages):
            assert task.expert is None
            return 1.0, [0.25] * sum(message["role"] == "assistant" for message in messages)

    env = Terse(write(tmp_path, {"question": "1 + 2?"}))
    assert env.start(env.tasks("train")[0]).score([ANSWERS]).turn_rewards == [0.25]

    class Broken(ToolEnvironment):
        def reward(self, task, messages):
            return {}[task.id]

    env = Broken(write(tmp_path, {"question": "1 + 2?"}))
    with pytest.raises(RuntimeError, match="the environment's reward, task 'line-1': it raised KeyError: 'line-1'"):
        env.start(env.tasks("train")[0]).score([ANSWERS])


@pytest.mark.parametrize("value", [1, True, np.float32(1), np.ones(1)[0], torch.tensor(1.0)])
def test_numbers_a_reward_may_return(value):
    assert run_reward("r", 2, lambda: value) == (1.0, [0.0, 1.0])
    assert run_reward("r", 2, lambda: (value, [value, 0])) == (1.0, [1.0, 0.0])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "r: it returned None, and a reward is a finite number; return a number, or"),
        ("1", "it returned '1', and"),
        (math.nan, "it returned nan, and"),
        (-math.inf, "it returned -inf, and"),
        (torch.ones(2), "a reward is a finite number"),
        (10**400, "a reward is a finite number"),
        ([1.0, 2.0], "a reward is a finite number"),
        ((1.0,), r"it returned \(1.0,\); return a number, or"),
        ((1.0, 2.0), r"it returned \(1.0, 2.0\); return"),
        ((1.0, [1.0]), "it returned 1 turn rewards for 2 turns; return one a turn"),
        ((1.0, [1.0, None]), "it returned None, and"),
    ],
)
def test_values_a_reward_may_not_return(value, message):
    with pytest.raises(ValueError, match=message):
        run_reward("r", 2, lambda: value)


CODE = """
import math
from helper_of_reward import SCALE

def all_of_it(task, messages, turns, calls, env_reward, scale=SCALE):
    return scale * (len(messages) + 10 * len(turns) + 100 * len(calls) + 1000 * env_reward + 10000 * (task.id == "t"))

def by_turn(turns):
    return 1, [len(turn.calls) for turn in turns]

def none(turns): pass
def other(sample): return 0
def exits(task):
    raise SystemExit(0)


def raises(task): return task.gone
async def later(task): return 0
class Kind: pass
number = 3
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "helper_of_reward.py").write_text("SCALE = 1\n")
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    yield path
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]
    sys.modules.pop("helper_of_reward", None)


CALL = {"name": "add", "arguments": {}}
TURNS = [Turn("", [CALL, CALL], ["1", "2"], True), Turn("3", [], [], True)]


def test_own_rewards_get_what_they_name(code, tmp_path):
    task = replace(Little(write(tmp_path, LINE)).tasks("train")[0], id="t")
    reward = Reward(f"{code}:all_of_it")
    assert reward.of(TURNS, Gold(), (0.5, []), task, [CALLS, RETURNS, ANSWERS]) == (10723.0, [0.0, 10723.0])
    assert Reward(f"{code}:by_turn").of(TURNS, Gold(), (0.5, []), task, []) == (1.0, [2.0, 0.0])
    weighed = Reward(f"{code}:by_turn", format_weight=0.5, answer_tags=False)
    assert weighed.of(TURNS, Gold(), (0.5, []), task, []) == (1.5, [2.0, 0.5])
    assert reward.missing(Gold()) == []
    assert not reward.is_own
    with pytest.raises(RuntimeError, match=r"mine\.py:raises, task 't': it raised AttributeError: .*gone"):
        Reward(f"{code}:raises").of(TURNS, Gold(), (0.5, []), task, [])
    with pytest.raises(RuntimeError, match=r"mine\.py:exits, task 't': it raised SystemExit: 0"):
        Reward(f"{code}:exits").of(TURNS, Gold(), (0.5, []), task, [])
    with pytest.raises(ValueError, match=r"mine\.py:none, task 't': it returned None"):
        Reward(f"{code}:none").of(TURNS, Gold(), (0.5, []), task, [])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other", "has the parameter sample: it may take task, messages, turns, calls, env_reward, and others with a"),
        ("later", "is no plain function"),
        ("Kind", "is no plain function"),
        ("number", "is no plain function"),
        ("by_turns", "has no by_turns: did you mean by_turn"),
    ],
)
def test_functions_that_cannot_be_a_reward(code, name, message):
    with pytest.raises(ValueError, match=message):
        OwnReward.load(f"{code}:{name}")


# -- references --------------------------------------------------------------------------------------------------------


def test_a_file_runs_once_and_knows_its_neighbours(code):
    first, second = load_object(f"{code}:by_turn"), load_object(f"{code}:all_of_it")
    assert first.__globals__ is second.__globals__
    assert load_object("pact.rewards:answer_match") is answer_match


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nothing.py:A", "there is no file nothing.py in .*: write FILE.py:NAME"),
        ("mine.py:not a name", "names no object: write FILE.py:NAME or package.module:NAME"),
        ("mine.py:", "names no object"),
        ("no_such_package.module:A", "there is no module no_such_package.module: install it"),
        ("pact.rewards:answer_mach", "pact.rewards has no answer_mach: did you mean answer_match"),
        ("syntax.py:A", "syntax.py, line 2: SyntaxError"),
        ("fails.py:A", "fails.py, line 3: ZeroDivisionError: .*; mend it so that Python can import it"),
        ("imports.py:A", "imports.py, line 1: ModuleNotFoundError: No module named 'no_such_package'"),
        ("exits.py:A", "exits.py, line 1: SystemExit: 0; mend it"),
        ("some_module:A", "some_module, .*: ModuleNotFoundError: No module named 'some'"),
    ],
)
def test_references_that_lead_nowhere(tmp_path, monkeypatch, reference, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("syntax.py").write_text("A = 1\nB = = 2\n")
    Path("fails.py").write_text("A = 1\n\n1 / 0\n")
    Path("imports.py").write_text("import no_such_package\n")
    Path("exits.py").write_text("raise SystemExit(0)\n")
    Path("some_module.py").write_text("import some\n")
    sys.path.append(str(tmp_path))
    with pytest.raises(ValueError, match=message) as raised:
        load_object(reference)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("class E: pass", {}, "own.py:E is no environment: it has no tasks, start; see pact.envs.base.Environment"),
        ("E = 3", {}, "own.py:E is no environment but int: name a class with tasks and start"),
        ("class E:\n  def __init__(self, path): ...", {}, "missing a required argument: 'path'; its options are path"),
        ("class E:\n  def __init__(self, path): ...", {"path": "x", "colour": 1}, "'colour'; its options are path"),
    ],
)
def test_objects_that_are_no_environment(tmp_path, source, options, message):
    (tmp_path / "own.py").write_text(source)
    with pytest.raises(ValueError, match=message):
        make(f"{tmp_path / 'own.py'}:E", **options)


# -- the whole way -----------------------------------------------------------------------------------------------------


def test_the_example_is_an_environment_of_forty_lines():
    assert len((EXAMPLES / "own_environment.py").read_text(encoding="utf-8").splitlines()) < 40
    env = make(CALCULATOR, path=str(DATA))
    assert isinstance(env, Environment)
    tasks = env.tasks("train")
    assert all(env.start(task.without_expert()).score(task.expert).reward == 1.0 for task in tasks)
    assert not {task.messages[-1]["content"] for task in tasks} & {t.messages[-1]["content"] for t in env.tasks("test")}
    for task in tasks:  # the recorded results are what the functions return
        attempt = env.start(task)
        for message, result in zip(task.expert[:-1:2], task.expert[1::2], strict=True):
            call = message["tool_calls"][0]["function"]
            assert attempt.call(call["name"], call["arguments"]) == result["content"]


def test_the_example_trains_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("own_environment.py", "calculator_traces.jsonl"):
        shutil.copy(EXAMPLES / name, tmp_path)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    settings = {
        "env": "own_environment.py:Calculator",
        "data": "calculator_traces.jsonl",
        "reward": "own_environment.py:right_and_short",
        "model": "toybox",
        "model_config": json.dumps({**size, "num_key_value_heads": 1}),
        "warm_start_steps": 1,
        "warm_start_batch_size": 2,
        "max_steps": 2,
        "num_rollouts": 2,
        "gradient_accumulation_steps": 1,
        "max_turns": 2,
        "max_turn_tokens": 8,
        "eval_tasks": 2,
        "report_to": "none",
        "use_cpu": True,
    }
    assert main(["train", *(f"--{name}={value}" for name, value in settings.items())]) == 0, capsys.readouterr().err
    [run] = (tmp_path / "runs").glob("calculator-*")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward"] for line in lines if line["phase"] == "train" and "reward" in line]
    assert rewards
    assert all(-0.1 < reward < 0 for reward in rewards)  # 0.02 a message, and no answer is right
    assert (run / "model").is_dir()


def test_with_reward_hands_over_task_and_messages(code):
    env = make(CALCULATOR, path=str(DATA))
    task = env.tasks("train")[0]
    tokenizer = env.tokenizer()
    engine = ReplayEngine(tokenizer)
    engine.learn(task, task.expert)
    [[episode]] = run_rollouts(env, [task], engine, tokenizer, n=1)
    assert episode.score.reward == 1.0
    [scored] = with_reward(task, [episode], Reward(f"{code}:all_of_it"), tokenizer)
    assert scored.score.reward == len(task.expert) + 10 * 2 + 100 * 1 + 1000
    assert scored.score.metrics == {"calls": 1.0, "env_reward": 1.0}
