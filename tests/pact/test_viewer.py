"""pact inspect: tokens, weights and trees as data; safe text; the files it reads; the command."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from viewer_setup import HOSTILE, hostile_task, row, task, trace

from pact import cli
from pact.engines.replay import ReplayEngine
from pact.envs import make
from pact.envs.toybox_text import build_tokenizer
from pact.objective import Group, PactConfig, PactObjective, Rollout
from pact.rollout import run_rollouts
from pact.schedules import REASONING_ANNEALS, linear, supervised_segments
from pact.trace import Component, render_trace
from pact.viewer import Attempt, display, group_tree, parts_of, runs_of, supervised_weights, token_texts, view_task
from pact.viewer_files import read_attempts, read_tasks
from pact.viewer_html import inspect_page
from pact.viewer_text import draw
from pact.visible import visible

CONFIG = PactConfig(tool_call_weight=(0.9, 0.3), answer_weight=0.25)
ANSI = re.compile("\x1b\\[[0-9;]*m")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    return path


# -- tokens and weights ----------------------------------------------------------------------------------------------


def test_runs_are_the_components_and_segments_of_the_trace(tokenizer):
    view = view_task(task(), tokenizer)
    runs = runs_of(view.trace, tokenizer)
    assert [(run.component.name, run.segment, run.segments) for run in runs if run.component != Component.PROMPT] == [
        ("REASONING", 0, 3), ("REASONING", 1, 3), ("REASONING", 2, 3), ("TOOL_CALL", -1, 0), ("OBSERVATION", -1, 0),
        ("REASONING", 0, 2), ("REASONING", 1, 2), ("ANSWER", -1, 0),
    ]  # fmt: skip
    assert runs[2].text == "I look it up.</think>"
    assert [token for run in runs for token in run.ids] == view.trace.ids
    assert [run.start for run in runs] == np.cumsum([0, *(len(run.ids) for run in runs)])[:-1].tolist()


def test_two_blocks_of_reasoning_behind_each_other_are_told_apart(tokenizer):
    """A block that ends with its segment 0 and one that begins with it must not become one run of two."""
    ids = view_task(task(), tokenizer).trace.ids[:6]
    reasoning = int(Component.REASONING)
    runs = runs_of(type(view_task(task(), tokenizer).trace)(ids, [reasoning] * 6, [0, 1, 1, 0, 1, 2]), tokenizer)
    assert [(run.segment, run.segments) for run in runs] == [(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    assert [(run.before, run.block) for run in runs] == [(0, 3), (1, 3), (0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize("anneal", REASONING_ANNEALS)
@pytest.mark.parametrize("progress", [0.0, 0.3, 1 / 3, 0.5, 0.999, 1.0])
def test_weights_are_those_of_the_schedules(tokenizer, anneal, progress):
    config = PactConfig(tool_call_weight=(0.9, 0.3), answer_weight=0.25, reasoning_anneal=anneal, sft_coef=0.0)
    view = view_task(task(), tokenizer)
    weight_N = supervised_weights(view.trace, config, progress)
    for run in runs_of(view.trace, tokenizer):
        expected = {Component.TOOL_CALL: linear(0.9, 0.3, progress), Component.ANSWER: 0.25}.get(run.component, 0.0)
        if run.component == Component.REASONING:
            kept = float(run.segment < supervised_segments(run.segments, progress))
            scale = {"segment": kept, "linear": 1.0 - progress, "none": 1.0, "token": 1.0, "off": 0.0}
            expected = scale[anneal]
        weights = [expected] * len(run.ids)
        if anneal == "token" and run.component == Component.REASONING:
            kept = supervised_segments(run.block, progress) - run.before
            weights = [float(place < kept) for place in range(len(run.ids))]
        assert weight_N[run.start : run.start + len(run.ids)].tolist() == weights


def test_a_run_is_cut_where_its_weight_changes(tokenizer):
    """Token by token the supervised prefix ends within a segment; the two parts are the run again."""
    view = view_task(task(), tokenizer)
    weight_N = supervised_weights(view.trace, replace(CONFIG, reasoning_anneal="token"), 0.5)
    cut = 0
    for run in runs_of(view.trace, tokenizer):
        parts = list(parts_of(run, weight_N))
        assert [token for part, _ in parts for token in part.ids] == run.ids
        assert "".join(part.text for part, _ in parts) == run.text
        for part, weight in parts:
            assert weight_N[part.start : part.start + len(part.ids)].tolist() == [weight] * len(part.ids)
        assert [weight for _, weight in parts] == sorted({weight for _, weight in parts}, reverse=True)
        cut += len(parts) == 2
    assert 0 < cut <= 2  # at most once a block


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("anneal", REASONING_ANNEALS)
def test_the_page_as_written_has_the_weight_of_each_token(tokenizer, anneal, progress):
    """Before any script has run, and with scripts forbidden."""
    config = replace(CONFIG, reasoning_anneal=anneal)
    shown = display(view_task(task(), tokenizer), tokenizer, config, progress)
    written = inspect_page([shown], config, progress).partition('class="seq trace"')[2].partition("</details>")[0]
    found = []
    for run in written.split('<div class="run ')[1:]:
        weight = re.search(r'data-w="([^"]*)"', run)
        for out in re.findall(r'<span class="t( out)?"', run):
            found.append(float(weight[1]) if weight and not out else 0.0)
    assert found == pytest.approx(shown.weight_N.tolist(), abs=1e-6)


def test_an_unsupervised_turn_has_no_weight(tokenizer):
    expert = trace()
    expert[0]["supervised"] = False
    view = view_task(task(expert=expert), tokenizer)
    weight_N = supervised_weights(view.trace, CONFIG, 0.0)
    second = view.trace.component.index(Component.OBSERVATION)
    assert not weight_N[:second].any()
    assert weight_N[second:].any()


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
@example("héllo 😀 日本 \ufffd\ufffd x")
@example("\ufffd")
def test_token_texts_add_up_to_the_text(text):
    tokenizer = build_tokenizer()
    encoded = tokenizer.backend_tokenizer.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False)
    texts = token_texts(encoded.ids, tokenizer)
    assert len(texts) == len(encoded.ids)
    assert "".join(texts) == tokenizer.backend_tokenizer.decode(encoded.ids, skip_special_tokens=False)


# -- rollouts and trees ----------------------------------------------------------------------------------------------


def test_a_rollout_shown_has_the_ids_that_were_sampled(tokenizer):
    env = make("toybox", train=4, test=1, recovery_share=1.0)
    engine = ReplayEngine(tokenizer)
    tasks = env.tasks("train")
    for item in tasks:
        engine.learn(item, item.expert)
    for item, [played] in zip(tasks, run_rollouts(env, tasks, engine, tokenizer, n=1)):
        [shown] = view_task(item, tokenizer, [Attempt("played", played.messages)]).rollouts
        assert shown.tokens.ids == played.ids
        assert shown.sampled == [int(token) for token in played.sampled]
        assert shown.tokens.component == played.component
        assert shown.exact


def test_a_turn_that_was_cut_or_unreadable_is_shown_as_far_as_it_is_known(tokenizer):
    cut = [*trace()[:2], {"role": "assistant", "content": "", "reasoning_content": "I was", "cut": True}]
    unread = [
        {"role": "assistant", "content": "hm", "tool_calls": []},
        {"role": "tool", "name": "error", "content": "error: no call"},
        {"role": "assistant", "content": "", "tool_calls": []},
    ]
    first, second = view_task(task(), tokenizer, [Attempt("cut", cut), Attempt("unread", unread)]).rollouts
    stop = first.tokens.ids[first.tokens.component.index(Component.OBSERVATION) - 1]
    assert first.tokens.ids[-1] != stop
    assert second.tokens.ids[-1] == stop
    assert not first.exact
    assert not second.exact
    for tokens in (first.tokens, second.tokens):
        assert len(tokens.ids) == len(tokens.component) == len(tokens.segment)


def test_a_rollout_without_messages_samples_nothing(tokenizer):
    view = view_task(task(), tokenizer, [Attempt("empty", [])])
    assert view.rollouts[0].tokens.ids == []
    assert list(group_tree(view, CONFIG).savings) == ["prompts and SFT"]


def attempts():
    wrong = [*trace()[:2], {"role": "assistant", "content": "a bed", "reasoning_content": "That is clear. Or not."}]
    quick = [{"role": "assistant", "content": "a hut", "reasoning_content": "I guess."}]
    return [Attempt("right", trace(), 1.0), Attempt("wrong", wrong, 0.0), Attempt("quick", quick, 0.0)]


def test_the_savings_are_those_of_the_trainer(tokenizer):
    view = view_task(task(), tokenizer, attempts())
    savings = group_tree(view, PactConfig()).savings
    rollouts = [Rollout(r.tokens.ids, r.sampled, [1.0] * len(r.sampled)) for r in view.rollouts]
    objective = PactObjective(PactConfig(kl_coef=0.0, entropy_coef=0.0))
    for branch, name in (("prompt", "prompt-only"), ("trace", "trace-conditioned")):
        group = Group(view.head, view.suffix, view.context, view.trace, rollouts, branch)
        [batch] = objective.build([group], 0.0)
        assert batch.plan.unique_tokens == savings[name].unique
        assert batch.plan.dense_tokens == savings[name].dense


@pytest.mark.parametrize("given", [attempts(), []], ids=["rollouts", "none"])
def test_a_tree_holds_every_sequence_once(tokenizer, given):
    """Walking from each node to its root, the depths fit; together the nodes are the unique tokens."""
    view = view_task(task(), tokenizer, given)
    tree = group_tree(view, PactConfig())
    saving = list(tree.savings.values())[-1]
    assert sum(node.tokens for node in tree.nodes) == saving.unique
    assert sum(node.tokens * node.below for node in tree.nodes) == saving.dense
    for node in tree.nodes:
        above = tree.nodes[node.parent] if node.parent >= 0 else None
        assert node.depth == (0 if above is None else above.depth + above.tokens)
        assert above is None or above.below >= node.below
    root = tree.nodes[0]
    assert (root.parts, root.tokens, root.below) == (("prompt",), len(view.head), len(tree.names))
    named = {part for node in tree.nodes for part in node.parts}
    assert {"prompt", "end of prompt", "trace in context", "expert trace"} <= named
    assert ("rollout 1" in named) == bool(given)
    shared = next((node for node in tree.nodes if node.parts == ("rollout 1", "rollout 2", "expert trace")), None)
    assert (shared is not None) == bool(given)


def test_a_task_without_a_trace(tokenizer):
    view = view_task(task(expert=None), tokenizer, attempts())
    shown = display(view, tokenizer, PactConfig(), 0.5)
    assert set(shown.tree.savings) == {"prompt-only", "both"}
    assert shown.sections[0].title == "prompt"
    assert view_task(task(expert=None), tokenizer).trace is None
    alone = group_tree(view_task(task(expert=None), tokenizer), CONFIG)
    assert [node.parts for node in alone.nodes] == [("prompt",), ("end of prompt",)]


# -- text that is safe to look at ------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.text())
@example(HOSTILE)
def test_nothing_unseen_stays_in_visible_text(text):
    shown = visible(text)
    unseen = [c for c in shown if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")]
    assert not unseen
    shown.encode("utf-8")
    assert shown.count("\n") == text.count("\n")


def test_plain_text_stays_as_it_is():
    text = "Größe: 5 × 3 = 15, 日本語 😀 <b>&amp;</b>\n  indented"
    assert visible(text) == text
    assert visible("a\x1b[2Jb\u202ec") == "a⟨U+001B⟩[2Jb⟨U+202E⟩c"


@pytest.mark.parametrize("colour", [True, False])
def test_no_control_character_reaches_the_terminal(tokenizer, colour):
    played = [Attempt("mean" + HOSTILE, trace(HOSTILE, "fine"), 1.0)]
    shown = display(view_task(hostile_task(), tokenizer, played), tokenizer, CONFIG, 0.3)
    lines = list(draw(shown, progress=0.3, colour=colour, width=100))
    text = "\n".join(lines)
    assert bool(ANSI.search(text)) == colour
    bare = ANSI.sub("", text)
    assert visible(bare) == bare
    assert "⟨U+001B⟩[31mred" in bare.replace("\n" + " " * 24, "")
    assert max(len(ANSI.sub("", line)) for line in lines if line.startswith(" ")) <= 100


def test_drawn_text_is_the_text_of_the_trace(tokenizer):
    """The runs, without gutters and wrapping, are the trace again; weights stand beside what has weight."""
    shown = display(view_task(task(), tokenizer), tokenizer, CONFIG, 0.5)
    lines = list(draw(shown, progress=0.5, colour=False, width=60))
    start = next(i for i, line in enumerate(lines) if line.startswith("expert trace"))
    body = lines[start + 1 : lines.index("", start)]
    text = "".join(line[24:] for line in body).replace("⏎", "\n")
    assert text == tokenizer.decode(shown.view.trace.ids)
    assert any(line.startswith("reasoning 2/3 w 1.00") for line in body)
    assert any(line.startswith("reasoning 3/3 w 0.00") for line in body)
    assert any(line.startswith("tool call w 0.60") for line in body)


def test_a_boundary_within_a_segment_is_drawn(tokenizer):
    """What stands beside weight 1 is exactly the supervised half of each block's tokens."""
    shown = display(view_task(task(), tokenizer), tokenizer, replace(CONFIG, reasoning_anneal="token"), 0.5)
    lines = list(draw(shown, progress=0.5, colour=False, width=60))
    start = next(i for i, line in enumerate(lines) if line.startswith("expert trace"))
    note, told = "", {"1.00": "", "0.00": ""}
    for line in lines[start + 1 : lines.index("", start)]:
        note = line[:24].strip() or note
        if note.startswith("reasoning"):
            told[note[-4:]] += line[24:].replace("⏎", "\n")
    trace = shown.view.trace
    for weight, text in told.items():
        reasoning_N = np.asarray(trace.component) == Component.REASONING
        ids = np.asarray(trace.ids)[reasoning_N & (shown.weight_N == float(weight))]
        assert text == tokenizer.decode(ids.tolist())


# -- files -----------------------------------------------------------------------------------------------------------


def test_every_form_of_a_line_is_read(tmp_path):
    whole = task()
    calls = [{"name": "look_up", "arguments": '{"word": "cot"}', "observation": "a small house"}]
    again = [{"role": "user", "content": "And a bed?"}, {"role": "assistant", "content": "for sleeping"}]
    path = write_lines(
        tmp_path / "traces.jsonl",
        row(whole),
        {"id": "talk", "messages": [*whole.messages, *trace(), *again], "tools": json.dumps(whole.tools)},
        {"question": "What is a cot?", "expert": trace()},
        {"row": 6, "calls": [], "complete": False},
        {"row": 7, "calls": calls, "complete": True},
        {"id": "episode", "messages": trace(), "reward": 1.0, "metrics": {}, "turns": 2, "stop_reason": "answer"},
        {"id": "prompt alone", "prompt": "What is a cot?"},
    )
    tasks = read_tasks(path)
    assert [item.id for item in tasks] == ["words/1", "talk", "line-3", "ftrl/7", "episode", "prompt alone"]
    assert (tasks[0].messages, tasks[0].tools, tasks[0].expert) == (whole.messages, whole.tools, whole.expert)
    assert (tasks[1].messages, tasks[1].expert) == ([*whole.messages, *trace(), again[0]], again[1:])
    assert tasks[1].tools == whole.tools
    assert tasks[2].messages == [{"role": "user", "content": "What is a cot?"}]
    assert tasks[3].messages == []
    assert [message["role"] for message in tasks[3].expert] == ["assistant", "tool"]
    assert tasks[4].expert == trace()
    assert tasks[5].expert is None


def test_a_trace_without_its_prompt_is_shown_without_a_tree(tokenizer):
    shown = display(view_task(task(expert=trace()), tokenizer), tokenizer, CONFIG, 0.0)
    alone = display(view_task(type(task())("x", [], [], expert=trace()), tokenizer), tokenizer, CONFIG, 0.0)
    assert shown.tree is not None
    assert alone.tree is None
    assert alone.view.trace.ids == render_trace(trace(), None, tokenizer).ids


BROKEN = {
    "not JSON": ('{"id": 1,', "line 1: it is not valid JSON"),
    "no object": ("[1]", "line 1: it is list; write one JSON object a line"),
    "nothing": ("{}", "line 1, field messages: it is missing; write one of messages, prompt, question"),
    "role": ('{"messages": [{"role": "robot", "content": "x"}]}', "line 1, field messages: .* role 'robot'"),
    "messages": ('{"messages": "hello"}', "line 1, field messages: it is str; write a list of messages"),
    "trace": ('{"question": "q", "expert": [{"role": "tool", "content": "x"}]}', "line 1, field expert: .*starts with"),
    "expert": ('{"question": "q", "expert": {"role": "tool"}}', "line 1, field expert: it is dict"),
    "alone": ('{"messages": [{"role": "assistant", "content": ""}]}', "line 1, field messages: .*empty assistant turn"),
    "tools": ('{"question": "q", "tools": "{"}', "line 1, field tools: it is not valid JSON"),
    "schema": ('{"question": "q", "tools": [{"name": "x"}]}', "line 1, field tools: tool 0"),
    "names": ('{"question": "q", "tools": ["x"]}', "line 1, field tools: it names functions; take the task from --env"),
    "calls": (
        '{"row": 1, "calls": [{"name": "f", "arguments": {}}]}',
        "line 1, field calls: call 0 has no observation",
    ),
    "call": (
        '{"row": 1, "calls": [{"name": "f", "arguments": "{", "observation": ""}]}',
        "field calls: call 0: .*JSON",
    ),
    "prompt end": ('{"messages": [{"role": "system", "content": "x"}]}', "field messages: it ends with role system"),
    "twice": ('{"id": "a", "question": "q"}\n\n{"id": "a", "question": "q"}', "line 3, field id: 'a' is also .*line 1"),
    "empty": ("\n \n", "holds no lines"),
    "incomplete": ('{"row": 1, "calls": [], "complete": false}', "holds no complete trace"),
    "deep": ("[" * 200_000, "line 1: it is not valid JSON"),
    "mark": ("\ufeff{}", "line 1: it begins with a byte order mark"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_line_is_named(tmp_path, case):
    text, message = BROKEN[case]
    path = tmp_path / "broken.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_tasks(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_encodings(tmp_path):
    path = tmp_path / "traces.jsonl"
    path.write_bytes(b'{"question": "caf\xc3\xa9 \xe2\x80\xa8"}\n')  # U+2028 within a string ends no line
    assert read_tasks(path)[0].messages[0]["content"] == "café \u2028"
    path.write_bytes(b'{"question": "ok"}\n{"question": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="line 2: byte 18 is not UTF-8"):
        read_tasks(path)


def test_rollouts_are_read_by_task(tmp_path):
    first = write_lines(
        tmp_path / "eval_start.jsonl",
        {"id": "a", "messages": trace(), "reward": 0.5},
        {"id": "a", "messages": []},
        {"id": "b", "messages": trace()},
    )
    found = read_attempts([first, write_lines(tmp_path / "eval_final.jsonl", {"id": "a", "messages": trace()})])
    assert [attempt.name for attempt in found["a"]] == ["eval_start 1", "eval_start 2", "eval_final 1"]
    assert [attempt.reward for attempt in found["a"]] == [0.5, None, None]
    for broken, message in (
        ({"messages": []}, "line 1, field id: missing"),
        ({"id": "a", "reward": 1.0}, "line 1, field messages: missing.*evaluate again"),
        ({"id": "a", "messages": [], "reward": "much"}, "line 1, field reward: str"),
        ({"id": "a", "messages": [{"role": "robot"}]}, "line 1, field messages: rollout message 0: role"),
    ):
        with pytest.raises(ValueError, match=message):
            read_attempts([write_lines(tmp_path / "broken.jsonl", broken)])


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_plain_text_where_there_is_no_terminal(tmp_path, capsys):
    path = write_lines(tmp_path / "t.jsonl", row(task()))
    episodes = write_lines(tmp_path / "e.jsonl", {"id": "words/1", "messages": attempts()[1].messages, "reward": 0.0})
    arguments = ["inspect", str(path), "--tokenizer", "toybox", "--progress", "0.5", "--rollouts", str(episodes)]
    assert cli.main([*arguments, "--tool_call_weight", "1.0", "0.0"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "tool call w 0.50" in text
    assert "rollout 1: e 1, reward 0" in text
    assert "both: " in text


@pytest.mark.parametrize(
    ("arguments", "environment", "colour"),
    [([], {}, True), (["--no_color"], {}, False), ([], {"NO_COLOR": "1"}, False)],
)
def test_colour_in_a_terminal_unless_it_is_not_wanted(tmp_path, capsys, monkeypatch, arguments, environment, colour):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for name in ("NO_COLOR", *environment):
        monkeypatch.setenv(name, environment.get(name, ""))
    path = write_lines(tmp_path / "t.jsonl", row(task()))
    assert cli.main(["inspect", str(path), "--tokenizer", "toybox", *arguments]) == 0
    assert ("\x1b[" in capsys.readouterr().out) == colour


def test_tasks_of_an_environment_as_a_page(tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    options = ["--env", "toybox", "--env_options.train", "4", "--task", "train-2", "--html", str(page)]
    assert cli.main(["inspect", "--tokenizer", "toybox", *options]) == 0
    assert "train-2" in page.read_text(encoding="utf-8")
    assert str(page) in capsys.readouterr().out


def test_the_settings_of_a_run_are_taken_from_its_config(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("env: toybox\nenv_options: {train: 3}\ntool_call_weight: [0.5, 0.5]\nmax_steps: 3\n")
    path = write_lines(tmp_path / "t.jsonl", row(task()))
    assert cli.main(["inspect", str(path), "--tokenizer", "toybox", "--config", str(config)]) == 0
    assert "tool call w 0.50" in capsys.readouterr().out
    assert cli.main(["inspect", "--tokenizer", "toybox", "--config", str(config), "--task", "train-2"]) == 0
    assert "task train-2" in capsys.readouterr().out


WRONG = {
    "nothing to look at": ([], "give one thing to look at"),
    "no tokenizer": (["FILE"], "no tokenizer: give --tokenizer FOLDER"),
    "no such tokenizer": (["FILE", "--tokenizer", "./nowhere"], "no tokenizer folder ./nowhere"),
    "no such file": (["gone.jsonl", "--tokenizer", "toybox"], "there is no file gone.jsonl"),
    "a folder": ([".", "--tokenizer", "toybox"], "is a folder: give a JSONL file, or --run"),
    "no such task": (
        ["FILE", "--tokenizer", "toybox", "--task", "words/2"],
        "no task 'words/2': did you mean 'words/1'?",
    ),
    "progress": (["FILE", "--tokenizer", "toybox", "--progress", "1.5"], "progress=1.5 must lie in"),
    "limit": (["FILE", "--tokenizer", "toybox", "--limit", "0"], "limit is 0, set it to at least 1"),
    "setting": (["FILE", "--tokenizer", "toybox", "--progres", "1"], "did you mean 'progress'?"),
    "objective": (["FILE", "--tokenizer", "toybox", "--reasoning_anneal", "x"], "reasoning_anneal='x' is not one of"),
    "page over trace": (
        ["FILE", "--tokenizer", "toybox", "--html", "./FILE"],
        "is the file that is read",
    ),
    "no run": (["--run", "nowhere"], "nowhere is no run: it has no config.yaml"),
    "rollouts": (["FILE", "--tokenizer", "toybox", "--rollouts", "OTHER"], "no rollout belongs to a task shown"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "FILE", row(task()))
    write_lines(tmp_path / "OTHER", {"id": "else", "messages": trace()})
    arguments, message = WRONG[case]
    assert cli.main(["inspect", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_tokenizer_without_a_chat_template(tmp_path, capsys, tokenizer):
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(BARE), eos_token="a")
    plain.save_pretrained(tmp_path / "bare")
    path = write_lines(tmp_path / "t.jsonl", row(task()))
    assert cli.main(["inspect", str(path), "--tokenizer", str(tmp_path / "bare")]) == 2
    error = capsys.readouterr().err
    assert "cannot train with this tokenizer: its chat template is missing" in error
    assert error.count("\n") == 1


BARE = json.dumps(
    {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "b"},
    }
)  # fmt: skip
