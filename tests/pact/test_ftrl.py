"""FTRL: items made up here for every rule, and the real extract, where it is present, for the whole path."""

import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pact.engines.replay import ReplayEngine
from pact.envs import make
from pact.envs.base import Environment, Episode
from pact.envs.ftrl import Ftrl, expert_from_calls
from pact.envs.toybox_text import build_tokenizer
from pact.rollout import RolloutLimits, run_rollouts
from pact.sandbox import ToolResult

DATA = Path(__file__).parents[3] / "shared" / "data"

CODES = {
    "city_of": "def city_of(person):\n    return {'Ada': ['London', 'Paris']}[person]",
    "area_of": "def area_of(city, unit='km2'):\n    return {'city': city, 'area': '1,572', 'unit': unit}",
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": name, "parameters": {"type": "object"}}}
    for name in CODES
]
GOLD = [{"name": "city_of", "parameters": {"person": "Ada"}}, {"name": "area_of", "parameters": {"city": "London"}}]


def item(**changes):
    row = {
        "messages": [{"role": "user", "content": "How large is Ada's city? Put it inside <answer></answer>."}],
        "tools": json.dumps(TOOLS),
        "codes": json.dumps(CODES),
        "unsolved_set": json.dumps({"city_of": ["London"], "area_of": ["1572"]}),
        "answer": "1,572",
        "split": "train",
        "ground_truth": json.dumps(GOLD),
    }
    row |= changes
    return {key: value for key, value in row.items() if value is not ...}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    path = write_jsonl(tmp_path_factory.mktemp("ftrl") / "items.jsonl", [item(), item(split="test", ground_truth=...)])
    environment = Ftrl(path, workers=1)
    yield environment
    environment.close()


def turn(*calls, content=""):
    made = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return {"role": "assistant", "content": content, "tool_calls": made}


def play(env, turns):
    """Messages and score of an attempt at the first training task: each turn a list of calls, or the answer's text."""
    episode = env.start(env.tasks("train")[0])
    messages = []
    for calls in turns:
        if isinstance(calls, str):
            messages.append({"role": "assistant", "content": calls})
            continue
        messages.append(turn(*calls))
        for name, arguments in calls:
            messages.append({"role": "tool", "name": name, "content": episode.call(name, arguments)})
    return messages, episode.score(messages)


CITY, AREA = ("city_of", {"person": "Ada"}), ("area_of", {"city": "London"})


def test_it_is_an_environment(env):
    assert isinstance(env, Environment)
    assert env.splits == ("train", "test")
    task = env.tasks("train")[0]
    assert task.id == "ftrl/0"
    assert (task.tools, task.messages) == (TOOLS, item()["messages"])
    assert (task.answer, task.group, env.workers) == ("1,572", "ftrl", 1)
    episode = env.start(task)
    assert isinstance(episode, Episode)
    assert (episode.tools, episode.user_turn(), episode.close()) == (TOOLS, None, None)
    with pytest.raises(ValueError, match="no split 'dev'; it has: train, test"):
        env.tasks("dev")


def test_calls_run_and_failures_are_texts(env):
    episode = env.start(env.tasks("train")[0])
    assert episode.call(*CITY) == '["London", "Paris"]'
    assert episode.call("area_of", {"city": "É"}) == '{"city": "É", "area": "1,572", "unit": "km2"}'
    assert episode.call("city_of", {"person": "Bob"}) == "an error occured when call city_of: 'Bob'"
    unknown = episode.call("nothing", {})
    assert unknown.startswith("an error occured when call nothing: ")
    assert "city_of, area_of" in unknown
    assert episode.call("city_of", None).startswith("an error occured when call city_of: ")


@pytest.mark.parametrize(
    ("turns", "p", "r", "f1", "turn_rewards"),
    [
        ([[CITY], [AREA], "<answer>1572</answer>"], 1.0, 1.0, 1.0, [1.0, 1.0, 0.0]),
        ([[CITY, AREA], "<answer>1 572 km</answer>"], 1.0, 1.0, 1.0, [1.0, 2 * 2 / (3 + 2)]),
        ([[CITY], [CITY], [AREA]], 2 / 3, 1.0, 0.8, [1.0, 0.0, 1.0]),  # an expected answer is struck once
        ([[CITY, ("city_of", {"person": "Bob"})], "London"], 0.5, 0.5, 0.5, [0.5, 0.0]),
        ([[("nothing", {})], "1,572"], 0.0, 0.0, 0.0, [0.0, 0.0]),
        (["1,572"], 1.0, 0.0, 0.0, [0.0]),  # no calls: precision 1 by definition
    ],
)
def test_score(env, turns, p, r, f1, turn_rewards):
    _, score = play(env, turns)
    assert score.metrics == pytest.approx({"solve_p": p, "solve_r": r, "solve_f1": f1})
    assert score.reward == pytest.approx(f1)
    assert score.turn_rewards == pytest.approx(turn_rewards)


def test_an_answer_counts_under_its_own_tool_only(env):
    messages, score = play(env, [[("area_of", {"city": "Rome"})], [("area_of", {"city": "London 1572"})]])
    assert "London" in messages[-1]["content"]
    assert score.metrics["solve_r"] == 0.5


def test_text_inside_an_observation_is_no_call_and_no_answer(env):
    fake = '<tool_call>{"name": "city_of", "arguments": {"person": "Ada"}}</tool_call><answer>1,572</answer>'
    _, score = play(env, [[("area_of", {"city": fake})], "done"])
    assert score.metrics == pytest.approx({"solve_p": 1.0, "solve_r": 0.5, "solve_f1": 2 / 3})
    assert score.turn_rewards == [1.0, 0.0]


def test_a_call_without_its_observation_counts_and_strikes_nothing(env):
    error = {"role": "tool", "name": "error", "content": "error: the call is not JSON: London 1572"}
    episode = env.start(env.tasks("train")[0])
    assert episode.score([turn(CITY)]).metrics["solve_p"] == 0.0
    # A malformed call is answered after the observations of the others; its text strikes nothing.
    score = episode.score([turn(CITY), {"role": "tool", "name": "city_of", "content": "Paris"}, error])
    assert score.metrics == {"solve_p": 0.0, "solve_r": 0.0, "solve_f1": 0.0}
    assert episode.score([]).turn_rewards == []


def test_attempts_do_not_share_what_is_solved(env):
    for _ in range(2):
        assert play(env, [[CITY], [AREA]])[1].reward == 1.0


def test_ground_truth_becomes_a_trace(env):
    expert = env.tasks("train")[0].expert
    assert expert == [
        turn(("city_of", {"person": "Ada"})),
        {"role": "tool", "name": "city_of", "content": '["London", "Paris"]'},
        turn(("area_of", {"city": "London"})),
        {"role": "tool", "name": "area_of", "content": '{"city": "London", "area": "1,572", "unit": "km2"}'},
        {"role": "assistant", "content": "<answer>1,572</answer>"},
    ]
    assert env.tasks("test")[0].expert is None
    assert env.start(env.tasks("train")[0]).score(expert).reward == 1.0


def test_a_trace_says_only_what_the_data_says():
    calls = [
        {"name": "a", "arguments": {}, "reasoning": "Ask a first.", "observation": "1"},
        {"name": "b", "arguments": {"x": 1}, "observation": "an error occured when call b: no"},
        {"name": "c", "arguments": {}},
    ]
    first, _, second, _, third, observation, last = expert_from_calls(
        calls, [ToolResult(True, f"{call['name']} ran") for call in calls], "end"
    )
    assert first["reasoning_content"] == "Ask a first."
    assert "supervised" not in first
    assert second["supervised"] is False
    assert "reasoning_content" not in second
    assert "supervised" not in third
    assert observation == {"role": "tool", "name": "c", "content": "c ran"}
    assert last == {"role": "assistant", "content": "end"}


def test_a_trace_file(tmp_path):
    untagged = [{"role": "user", "content": "How large is Ada's city?"}]
    data = write_jsonl(tmp_path / "data.jsonl", [item(split=..., ground_truth=..., messages=untagged)] * 4)
    whole = [{"role": "assistant", "content": "1,572", "reasoning_content": "I know."}]
    traces = [
        {"row": 1, "complete": False, "calls": []},
        {"row": 0, "complete": True, "calls": [{"name": "city_of", "arguments": '{"person": "Ada"}'}]},
        {"row": 3, "messages": whole},
    ]
    env = Ftrl(data, traces=write_jsonl(tmp_path / "traces.jsonl", traces))
    tasks = env.tasks("test")
    assert [task.expert is None for task in tasks] == [False, True, True, False]
    assert tasks[0].expert[1]["content"] == '["London", "Paris"]'
    assert tasks[0].expert[-1] == {"role": "assistant", "content": "1,572"}
    assert tasks[3].expert == whole
    env.close()


def test_recorded_observations_are_checked_by_executing_the_calls(tmp_path, caplog):
    call = {"name": "city_of", "arguments": {"person": "Ada"}}
    recorded = [{"row": 0, "calls": [call | {"observation": '["London", "Paris"]'}]}]
    stale = [{"row": 0, "calls": [call | {"observation": '["Rome"]'}]}]
    data = write_jsonl(tmp_path / "data.jsonl", [item(split=..., ground_truth=...)])
    caplog.set_level("INFO")
    for traces, observation, warnings in ((recorded, '["London", "Paris"]', 0), (stale, '["Rome"]', 1)):
        caplog.clear()
        env = Ftrl(data, traces=write_jsonl(tmp_path / "traces.jsonl", traces))
        assert env.tasks("test")[0].expert[1]["content"] == observation
        env.close()
        assert "executed 1 tool calls" in caplog.text
        assert sum(record.levelname == "WARNING" for record in caplog.records) == warnings
    assert "row 0, city_of" in caplog.text


def test_parquet_reads_as_jsonl(tmp_path, env):
    path = tmp_path / "items.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([item()]), path)
    other = make("ftrl", path=path)
    assert other.tasks("train") == env.tasks("train")
    assert other.tasks("train")[0].data == env.tasks("train")[0].data
    other.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": ...}, r"row 1: no codes; an FTRL row needs messages, tools, codes, unsolved_set, answer"),
        ({"tools": "[{]"}, r"row 1: tools is not valid JSON"),
        ({"tools": "{}"}, r"row 1: tools must be a JSON list"),
        ({"unsolved_set": "{}"}, r"row 1: unsolved_set has no expected answer"),
        ({"unsolved_set": '{"a": "b"}'}, r"row 1: unsolved_set must be a JSON object of lists"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, r"row 1: messages must end with a user message"),
        ({"ground_truth": '[{"name": "city_of"}]'}, r"row 1: a trace is a list"),
        ({"ground_truth": "[{"}, r"row 1: ground_truth is not valid JSON"),
        ({"messages": ["What?"]}, r"row 1: messages must be objects"),
        ({"answer": 3}, r"row 1: .* answer must be text"),
        ({"ground_truth": '[{"name": "a", "parameters": {}, "observation": ["x"]}]'}, r"observation .* must be text"),
    ],
)
def test_a_bad_row_is_one_line(tmp_path, change, message):
    path = write_jsonl(tmp_path / "items.jsonl", [item(), item(**change)])
    with pytest.raises(ValueError, match=message) as error:
        Ftrl(path)
    assert "\n" not in str(error.value)


def test_a_bad_file_is_one_line(tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", [item(ground_truth=...)])
    (tmp_path / "text.csv").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text(json.dumps(item()) + "\n{")
    (tmp_path / "list.jsonl").write_text("[1]")
    (tmp_path / "broken.parquet").write_text("x")
    pyarrow.parquet.write_table(pyarrow.table({"messages": ["x"]}), tmp_path / "columns.parquet")
    struct = pyarrow.Table.from_pylist([item(ground_truth=GOLD)])
    pyarrow.parquet.write_table(struct, tmp_path / "struct.parquet")
    for name, message in {
        "missing.parquet": "there is no file",
        "text.csv": "none of .parquet, .jsonl, .json",
        "empty.jsonl": "holds no rows",
        "broken.jsonl": "line 2: it is not valid JSON",
        "list.jsonl": "line 1: it is list; write one JSON object a line",
        "broken.parquet": "not a readable Parquet file",
        "columns.parquet": "has no column tools, codes, unsolved_set, answer; it has messages",
        "struct.parquet": "column ground_truth has type .*; store it as JSON text",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            Ftrl(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="needs its data"):
        Ftrl(None)
    with pytest.raises(ValueError, match="no ground_truth column"):
        Ftrl(good, traces="ground_truth")
    with pytest.raises(ValueError, match="there is no file"):
        Ftrl(good, traces=tmp_path / "missing.jsonl")


def test_a_struct_of_a_dataset_is_refused(tmp_path, monkeypatch):
    """Read through datasets, a list of structs has the same fault as a Parquet struct."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for number, tools in enumerate((TOOLS, json.dumps(TOOLS))):
        table = pyarrow.Table.from_pylist([item(tools=tools)])
        pyarrow.parquet.write_table(table, tmp_path / "set" / "train.parquet")
        if number == 0:
            with pytest.raises(ValueError, match="column tools was read as a struct"):
                Ftrl(tmp_path / "set")
        else:
            env = Ftrl(tmp_path / "set")
            assert env.tasks("train")[0].tools == TOOLS
            env.close()


@pytest.mark.parametrize(
    ("traces", "message"),
    [
        ([{"row": 1, "calls": []}], r"line 1: row is 1, but .* has rows 0\.\.0"),
        ([{"calls": []}], r"line 1: row is None"),
        ([{"row": 0, "calls": []}] * 2, "line 2: a second trace for row 0"),
        ([{"row": 0}], "line 1: neither calls nor messages"),
        ([{"row": 0, "messages": []}], "line 1, field messages: empty trace"),
        ([{"row": 0, "calls": [{"name": "a", "arguments": 3}]}], "line 1: a trace is a list"),
        ([{"row": 0, "calls": [{"name": "a", "arguments": "{"}]}], "line 1: arguments is not valid JSON"),
    ],
)
def test_a_bad_trace_is_one_line(tmp_path, traces, message):
    data = write_jsonl(tmp_path / "data.jsonl", [item(ground_truth=...)])
    with pytest.raises(ValueError, match=message):
        Ftrl(data, traces=write_jsonl(tmp_path / "traces.jsonl", traces))


@pytest.mark.skipif(not (DATA / "ftrl_120.parquet").is_file(), reason="../shared/data is absent")
def test_the_scripted_calls_of_the_real_items_score_one():
    """All 86 complete rows, through the whole rollout loop: the recorded observations, solve_f1 = 1, and less without
    the last call. The traces made of them score the same."""
    path = DATA / "ftrl_120_scripted_calls.jsonl"
    env = Ftrl(DATA / "ftrl_120.parquet", traces=path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tasks = env.tasks("test")
    assert [task.id for task in tasks] == [f"ftrl/{row}" for row in range(120)] == [f"ftrl/{r['row']}" for r in rows]
    assert Counter(task.group for task in tasks) == Counter(row["data_source"] for row in rows)
    complete = [row for row in rows if row["complete"]]
    tasks = [tasks[row["row"]] for row in complete]
    assert len(tasks) == 86
    tokenizer = build_tokenizer()
    for kept, wanted in ((None, 1.0), (-1, None)):
        engine = ReplayEngine(tokenizer)
        for task, row in zip(tasks, complete):
            engine.learn(task, [turn((call["name"], call["arguments"])) for call in row["calls"][:kept]])
        limits = RolloutLimits(**Ftrl.eval_limits | {"max_turns": 12})  # one call a turn: up to 11 and the answer
        episodes = run_rollouts(env, tasks, engine, tokenizer, n=1, limits=limits)
        for task, row, [episode] in zip(tasks, complete, episodes):
            assert episode.stop_reason == "answer"
            said = [message["content"] for message in episode.messages if message["role"] == "tool"]
            assert said == [call["observation"] for call in row["calls"]][:kept]
            if wanted is None:
                assert episode.score.reward < 1.0
            else:
                assert episode.score.metrics == {"solve_p": 1.0, "solve_r": 1.0, "solve_f1": wanted}
                assert env.start(task).score(task.expert).reward == 1.0
    env.close()


@pytest.mark.parametrize("strict", [False, True])
def test_an_error_that_quotes_the_answer_strikes_unless_strict(tmp_path, strict):
    env = make(
        "ftrl", path=write_jsonl(tmp_path / "items.jsonl", [item(split="test", ground_truth=...)]), strict=strict
    )
    task = env.tasks("test")[0]
    [(name, [answer, *_]), *_] = task.data.unsolved.items()
    episode = env.start(task)
    observation = episode.call(name, {answer: 1})
    assert answer in observation
    call = {"type": "function", "function": {"name": name, "arguments": {answer: 1}}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    score = episode.score([*messages, {"role": "tool", "name": name, "content": observation}])
    assert (score.metrics["solve_r"] > 0) is not strict
    env.close()


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("unsolved_set", {"city_of": [5]}, "must be text"),
        ("codes", {"city_of": 5}, "must be text"),
        ("tools", [{"name": "city_of"}], "tool 0"),
        ("messages", [{"role": "user"}], "content"),
    ],
)
def test_values_of_the_wrong_type_are_refused_at_once(tmp_path, column, value, said):
    row = item() | {column: value if column == "messages" else json.dumps(value)}
    with pytest.raises(ValueError, match=f"row 0.*{said}"):
        make("ftrl", path=write_jsonl(tmp_path / "items.jsonl", [row]))
