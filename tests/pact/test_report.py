"""The report of a run: curves as they were logged, paired changes, episodes beside the expert, hostile text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import yaml
from viewer_setup import HOSTILE, hostile_task, task, trace

from pact import cli
from pact.evaluate import EpisodeRecord, save_records
from pact.report import SAMPLES, Comparison, ReportWriter, write_report
from pact.report_curves import PANELS, draw_panels, nice_ticks, running_mean, series, thinned


def record(name, reward, messages=None, group=None, **metrics):
    return EpisodeRecord(name, reward, {"success": reward, **metrics}, 2, "answer", group, messages=messages)


def lines(steps=80, warm=10):
    """metrics.jsonl of a run: a warm start, then training; one value is missing, one is null."""
    records = [
        {"phase": "warm_start", "step": s, "loss/sft": 5.0 / s, "logp/sft_reasoning": -5.0 / s}
        for s in range(1, warm + 1)
    ]
    for step in range(1, steps + 1):
        records.append(
            {
                "phase": "train", "step": step, "reward": step / steps, "loss/rl_prompt": 0.1 * (-1) ** step,
                "loss/rl_trace": 0.0 if step < 5 else 0.2, "loss/sft": 1.0 / step, "kl/prompt": 0.0, "kl/trace": 0.0,
                "logp/sft_answer": 0.0,
                "logp/sft_reasoning": -0.4, "logp/sft_tool_call": None if step == 3 else -0.2,
                "seconds/generate": 1.0, "seconds/train": 0.25, "tokens/dense": 400.0, "tokens/unique": 100.0,
            }
        )  # fmt: skip
    return [*records, {"phase": "train", "step": steps, "eval_reward": 0.75}]


@pytest.fixture
def run(tmp_path):
    """A finished run of six tasks, of which two got better and one worse."""
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"env": "toybox", "warm_start_steps": 10, "anchor_q": 0.4}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines()))
    before, after = [0.0, 0.0, 1.0, 1.0, 0.0, 0.5], [1.0, 0.25, 0.0, 1.0, 0.0, 0.5]
    for name, rewards in (("eval_start", before), ("eval_final", after)):
        episodes = [
            record(f"t{i}", reward, [{"role": "assistant", "content": f"{name} of t{i}"}], group=f"g{i % 2}")
            for i, reward in enumerate(rewards)
        ]
        save_records(episodes, folder / f"{name}.jsonl")
    return folder


class Words(HTMLParser):
    """The text of a page, without scripts and styles, and the elements and attributes it is made of."""

    def __init__(self, text):
        super().__init__()
        self.words, self.elements, self._skip = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._skip = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._skip = False

    def handle_data(self, data):
        self.words += [] if self._skip else data.split()

    @property
    def text(self):
        return " ".join(self.words)


def test_a_finished_run(run):
    path = write_report(run, [task(f"t{i}") for i in range(6)])
    assert path == run / "report.html"
    page = Words(path.read_text(encoding="utf-8"))
    for words in (
        "What changed since the warm start",
        "the reward of 2 better, 1 worse, 3 same.",
        "reward after the warm start 0.417 on 6 tasks",
        "reward at the end 0.458",
        "optimiser steps 80 after 10 of warm start",
        "seconds a step 1.25 rollouts, log-probs, update",
        "tokens computed 25%",
        "total success 0.4167 0.4583 +0.0417",
        "t0 reward 0 → 1 better",
        "eval_start of t0",
        "eval_final of t0",
        "I look it up.",
        'look_up({"word": "cot"})',
        "anchor_q 0.4",
    ):
        assert words in page.text, words
    assert {row for row in ("g0 reward", "g1 reward") if row in page.text} == {"g0 reward", "g1 reward"}
    titles = re.findall(r"<figcaption><b>([^<]*)</b>", path.read_text(encoding="utf-8"))
    assert titles == [
        "Reward",
        "RL loss",
        "Supervised loss",
        "Warm start",
        "Log-prob of the trace",
        "KL to the start",
        "Seconds",
    ]


def test_a_run_under_way_and_one_without_evaluation(run):
    (run / "eval_final.jsonl").unlink()
    text = Words(write_report(run, []).read_text(encoding="utf-8")).text
    assert "The run has no evaluation of its end yet." in text
    assert "t0 reward 0" in text
    (run / "eval_start.jsonl").unlink()
    (run / "metrics.jsonl").unlink()
    text = Words(write_report(run, []).read_text(encoding="utf-8")).text
    assert "The run has no evaluation (eval_tasks 0)." in text
    assert "Nothing has been logged yet." in text
    assert "There are no evaluation episodes to show." in text


def test_records_of_older_versions_have_no_messages(run):
    for name in ("eval_start", "eval_final"):
        save_records([record("t0", 0.0), record("t1", 1.0)], run / f"{name}.jsonl")
    text = Words(write_report(run, [task("t0")]).read_text(encoding="utf-8")).text
    assert text.count("its messages were not kept") == 4
    assert "the reward of 0 better, 0 worse, 2 same." in text


def test_evaluations_of_different_tasks_are_refused(run):
    save_records([record("t0", 0.0)], run / "eval_final.jsonl")
    with pytest.raises(ValueError, match="a paired comparison needs the same tasks: 6 before, 1 after"):
        write_report(run, [])


def test_no_run(tmp_path, run, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"is no run: it has no config.yaml; give --run runs/NAME"):
        write_report(tmp_path, [])
    assert cli.main(["inspect", "--run", str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out


def test_flips_and_samples_are_the_largest_changes_first():
    names = [f"t{i}" for i in range(8)]
    before = [record(name, 0.5) for name in names]
    after = [record(name, reward) for name, reward in zip(names, [0.6, 1.0, 0.5, 0.0, 0.4, 0.9, 0.5, 0.7])]
    comparison = Comparison.of(before, after)
    assert comparison.ids("better") == ["t1", "t5", "t7", "t0"]
    assert comparison.ids("worse") == ["t3", "t4"]
    assert comparison.ids("same") == ["t2", "t6"]


def test_hostile_text_is_text(run):
    """Task, tools, messages, groups, settings: nothing of them becomes an element, an attribute or a control."""
    mean = hostile_task()
    for name, reward in (("eval_start", 0.0), ("eval_final", 1.0)):
        said = [*trace(HOSTILE, HOSTILE), {"role": "user", "content": HOSTILE}]
        save_records([record(mean.id, reward, said, group=HOSTILE), record("t1", reward, said)], run / f"{name}.jsonl")
    (run / "config.yaml").write_text(yaml.safe_dump({"env": HOSTILE.replace("\ud800", ""), "data": "<b>"}))
    text = write_report(run, [mean]).read_text(encoding="utf-8")
    page = Words(text)
    assert not {tag for tag, _ in page.elements} & {"img", "b>", "a", "iframe", "object"}
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    assert "window.hacked=1" in page.text
    assert not set("\x1b\u202e\u2028\u200b\U000e0041\x9b\x00") & set(text)


def test_a_megabyte_is_folded_and_then_cut(run):
    """What stands behind the first characters is behind a fold, and there is an end to it."""
    said = [{"role": "assistant", "content": "word " * 400_000}]
    for name in ("eval_start", "eval_final"):
        save_records([record("t0", 0.0, said), record("t1", 0.0)], run / f"{name}.jsonl")
    text = write_report(run, [task("t0")]).read_text(encoding="utf-8")
    assert "1,980,000 more characters, 1,000,000 of them left out" in text
    assert len(text) < 2_200_000


# -- curves ----------------------------------------------------------------------------------------------------------


def test_series_are_the_logged_values_with_the_warm_start_left_of_zero():
    both = series(lines(), "logp/sft_reasoning")
    assert both[0] == (-9, -5.0)
    assert both[9:11] == [(0, -0.5), (1, -0.4)]
    assert len(both) == 90
    assert series(lines(), "loss/sft", "warm_start")[0] == (1, 5.0)
    assert [x for x, _ in series(lines(), "logp/sft_tool_call")][:4] == [1, 2, 4, 5]


def test_thinning_and_smoothing_keep_means():
    points = [(float(x), float(x % 10)) for x in range(5000)]
    few = thinned(points, 100)
    assert len(few) <= 101
    assert sum(y for _, y in few) / len(few) == pytest.approx(4.5, abs=0.1)
    assert [x for x, _ in few] == sorted(x for x, _ in few)
    assert thinned(points[:50], 100) == points[:50]
    line = [(float(x), 2.0 * x) for x in range(100)]
    assert [y for _, y in running_mean(line)[10:90]] == pytest.approx([y for _, y in line[10:90]])


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-3e-9, 2e-9), (0.0, 0.0), (5.0, 5.0), (-1e6, 3e7), (0.99, 1.01)]
)
def test_ticks_are_round_and_cover(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    steps = {round((b - a) / (ticks[1] - ticks[0]), 6) for a, b in pairwise(ticks)}
    assert steps == {1.0}
    assert all(len(f"{tick:.4g}") <= 10 for tick in ticks)
    if low < high:
        assert low - 1e-12 <= ticks[0]
        assert ticks[-1] <= high * (1 + 1e-9) + 1e-12


def test_a_panel_is_drawn_from_its_values():
    """Coordinates go back to values; curves of zeros give way to others; one point is a panel too."""
    panels = {panel["title"]: panel for panel in draw_panels(lines())}
    loss = panels["RL loss"]
    assert [key["label"] for key in loss["legend"]] == ["prompt-only", "trace-conditioned"]
    assert loss["hover"]["curves"][1] == [list(range(1, 81)), [0.0] * 4 + [0.2] * 76]
    assert [key["label"] for key in panels["KL to the start"]["legend"]] == ["prompt-only", "trace-conditioned"]
    assert [key["label"] for key in panels["Log-prob of the trace"]["legend"]] == ["reasoning", "tool call"]
    [raw, _, *_] = loss["lines"]
    xs = [float(x) for x in re.findall(r"[ML]([\d.]+) ", raw["path"])]
    assert xs == pytest.approx([44 + (x - 1) / 79 * 368 for x in range(1, 81)], abs=0.06)
    [single] = draw_panels([{"phase": "train", "step": 1, "reward": 0.5}])
    assert single["legend"][0]["last"] == "0.5"
    assert draw_panels([]) == []
    assert len({panel.title for panel in PANELS}) == len(PANELS)


def test_values_at_the_ends_of_floats_are_drawn():
    for values in ([5e-324, 1.0], [5e-324, 5e-324], [-1.7e308, 1.7e308], [1e-320, 2e-320]):
        records = [{"phase": "train", "step": step, "grad_norm": value} for step, value in enumerate(values, 1)]
        [panel] = draw_panels(records)
        assert "nan" not in str(panel)
        assert "inf" not in str(panel)


# -- at saves --------------------------------------------------------------------------------------------------------


def test_reports_at_saves_are_rare_and_never_end_a_run(run, monkeypatch, caplog):
    class State:
        is_world_process_zero = True

    written = []
    monkeypatch.setattr("pact.report.write_report", lambda folder, tasks: written.append(tasks))
    writer = ReportWriter(run, None)
    writer.on_save(None, State, None)
    writer.on_save(None, State, None)
    assert written == [[]]

    def full(folder, tasks):
        raise OSError("no space left on device")

    monkeypatch.setattr("pact.report.write_report", full)
    ReportWriter(run, None).on_save(None, State, None)
    assert "no report was written: OSError: no space left" in caplog.text
    assert set(SAMPLES) == {"better", "worse", "same"}
