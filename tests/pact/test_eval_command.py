"""pact eval: whole evaluations of replayed scripts and of a tiny model, resume, comparison, one-line errors."""

import fcntl
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from test_ftrl import GOLD, item
from test_toolhop import ROW
from trainer_setup import tiny_model, toybox

from pact import cli
from pact.envs.base import Score, Task
from pact.eval import EvalArguments, _model_name, choose, parse, read_episodes, settings_of
from pact.rollout import RolloutLimits

ANSWERED = [
    {"name": "city_of", "arguments": {"person": "Ada"}},
    {"name": "area_of", "arguments": {"city": "London"}},
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Five FTRL items in two groups (the last is solved by half), their scripts, and the arguments that name them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [item(split="test", ground_truth=..., data_source=f"group {n % 2}") for n in range(5)]
    rows = [
        row | {"messages": [{"role": "user", "content": f"How large is Ada's city, {n}?"}]}
        for n, row in enumerate(rows)
    ]
    write_jsonl(tmp_path / "items.jsonl", rows)
    scripts = [{"id": f"ftrl/{n}", "calls": ANSWERED, "answer": "1,572"} for n in range(4)]
    write_jsonl(tmp_path / "scripts.jsonl", [*scripts, {"id": "ftrl/4", "calls": ANSWERED[:1]}])
    return tmp_path


FTRL = ["eval", "--env", "ftrl", "--data", "items.jsonl", "--model", "replay:scripts.jsonl", "--batch_size", "2"]


def run(*arguments, output="out"):
    return cli.main([*FTRL, "--output", output, *arguments])


def test_an_evaluation_from_items_to_tables(folder, capsys):
    assert run() == 0
    printed = capsys.readouterr().out
    assert printed.strip() == (folder / "out" / "summary.md").read_text().strip()
    assert "| group 0 | 3 |" in printed
    assert "| group 1 | 2 | 1.0000 [1.0000, 1.0000] |" in printed
    assert "Episodes ended by: answer 5." in printed
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert (summary["items"], summary["overlong_prompts"], summary["stop_reasons"]) == (5, 0, {"answer": 5})
    assert summary["rows"]["total"]["solve_f1"]["mean"] == pytest.approx((4 + 2 / 3) / 5)
    assert summary["rows"]["total"]["solve_r"]["n"] == 5
    lines = [json.loads(line) for line in (folder / "out" / "episodes.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"ftrl/{n}" for n in range(5)]
    assert lines[0]["metrics"] == {"solve_p": 1.0, "solve_r": 1.0, "solve_f1": 1.0}
    assert (lines[0]["group"], lines[0]["turns"], lines[0]["stop_reason"]) == ("group 0", 3, "answer")
    assert [message["role"] for message in lines[0]["messages"]] == ["assistant", "tool"] * 2 + ["assistant"]
    assert lines[0]["prompt_tokens"] > 0 < lines[0]["response_tokens"]


def test_an_interrupted_evaluation_goes_on(folder, capsys, monkeypatch):
    assert run(output="whole") == 0
    batches = []

    def stopped(self, records):
        if batches:
            raise KeyboardInterrupt
        batches.append(records)
        append(self, records)

    append = sys.modules["pact.eval"].Results.append
    monkeypatch.setattr("pact.eval.Results.append", stopped)
    assert run() == 130
    assert "the same command continues" in capsys.readouterr().err
    path = folder / "out" / "episodes.jsonl"
    assert len(read_episodes(path)) == 2
    path.write_text(path.read_text() + '{"id": "ftrl/2", "rew')  # and a line that was being written
    monkeypatch.setattr("pact.eval.Results.append", append)
    assert run("--batch_size", "3", "--env_options.workers", "1") == 0
    assert path.read_text() == (folder / "whole" / "episodes.jsonl").read_text()
    assert (folder / "out" / "summary.json").read_text() == (folder / "whole" / "summary.json").read_text()
    # Finished: the tables are made again, and no model is needed.
    monkeypatch.setattr("pact.eval.load_agent", lambda *_: pytest.fail("nothing is left to play"))
    assert run() == 0


def test_a_finished_folder_is_not_continued_with_other_settings(folder, capsys):
    assert run() == 0
    before = (folder / "out" / "episodes.jsonl").read_text()
    (folder / "other.jsonl").write_text((folder / "scripts.jsonl").read_text())
    changed = write_jsonl(folder / "changed.jsonl", [item(ground_truth=..., split="test")])
    for arguments, message in (
        (["--max_turns", "3"], "begun with other settings: max_turns 10 and now 3; set them back"),
        (["--malformed_calls", "skip"], 'malformed_calls "observe" and now "skip"'),
        (["--limit", "3"], "limit null and now 3"),
        (["--model", "replay:other.jsonl"], "model_files"),
        (["--data", str(changed)], "items"),
    ):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err
    assert (folder / "out" / "episodes.jsonl").read_text() == before
    (folder / "scripts.jsonl").write_text((folder / "scripts.jsonl").read_text() + "\n")
    assert run() == 2  # the same names, another model
    assert "model_files" in capsys.readouterr().err


def test_a_strange_folder_is_left_alone(folder, capsys):
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("x")
    assert run() == 2
    assert "out holds something else than an evaluation" in capsys.readouterr().err
    assert run(output="new") == 0
    path = folder / "new" / "episodes.jsonl"
    path.write_text("{}\n" + path.read_text())
    assert run(output="new") == 2
    assert "line 1 is no episode" in capsys.readouterr().err
    path.write_text('{"id": "ftrl/9", "reward": 1, "metrics": {}, "turns": 1, "stop_reason": "answer"}\n')
    assert run(output="new") == 2
    assert "an episode of 'ftrl/9', which is no item" in capsys.readouterr().err


def test_two_evaluations_are_compared(folder, capsys):
    assert run() == 0
    write_jsonl(folder / "worse.jsonl", [{"id": f"ftrl/{n}", "calls": ANSWERED[:1]} for n in range(5)])
    assert run("--model", "replay:worse.jsonl", "--max_turns", "7", output="worse") == 0
    capsys.readouterr()
    assert cli.main(["eval", "--compare", "out", "worse"]) == 0
    printed = capsys.readouterr().out
    assert "# worse minus out" in printed
    assert (
        "| group 1 | 2 | 0.0000 [0.0000, 0.0000] | -0.5000 [-0.5000, -0.5000] | -0.3333 [-0.3333, -0.3333] |" in printed
    )
    assert 'Settings that differ: model "replay:scripts.jsonl" and "replay:worse.jsonl"; max_turns 10 and 7.' in printed
    assert run("--limit", "2", output="less") == 0
    for arguments, message in (
        (["out", "less"], "evaluated on different items"),
        (["out", str(folder)], "is not the output of an evaluation"),
        (["out"], "--compare BEFORE AFTER"),
    ):
        assert cli.main(["eval", "--compare", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_an_earlier_evaluation_is_replayed_and_scored_again(folder):
    assert run() == 0
    assert run("--model", "replay:out/episodes.jsonl", output="again") == 0
    first, again = (json.loads((folder / name / "summary.json").read_text())["rows"] for name in ("out", "again"))
    assert first == again


def test_a_dataset_folder_and_a_yaml_file(folder):
    """What datasets.load_dataset can read, with its split names, and settings from a file."""
    (folder / "set").mkdir()
    rows = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    write_jsonl(folder / "set" / "test.jsonl", [{k: v for k, v in row.items() if k != "split"} for row in rows])
    write_jsonl(folder / "set" / "train.jsonl", [item(split=..., ground_truth=..., data_source="group 0")])
    (folder / "eval.yaml").write_text(
        "env: ftrl\ndata: set\nmodel: replay:scripts.jsonl\nlimit: 5\nenv_options: {timeout: 5}\n"
    )
    write_jsonl(folder / "scripts.jsonl", [{"id": f"ftrl/{n}", "calls": ANSWERED} for n in range(6)])
    assert cli.main(["eval", "eval.yaml", "--output", "out", "--env_options.workers", "1"]) == 0
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert (summary["items"], summary["rows"]["total"]["solve_f1"]["mean"]) == (5, 1.0)
    assert cli.main(["eval", "eval.yaml", "--output", "train", "--split", "train"]) == 0
    assert json.loads((folder / "train" / "summary.json").read_text())["items"] == 1


def test_nested_items_of_a_dataset_folder(folder):
    """ToolHop's tools are nested objects; read through datasets they are what the file says."""
    (folder / "set").mkdir()
    other = ROW | {"tools": {"Elsewhere?": ROW["tools"]["Who founded it?"]}}
    write_jsonl(folder / "set" / "test.jsonl", [ROW, other])
    write_jsonl(folder / "answers.jsonl", [{"id": f"toolhop/{n}", "calls": [], "answer": "9"} for n in range(2)])
    command = ["eval", "--env", "toolhop", "--data", "set", "--model", "replay:answers.jsonl", "--output", "out"]
    assert cli.main([*command, "--env_options.scenario", "mandatory"]) == 0
    rows = json.loads((folder / "out" / "summary.json").read_text())["rows"]
    assert rows["mandatory"]["answer_correctness_strict"]["mean"] == 1.0


def test_a_model_is_evaluated(tmp_path, capsys):
    """A tiny model that has learnt nothing, on the toybox: it is loaded from its folder, long prompts are counted."""
    env = toybox()
    tokenizer = env.tokenizer()
    tiny_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = ["--env_options.train", "1", "--env_options.test", "4", "--device", "cpu", "--max_turn_tokens", "4"]
    command = ["eval", "--env", "toybox", "--model", str(tmp_path / "model"), *options]
    assert cli.main([*command, "--output", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["items"], summary["rows"]["total"]["success"]["mean"]) == (4, 0.0)
    assert "Prompts over the context, scored as failures: 0." in capsys.readouterr().out
    assert cli.main([*command, "--output", str(tmp_path / "short"), "--context_length", "20"]) == 0
    summary = json.loads((tmp_path / "short" / "summary.json").read_text())
    assert (summary["overlong_prompts"], summary["stop_reasons"]) == (4, {"context_limit": 4})
    with (tmp_path / "model" / "model.safetensors").open("ab"):
        pass
    torch.save({}, tmp_path / "model" / "extra.bin")
    assert cli.main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "model_files" in capsys.readouterr().err


class Chained:
    """Two groups, and a task without one, which the others need; `averages` over the groups."""

    averages = {"both": ["a", "b"]}  # noqa: RUF012
    eval_limits = {"max_turns": 2, "max_turn_tokens": 50}  # noqa: RUF012

    def tasks(self, split):
        groups = ["a", "a", None, "b"]
        return [
            Task(f"t{n}", [{"role": "user", "content": f"{n}?"}], [], group=group) for n, group in enumerate(groups)
        ]

    def start(self, task):
        def score(messages):
            valid = float(task.id != "t0")
            return Score(valid, [valid], {"valid": valid}, artifact={"said": messages[-1]["content"]})

        return SimpleNamespace(tools=[], user_turn=lambda: None, score=score, close=lambda: None)


def test_groups_averages_and_what_does_not_count(folder, monkeypatch, capsys):
    monkeypatch.setattr("pact.eval.make", lambda name, **options: Chained())
    exported = []
    module = SimpleNamespace(export_results=lambda pairs, folder, name: exported.append((list(pairs), folder, name)))
    monkeypatch.setitem(sys.modules, "pact.envs.bfcl_export", module)
    write_jsonl(folder / "says.jsonl", [{"id": f"t{n}", "calls": [], "answer": str(n)} for n in range(4)])
    command = ["eval", "--env", "bfcl", "--model", "replay:says.jsonl", "--output", "out", "--export_bfcl", "official"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "| b | 1 | 1.0000 [1.0000, 1.0000] |" in printed
    assert "| both | 3 | 0.7500 [" in printed
    assert "| total | 3 | 0.6667 [" in printed
    assert "Played but not counted (they prepare later items): 1." in printed
    [(pairs, where, name)] = exported
    assert pairs == [(f"t{n}", {"said": str(n)}) for n in range(4)]
    assert (str(where), name) == ("official", "says")
    assert _model_name("owner/Model-1.7B") == "Model-1.7B"
    assert read_episodes(folder / "out" / "episodes.jsonl")[2].artifact == {"said": "2"}


def test_a_limit_takes_from_all_groups_in_turn():
    groups = ["a", "a", "a", None, "b", "b", "c"]
    tasks = [Task(f"t{n}", [], [], group=group) for n, group in enumerate(groups)]
    assert [task.id for task in choose(tasks, 5)] == ["t0", "t1", "t3", "t4", "t5", "t6"]
    assert [task.id for task in choose(tasks, 2)] == ["t0", "t3", "t4"]
    assert choose(tasks, None) == choose(tasks, 100) == tasks
    plain = [Task(f"t{n}", [], []) for n in range(3)]
    assert choose(plain, 2) == plain[:2]


def test_limits_are_the_environments_unless_given():
    env = Chained()
    args = parse(["--env", "x", "--model", "m", "--output", "o", "--max-turns", "5", "--context_length", "99"])
    assert args.limits(env) == RolloutLimits(max_turns=5, max_turn_tokens=50, context_length=99)
    assert args.limits(SimpleNamespace()) == RolloutLimits(max_turns=5, context_length=99)
    assert settings_of(args, args.limits(env), env.tasks("test"))["max_turn_tokens"] == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env", ""], "no env: give --env NAME"),
        (["--model", "nowhere/at/all"], "no model folder nowhere/at/all"),
        (["--model", "replay:missing.jsonl"], "there is no file missing.jsonl to replay"),
        (["--data", "missing.jsonl"], "there is no file missing.jsonl"),
        (["--split", "dev"], "no split 'dev'"),
        (["--limit", "0"], "limit is 0, set it to at least 1"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--temperature", "-1"], "temperature must be finite and at least 0"),
        (["--max_turns", "0"], "max_turns must be at least 1"),
        (["--max_turn", "3"], "unknown argument '--max_turn': did you mean 'max_turns'?"),
        (["--call_format", "xml"], "invalid choice: 'xml'"),
        (["--env_options.colour", "red"], "its options are path, traces"),
        (["--export_bfcl", "x"], "export_bfcl writes results of the environment bfcl, not of ftrl"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(folder, capsys, arguments, message):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "out").exists()


def test_scripts_of_other_items_are_refused(folder, capsys):
    write_jsonl(folder / "scripts.jsonl", [{"id": "toolhop/0", "calls": GOLD[:0]}])
    assert run() == 2
    assert "has no script for any item: its ids are like 'toolhop/0', those of the items like 'ftrl/0'" in (
        capsys.readouterr().err
    )


def test_a_dataset_that_cannot_be_had_is_one_line(folder, capsys, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda name: (_ for _ in ()).throw(ConnectionError("no\nroute")))
    assert run("--data", "owner/name") == 2
    assert "cannot load the dataset owner/name (no); check name and network" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert run("--data", "owner/name") == 2
    assert "pip install 'pact-kernels[hub]'" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", "--help"])
    assert stop.value.code == 0
    assert "--malformed_calls" in capsys.readouterr().out
    assert EvalArguments("toybox", "m", "o").temperature == 0.0


def test_other_answers_in_the_same_file_are_another_evaluation(folder, capsys):
    """What scores the episodes counts as much as what the policy sees."""
    assert run() == 0
    path = folder / "items.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["unsolved_set"] = json.dumps({name: ["elsewhere"] for name in json.loads(rows[0]["unsolved_set"])})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run() == 2
    assert "items" in capsys.readouterr().err


def test_two_processes_do_not_share_an_output(folder, capsys):
    assert run() == 0
    (folder / "out" / "episodes.jsonl").unlink()
    with (folder / "out" / "settings.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert run() == 2
    assert "is writing to out: wait" in capsys.readouterr().err


def test_what_was_not_sampled_as_it_stands_is_not_replayed(folder, capsys):
    for message in ({"content": "a", "cut": True}, {"content": "<think>more"}, {"role": "tool", "name": "error"}):
        record = {"id": "ftrl/0", "messages": [{"role": "assistant", "content": "", **message}]}
        write_jsonl(folder / "scripts.jsonl", [record])
        assert run() == 2
        assert "do not hold what was sampled" in capsys.readouterr().err


def test_an_unfinished_evaluation_is_not_compared(folder, capsys):
    assert run() == 0
    path = folder / "out" / "episodes.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert cli.main(["eval", "--compare", "out", "out"]) == 2
    assert "has 3 of 5 episodes" in capsys.readouterr().err
