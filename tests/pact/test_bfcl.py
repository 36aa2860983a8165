"""BFCL through the environment: gold and broken attempts, tools that appear, memory chains, hostile calls, exports."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from pact.engines.replay import ReplayEngine
from pact.envs import bfcl, make
from pact.envs.bfcl import MULTI_TURN, NEW_TOOLS, STEP_LIMIT, Bfcl
from pact.envs.bfcl_export import export_results
from pact.envs.toybox_text import build_tokenizer
from pact.evaluate import Play, evaluate_in_batches
from pact.rollout import RolloutLimits
from pact.sandbox import Sandbox, ToolResult

SAMPLE = 5  # items of each category; all 800: make bfcl-gold


@pytest.fixture(scope="module")
def env():
    env = Bfcl("all", workers=2)
    yield env
    env.close()


@pytest.fixture(scope="module")
def tasks(env):
    return {task.id: task for task in env.tasks("test")}


def script(turns):
    """Assistant messages that make the calls of each user turn in one step, then close the turn."""
    messages = []
    for calls in turns:
        if calls:
            messages.append({"role": "assistant", "content": "", "tool_calls": list(calls)})
        messages.append({"role": "assistant", "content": "Done."})
    return messages


def play(env, tasks, script_of):
    """Scripted episodes through the rollout loop: {id: record}. ``script_of``: the messages for a task as it stands."""
    tokenizer = build_tokenizer()
    engine = ReplayEngine(tokenizer)

    def teach(batch):
        for task in batch:
            engine.learn(task, script_of(task))

    options = Play(limits=RolloutLimits(**env.eval_limits))
    batches = evaluate_in_batches(engine, env, tokenizer, tasks, options, prepare=teach)
    return {record.id: record for batch in batches for record in batch}


def gold_script(env, drop_last=False):
    def of(task):
        turns = env.gold(task)
        if drop_last:
            [*_, last] = (turn for turn in turns if turn)
            last.pop()
        return script(turns)

    return of


@pytest.mark.parametrize("category", MULTI_TURN)
def test_gold_is_valid_and_nothing_without_its_last_call(env, tasks, category):
    sample = [tasks[f"{category}_{n}"] for n in range(SAMPLE)]
    whole, dropped = (play(env, sample, gold_script(env, drop)) for drop in (False, True))
    assert [record.metrics["valid"] for record in whole.values()] == [1.0] * SAMPLE
    assert [record.metrics["valid"] for record in dropped.values()] == [0.0] * SAMPLE
    assert all(record.artifact["error_type"].startswith("multi_turn:") for record in dropped.values())


def test_all_items_are_there_in_released_order(env):
    ids = [task.id for task in env.tasks("test")]
    assert ids[:2] == ["multi_turn_base_0", "multi_turn_base_1"]
    groups = [task.group for task in env.tasks("test")]
    assert [groups.count(name) for name in (*MULTI_TURN, "memory_kv", "memory_rec_sum", None)] == [200] * 4 + [
        155,
        155,
        74,
    ]
    assert env.averages == {"multi_turn": MULTI_TURN, "memory": ("memory_kv", "memory_rec_sum")}


def test_a_part_of_the_categories_has_no_average():
    env = Bfcl([*MULTI_TURN[:2], "memory_kv"], workers=1)
    assert env.averages == {}
    env.close()


def test_tools_appear_with_their_turn(env, tasks):
    task = next(task for task in tasks.values() if task.group == "multi_turn_miss_func")
    [(turn, [tool, *_])] = list(task.data.held_out.items())[:1]
    name = tool["function"]["name"]
    episode = env.start(task)
    assert name not in [tool["function"]["name"] for tool in episode.tools]
    for _ in range(turn):
        shown = episode.user_turn()
    assert name in [tool["function"]["name"] for tool in episode.tools]
    assert shown[-1]["content"].endswith(NEW_TOOLS)
    assert json.loads(shown[-1]["content"].removesuffix(NEW_TOOLS))[0]["name"] == name
    assert len(task.tools) + len(task.data.held_out[turn]) == len(episode.tools)


def test_state_lasts_through_an_episode_and_no_longer(env, tasks):
    task = tasks["multi_turn_base_0"]
    first, second = env.start(task), env.start(task)
    assert "None" in first.call("mkdir", {"dir_name": "new_folder"}) or first.call("ls", {})
    assert "new_folder" in first.call("ls", {})
    assert "new_folder" not in second.call("ls", {})
    assert "exists" in first.call("mkdir", {"dir_name": "new_folder"})


def test_too_many_steps_end_the_attempt(env, tasks):
    task = tasks["multi_turn_base_0"]
    look = {"role": "assistant", "content": "", "tool_calls": [{"name": "ls", "arguments": {}}]}
    [stuck] = play(env, [task], lambda task: [look] * (STEP_LIMIT - 1) + script(env.gold(task))).values()
    assert (stuck.stop_reason, stuck.turns) == ("turn_limit", STEP_LIMIT)
    assert (stuck.metrics["valid"], stuck.artifact["error_type"]) == (0.0, "multi_turn:force_terminated")
    assert len(stuck.artifact["result"]) == 1


def test_steps_are_counted_anew_with_each_user_message(env, tasks):
    task = tasks["multi_turn_base_0"]
    look = {"role": "assistant", "content": "", "tool_calls": [{"name": "pwd", "arguments": {}}]}
    turns = [[look] * (STEP_LIMIT - 2) + script([calls]) for calls in env.gold(task)]
    [record] = play(env, [task], lambda task: [message for turn in turns for message in turn]).values()
    assert (record.stop_reason, record.metrics["valid"]) == ("answer", 1.0)
    assert record.turns == len(turns) * STEP_LIMIT


def test_turn_rewards_stop_where_the_checks_fail(env, tasks):
    task = tasks["multi_turn_base_0"]
    gold = env.gold(task)
    messages = []
    for number, calls in enumerate(gold):
        if number != 2:
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        messages += [{"role": "assistant", "content": "Done."}, {"role": "user", "content": "next"}]
    score = env.start(task).score(messages[:-1])
    share = 1 / len(gold)
    assert score.turn_rewards == [0.0, share, 0.0, share, 0.0] + [0.0, 0.0] * (len(gold) - 3)
    assert (score.reward, score.metrics["valid"]) == (0.0, 0.0)
    nothing = env.start(task).score([])  # a prompt that does not fit
    assert (nothing.reward, nothing.turn_rewards, nothing.artifact["result"]) == (0.0, [], [])


def test_a_turn_that_a_limit_ended_before_its_answer_was_not_played(env, tasks):
    """Its state may be right, or nothing may have been asked of it: the release fails such an entry all the same."""
    task = tasks["multi_turn_base_0"]
    *turns, last = env.gold(task)
    messages = []
    for calls in turns:
        messages += [
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "assistant", "content": "Done."},
        ]
        messages.append({"role": "user", "content": "next"})
    messages += [{"role": "assistant", "content": "", "tool_calls": last}, {"role": "tool", "content": "None"}]
    cut = env.start(task).score(messages)
    assert (cut.reward, cut.turn_rewards[-1], cut.turn_rewards[1]) == (0.0, 0.0, 1 / (len(turns) + 1))
    assert (len(cut.artifact["result"]), cut.artifact["error_type"]) == (len(turns), "multi_turn:force_terminated")
    whole = env.start(task).score([*messages, {"role": "assistant", "content": "Done."}])
    assert (whole.reward, whole.turn_rewards[-1]) == (1.0, 1 / (len(turns) + 1))


def test_unknown_functions_and_argument_names_are_named(env, tasks):
    episode = env.start(tasks["multi_turn_base_0"])
    assert episode.call("frobnicate", {"x": 1}) == "Error during execution: name 'frobnicate' is not defined"
    assert "'a=1' cannot be the name of an argument" in episode.call("ls", {"a=1": 1})
    assert len(episode.call("x" * 10_000, {})) < 200


HOSTILE = [
    ("__import__('os').system", {}),
    ("execute_multi_turn_func_call", {"func_call_list": ["open('/tmp/x', 'w')"], "initial_config": {}}),
    ("eval", {}),
    ("exit", {}),
    ("_load_scenario", {}),
    ("ls", {"a=1) or __import__('os')._exit(1) or (b": 1}),
    ("cd", {"folder": "'); __import__('os')._exit(1) #"}),
    ("cd", {"folder": "__import__('os')._exit(1)"}),
    ("echo", {"content": "{}" * 1000, "file_name": {"a": [None]}}),
    ("cd", {"folder": {"nested": [1, {"deep": None}]}}),
    ("no_such_tool", {"x": float("nan")}),
]


@pytest.mark.parametrize(("name", "arguments"), HOSTILE)
def test_hostile_calls_are_errors_and_change_nothing(env, tasks, name, arguments):
    task = tasks["multi_turn_base_0"]
    gold = env.gold(task)
    episode = env.start(task)
    observation = episode.call(name, arguments)
    assert isinstance(observation, str)
    assert "document" in episode.call("ls", {})
    attempt = script(gold)
    attempt.insert(0, {"role": "assistant", "content": "", "tool_calls": [{"name": name, "arguments": arguments}]})
    messages = []
    for message in attempt:
        messages.append(message)
        if message["content"] == "Done." and message is not attempt[-1]:
            messages.append({"role": "user", "content": "next"})
    assert env.start(task).score(messages).metrics["valid"] == 1.0


def test_a_policy_cannot_write_its_own_verdict(env, tasks):
    """What it says reaches the checker's process: none of it may run there."""
    task = tasks["multi_turn_base_0"]
    patch = "__import__('sys').modules['bfcl_worker'].multi_turn_checker"
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [{"name": f"setattr({patch})", "arguments": {}}]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "ls", "arguments": {f"a={patch}": 1}}]},
        {"role": "assistant", "content": '{"valid": true}'},
    ]
    assert env.start(task).score(messages).metrics["valid"] == 0.0


@pytest.mark.parametrize("category", ["memory_kv", "memory_rec_sum"])
def test_what_a_conversation_stores_a_question_finds(tasks, category):
    env = make("bfcl", categories=[category], workers=1)
    mine = {task.id: task for task in env.tasks("test")}
    chain = sorted((t for t in mine.values() if t.group is None and "customer" in t.id), key=env.stage)
    question = mine[f"{category}_0-customer-0"]
    assert [env.stage(task) for task in chain] == list(range(len(chain)))
    assert env.stage(question) > len(chain)
    store = (
        {"name": "core_memory_add", "arguments": {"key": "first_name", "value": "Michael"}}
        if category == "memory_kv"
        else {"name": "memory_append", "arguments": {"text": "The user is called Michael."}}
    )
    try:
        empty = env.ready(question)
        assert "Michael" not in empty.messages[0]["content"]
        answer = {"role": "assistant", "content": "{'answer': 'Michael', 'context': 'you said so'}"}
        says = [{"role": "assistant", "content": "", "tool_calls": [store]}]
        says += [{"role": "assistant", "content": "Noted."}] * 50

        def script_of(task):
            return [answer] if task.id == question.id else says[env.stage(task) > 0 :]

        by_id = play(env, [question, *chain], script_of)
        assert by_id[question.id].metrics["valid"] == 1.0
        assert "Michael" in json.dumps(by_id[chain[-1].id].artifact["memory"])
        assert "valid" not in by_id[chain[0].id].metrics
        shown = env.ready(question).messages
        assert [message["role"] for message in shown] == ["system", "user"]
        assert "Michael" in shown[0]["content"]
        # A resumed evaluation hands the artifacts back to a new environment.
        again = make("bfcl", categories=[category], workers=1)
        again.keep(chain[-1], json.loads(json.dumps(by_id[chain[-1].id].artifact)))
        assert again.ready(question).messages == shown
        wrong = again.start(again.ready(question)).score([{"role": "assistant", "content": "I do not know"}])
        assert (wrong.reward, wrong.artifact["error_type"]) == (0.0, "agentic:answer_not_found")
        calling = [{"role": "assistant", "content": "Michael", "tool_calls": [store]}]
        assert again.start(again.ready(question)).score(calling).reward == 0.0
        again.close()
    finally:
        env.close()


RELEASED_RUNNER = """
import json, sys, types
from pathlib import Path

def verdicts(files):
    import bfcl_worker, overrides
    for name in ("dotenv", "pandas", "tqdm"):  # not installed, and not used on this way
        sys.modules[name] = bfcl_worker._Absent(name)
    sys.modules["tqdm"].tqdm = lambda items, **_: items
    overrides.override = lambda method: method  # it would look for the methods of the base, which needs vendor SDKs
    base = types.ModuleType("bfcl_eval.model_handler.local_inference.base_oss_handler")
    base.OSSHandler = object
    sys.modules[base.__name__] = base
    from bfcl_eval.eval_checker import eval_runner
    from bfcl_eval.model_handler.local_inference.qwen_fc import QwenFCHandler
    eval_runner.get_handler = lambda name: QwenFCHandler.__new__(QwenFCHandler)
    for leaderboard in ("update_leaderboard_table_with_local_score_file", "generate_leaderboard_csv"):
        setattr(eval_runner, leaderboard, lambda *_: None)
    root = Path("/tmp/official")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    categories = [Path(name).name.removeprefix("BFCL_v4_").removesuffix("_result.json") for name in files]
    eval_runner.runner(None, categories, root / "result", root / "score", allow_missing=True)
    failed, valid = {}, 0
    for path in (root / "score").rglob("*_score.json"):
        header, *rows = map(json.loads, path.read_text().splitlines())
        valid += header["correct_count"]
        failed |= {row["id"]: row["error"]["error_type"] for row in rows}
    return {"failed": failed, "valid": valid}
"""


def test_the_released_runner_gives_exports_the_same_verdicts(env, tasks, tmp_path):
    look = {"role": "assistant", "content": "", "tool_calls": [{"name": "pwd", "arguments": {}}]}
    records = play(env, [tasks[f"{category}_{n}"] for category in MULTI_TURN for n in (11, 2)], gold_script(env))
    records |= play(env, [tasks["multi_turn_base_7"]], gold_script(env, drop_last=True))
    records |= play(env, [tasks["multi_turn_base_0"]], lambda task: [look] * STEP_LIMIT)
    records |= play(env, [tasks["multi_turn_base_3"]], lambda task: script([[], [], [], []])[: len(task.data.gold)])
    questions = [tasks[f"memory_kv_{n}-customer-{n}"] for n in (0, 1)]
    texts = {questions[0].id: "Michael", questions[1].id: "I do not know"}
    records |= play(env, questions, lambda task: [{"role": "assistant", "content": texts[task.id]}])
    pairs = [(name, record.artifact) for name, record in records.items()]
    files = export_results(pairs, tmp_path, "Qwen/Qwen3-1.7B-FC")
    base = tmp_path / "result" / "Qwen_Qwen3-1.7B-FC" / "multi_turn" / "BFCL_v4_multi_turn_base_result.json"
    ids = [json.loads(line)["id"] for line in base.read_text().splitlines()]
    assert ids == [f"multi_turn_base_{n}" for n in (0, 2, 3, 7, 11)]
    with Sandbox(packages=bfcl._packages(), preload=["bfcl_worker"], memory_bytes=2 << 30) as sandbox:
        texts_of_files = {str(path.relative_to(tmp_path)): path.read_text() for path in files}
        result = sandbox.call(RELEASED_RUNNER, "verdicts", {"files": texts_of_files}, 60.0)
    assert result.ok, result.error
    failed = {name: record.artifact["error_type"] for name, record in records.items() if not record.reward}
    assert len(failed) == 4
    assert json.loads(result.output) == {"failed": failed, "valid": len(records) - len(failed)}


def test_exports_of_conversations_have_their_own_file(tmp_path):
    memory = export_results([("memory_kv_prereq_3-customer-3", {"result": []})], tmp_path, "m")
    assert memory == [tmp_path / "result/m/agentic/memory/kv/BFCL_v4_memory_kv_prereq_result.json"]
    with pytest.raises(ValueError, match="holds no BFCL result"):
        export_results([("ftrl/0", None)], tmp_path, "m")


@pytest.mark.parametrize(
    ("categories", "said"),
    [
        ("memory_vector", "embedding model"),
        (["multi_turn_base", "web_search_base"], "live web"),
        ("format_sensitivity", "single-turn"),
        ("simple_python", "there is no category 'simple_python' here"),
        ([], "no category is chosen"),
    ],
)
def test_what_does_not_run_here_is_named(categories, said):
    with pytest.raises(ValueError, match=said):
        Bfcl(categories)


def test_a_missing_or_other_package_is_one_error(monkeypatch):
    monkeypatch.setattr(bfcl, "find_spec", lambda name: None if name == "rank_bm25" else find_spec(name))
    with pytest.raises(RuntimeError, match=r"rank_bm25.*pip install --no-deps bfcl-eval==2026\.3\.23"):
        Bfcl()
    monkeypatch.undo()
    monkeypatch.setattr(bfcl.importlib.metadata, "version", lambda name: "1.0")
    with pytest.raises(RuntimeError, match=r"1\.0 is installed"):
        Bfcl()


def test_nothing_of_the_package_is_imported_here():
    import sys

    assert not [name for name in sys.modules if name.startswith("bfcl_eval")]
    assert not (Path(find_spec("bfcl_eval").origin).parents[1] / "result").exists()


def test_a_lost_call_is_undone_and_the_attempt_goes_on(env, tasks, monkeypatch):
    task = tasks["multi_turn_base_15"]
    gold = env.gold(task)
    run, slow = env.run, {"name": "logarithm", "arguments": {"value": 10, "base": 2, "precision": 10**8}}

    def lose(function, **arguments):
        if arguments.get("call") == slow:
            return ToolResult(False, "", "timed out after 10 seconds")
        assert slow not in arguments.get("done", [])
        return run(function, **arguments)

    monkeypatch.setattr(env, "run", lose)
    attempt = script(gold)
    attempt.insert(1, {"role": "assistant", "content": "", "tool_calls": [slow]})
    [record] = play(env, [task], lambda task: attempt).values()
    assert record.metrics["valid"] == 1.0
    assert "timed out" in str(record.messages)
    episode = env.start(task)
    for _ in range(bfcl.LOST_LIMIT):
        assert "timed out" in episode.call(**slow)
    assert "no more are executed" in episode.call("pwd", {})


def test_a_check_that_fails_is_said_and_not_valid(env, tasks, monkeypatch, caplog):
    episode = env.start(tasks["multi_turn_base_0"])
    monkeypatch.setattr(env, "run", lambda *_, **__: ToolResult(False, "", "timed out after 60 seconds"))
    score = episode.score([{"role": "assistant", "content": "Done."}])
    assert (score.reward, score.artifact["error_type"]) == (0.0, "check_failed")
    assert "the check of multi_turn_base_0 failed" in caplog.text


def test_an_empty_last_turn_must_be_answered(env, tasks):
    """Its gold calls nothing there, but without an answer it was not played."""
    task = tasks["multi_turn_miss_param_167"]
    gold = env.gold(task)
    assert not gold[-1]
    messages = []
    for message in script(gold):
        messages += [message] + [{"role": "user", "content": "next"}] * (message["content"] == "Done.")
    assert env.start(task).score(messages[:-1]).metrics["valid"] == 1.0
    missing = env.start(task).score(messages[:-2])
    assert (missing.metrics["valid"], missing.artifact["error_type"]) == (0.0, "multi_turn:force_terminated")


def test_all_steps_of_the_last_turn_count_as_played(env, tasks):
    """As in the release: it stops there, and looks at the state."""
    task = tasks["multi_turn_base_0"]
    look = {"role": "assistant", "content": "", "tool_calls": [{"name": "pwd", "arguments": {}}]}
    *says, _ = script(env.gold(task))
    [record] = play(env, [task], lambda task: says + [look] * STEP_LIMIT).values()
    assert (record.stop_reason, record.metrics["valid"]) == ("turn_limit", 1.0)


def test_a_lost_memory_stays_as_it_was(env, tasks, monkeypatch, caplog):
    task = tasks["memory_rec_sum_prereq_0-customer-0"]
    monkeypatch.setattr(env, "_memory", {("memory_rec_sum", "customer"): {"memory": "kept"}})
    monkeypatch.setattr(env, "run", lambda *_, **__: ToolResult(False, "", "its output is too long"))
    score = env.start(task).score([{"role": "assistant", "content": "Noted."}])
    env.keep(task, score.artifact)
    assert env._memory["memory_rec_sum", "customer"] == {"memory": "kept"}
    assert "is lost: its output is too long" in caplog.text


def test_prose_is_exported_as_prose():
    said = {
        "role": "assistant",
        "content": '<tool_call>\n{"name": "rm"}',
        "tool_calls": [{"name": "ls", "arguments": {}}],
    }
    assert bfcl._released_text(said).count("<tool_call>") == 1
