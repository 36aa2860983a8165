"""ToolHop: items made up here for every rule, and the real extract, where it is present, for the gold calls."""

import ast
import json
from pathlib import Path

import pytest

from pact.envs import make
from pact.envs.base import Environment, Episode, Task
from pact.envs.toolhop import ToolHop, ToolHopEpisode, ToolHopItem, prompt, strictly_correct

DATA = Path(__file__).parents[3] / "shared" / "data" / "toolhop_70.jsonl"

FOUNDER = {
    "name": "founder",
    "description": "Founder of a company.",
    "parameters": {"type": "object", "properties": {}},
}
LENGTH = {"name": "length", "description": "Letters of a name.", "parameters": {"type": "object", "properties": {}}}
SOURCES = [
    "def founder(company):\n    return {'founder': {'Acme': 'Ada Byron'}[company]}\n\nprint(founder('Acme'))",
    "def length(name):\n    return 0",
    "import math\n\ndef length(name):\n    return math.floor(len(name))",
]
ROW = {
    "id": "x-1",
    "question": "How many letters has the founder of {Acme}?",
    "answer": "9",
    "tools": {"Who founded it?": FOUNDER, "How long is it?": LENGTH, "How long, again?": LENGTH},
    "functions": SOURCES,
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    environment = ToolHop(write(tmp_path_factory.mktemp("toolhop") / "items.jsonl", ROW, ROW), workers=1)
    yield environment
    environment.close()


def says(content, *calls, **more):
    made = [{"type": "function", "function": {"name": name, "arguments": {}}} for name in calls]
    return {"role": "assistant", "content": content, "tool_calls": made} | more


def tool(content, name="length"):
    return {"role": "tool", "name": name, "content": content}


def test_it_is_an_environment(env):
    assert isinstance(env, Environment)
    assert env.workers == 1
    assert [task.id for task in env.tasks("test")] == ["toolhop/0", "toolhop/1"]
    task = env.tasks("test")[0]
    assert (task.group, task.answer, task.expert) == ("free", "9", None)
    assert task.tools == [{"type": "function", "function": schema} for schema in (FOUNDER, LENGTH, LENGTH)]
    episode = env.start(task)
    assert isinstance(episode, Episode)
    assert (episode.tools, episode.user_turn(), episode.close()) == (task.tools, None, None)
    with pytest.raises(ValueError, match="no split 'train'; the data has: test"):
        env.tasks("train")


def test_calls_run_the_last_source_of_a_name(env):
    episode = env.start(env.tasks("test")[0])
    assert episode.call("founder", {"company": "Acme"}) == '{"founder": "Ada Byron"}'
    assert episode.call("length", {"name": "Ada Byron"}) == "9"
    assert episode.call("founder", {"company": "B"}) == "an error occured when call founder: 'B'"
    assert episode.call("weight", {}).startswith("an error occured when call weight: there is no tool of this name")


def test_the_prompts_of_the_scenarios(tmp_path):
    path = write(tmp_path / "items.jsonl", ROW)
    for scenario, begins, tools in (
        ("free", "You will be asked a question with some tools, and should provide a short final answer.\nIf the", 3),
        (
            "mandatory",
            "You will be asked a question with some tools, and should provide a short final answer.\nPlease",
            3,
        ),
        ("direct", "You will be asked a question, and should provide a short answer.\nIf the answer is a date", 0),
    ):
        other = make("toolhop", path=path, scenario=scenario)
        [task] = other.tasks("test")
        other.close()
        [message] = task.messages
        assert message["content"].startswith(begins)
        assert message["content"].endswith("Answer as short as possible.\nQuestion: " + ROW["question"])
        assert (len(task.tools), task.group) == (tools, scenario)
    assert "you must call the tool at every step" in prompt("?", "mandatory")
    assert "<answer>your answer here</answer>" in prompt("?", "direct")


@pytest.mark.parametrize(
    ("messages", "released", "strict"),
    [
        ([says("", "length"), tool("9"), says("<answer>9</answer>")], 1, 1),
        ([says("<answer>9</answer>")], 1, 1),  # without calls too
        ([says("", "length"), tool("9"), says("It is nine.")], 1, 0),  # the tool said it right before
        ([says("", "length"), tool("9"), says("", "length"), tool("no"), says("nine")], 0, 0),
        ([says("", "length"), tool("9")], 0, 0),  # the turns ran out
        ([says("", "length"), tool("9"), says("")], 0, 0),  # no text at all
        ([says("", reasoning_content="Ada Byron has 9.")], 1, 0),  # reasoning counts in the release
        ([says("<answer>19</answer>")], 1, 0),
        ([says("Not 9 but <answer>8</answer>")], 1, 0),
        ([says("", "length"), tool("line 1 column 9", "error"), says("Hm.")], 0, 0),  # no tool said that
        ([], 0, 0),
    ],
)
def test_score(env, messages, released, strict):
    score = env.start(env.tasks("test")[0]).score(messages)
    assert score.metrics == {"answer_correctness": released, "answer_correctness_strict": strict}
    assert score.reward == released
    turns = sum(message["role"] == "assistant" for message in messages)
    assert score.turn_rewards == ([0.0] * (turns - 1) + [released] if turns else [])


def test_the_direct_answer_is_the_first_turn(tmp_path):
    env = ToolHop(write(tmp_path / "items.jsonl", ROW), scenario="direct")
    score = env.start(env.tasks("test")[0]).score([says("9", "length"), tool("an error occured when call length")])
    env.close()
    assert (score.reward, score.turn_rewards) == (1.0, [1.0])


@pytest.mark.parametrize(
    ("content", "gold", "found"),
    [
        ("<answer>1,927.</answer>", "1927", True),
        ("The answer is 1.", "1", True),
        ("1.5", "1", False),
        ("0.1", "1", False),
        ("-1", "1", False),
        ("-1", "-1", True),
        ("b1", "1", False),
        ("Russell's", "russell", True),
        ("Jean-Paul", "Jean", False),
        ("<answer>Ada, Byron</answer>", "Byron, Ada", True),
        ("<answer>1</answer> no, <answer>2</answer>", "1", False),
        ("2 (C++)", "c++", True),
    ],
)
def test_strict(content, gold, found):
    assert strictly_correct(content, gold) is found


def test_published_and_text_forms_read_alike(tmp_path, env):
    (tmp_path / "ToolHop.json").write_text(json.dumps([ROW]))
    text = ROW | {"tools": json.dumps(ROW["tools"]), "functions": json.dumps(SOURCES)}
    by_name = ROW | {"functions": {"founder": SOURCES[0], "length": SOURCES[2]}}
    for path in (
        tmp_path / "ToolHop.json",
        write(tmp_path / "text.jsonl", text),
        write(tmp_path / "named.jsonl", by_name),
    ):
        other = ToolHop(path)
        [task] = other.tasks("test")
        assert (task, task.data) == (env.tasks("test")[0], env.tasks("test")[0].data)
        other.close()


def test_a_tool_without_source_is_told(tmp_path, caplog):
    env = ToolHop(write(tmp_path / "items.jsonl", ROW | {"functions": SOURCES[:1]}))
    env.close()
    assert "1 items show a tool that has no source" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "row 1: no answer; a ToolHop row needs question, answer, tools, functions"),
        ({"answer": " "}, "row 1: question and answer must be text"),
        ({"answer": 9}, "row 1: question and answer must be text"),
        ({"tools": "{"}, "row 1: tools is not valid JSON"),
        ({"tools": [FOUNDER]}, "row 1: tools must be an object of function schemas"),
        ({"tools": {"a": {"description": "no name"}}}, "row 1: tools must be an object of function schemas"),
        ({"functions": 3}, "row 1: functions must be a list of Python sources"),
    ],
)
def test_a_bad_row_is_one_line(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
        ToolHop(write(tmp_path / "items.jsonl", ROW, ROW | change))
    assert "\n" not in str(error.value)


def test_bad_files_and_options(tmp_path):
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "broken.json").write_text("[")
    for name, message in {"object.json": "not one list of JSON objects", "broken.json": "not valid JSON"}.items():
        with pytest.raises(ValueError, match=message):
            ToolHop(tmp_path / name)
    with pytest.raises(ValueError, match="choose one of free, mandatory, direct"):
        ToolHop(tmp_path / "object.json", scenario="Free")
    with pytest.raises(ValueError, match="needs its data"):
        ToolHop("")


@pytest.mark.skipif(not DATA.is_file(), reason="../shared/data is absent")
def test_gold_calls_of_the_real_items_give_the_answers():
    """The 14 rows with gold calls: executed here, the last observation holds the answer, in all but one (its answer is
    324.0 and the tool says 324), and without any call none does."""
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    env = ToolHop(DATA)
    reproduced = []
    for row, task in zip(rows, env.tasks("test"), strict=True):
        if not row["gold_calls"]:
            continue
        episode, messages = env.start(task), []
        for call in row["gold_calls"]:
            name, arguments = parse_call(call, task.data.codes)
            messages += [says("", name), tool(episode.call(name, arguments), name)]
        reproduced.append(episode.score([*messages, says("done")]).reward)
        assert episode.score([says("done")]).reward == 0.0
    env.close()
    assert (len(reproduced), sum(reproduced)) == (14, 13)


def parse_call(text, codes):
    """Name and arguments of a call string; positional ones get the names of the function's parameters."""
    call = ast.parse(text, mode="eval").body
    name = call.func.id
    function = next(node for node in ast.parse(codes[name]).body if isinstance(node, ast.FunctionDef))
    given = dict(zip([argument.arg for argument in function.args.args], call.args))
    given |= {keyword.arg: keyword.value for keyword in call.keywords}
    return name, {key: ast.literal_eval(value) for key, value in given.items()}


def test_a_call_of_no_tool_earns_nothing_by_its_error():
    """Its error quotes the call's name and the names of the tools: numbers may stand in it by chance."""
    codes = {"size_10": "def size_10():\n    return 7\n"}
    task = Task("toolhop/0", [], [], data=ToolHopItem(codes, "10"), answer="10", group="free")
    episode = ToolHopEpisode(task, lambda name, arguments: "", "free")
    error = "an error occured when call 1 2 10: there is no tool of this name; the tools are size_10"
    messages = [says("", "1 2 10"), {"role": "tool", "name": "1 2 10", "content": error}, says("no idea")]
    assert episode.score(messages).reward == 0.0
    messages[1] = {"role": "tool", "name": "size_10", "content": "10"}
    assert episode.score(messages).reward == 1.0
