"""`report.html` of a run: curves, what changed since its start, episodes beside the expert. It evaluates nothing."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from pact.envs.base import Message, Task
from pact.evaluate import TOTAL, EpisodeRecord, counted, differences, load_records, tabulate
from pact.messages import calls_of
from pact.report_curves import draw_panels
from pact.reporting import DRAW_SECONDS, METRICS_FILE, read_metrics
from pact.viewer_page import page, write_page

logger = logging.getLogger(__name__)

CONFIG_FILE, REPORT_FILE = "config.yaml", "report.html"
EVAL_START, EVAL_FINAL = "eval_start.jsonl", "eval_final.jsonl"
MOST_FLIPS = 200  # tasks named in a list of those that changed
_STAGES = {"generate": "rollouts", "logprob": "log-probs", "train": "update"}  # metrics seconds/* of a step
SAMPLES = {"better": 3, "worse": 3, "same": 4}  # tasks shown message by message


@dataclass(frozen=True)
class Comparison:
    """A run's start and end on the same tasks. ``change`` is in the order of the tasks."""

    before: list[EpisodeRecord]
    after: list[EpisodeRecord]
    change: list[EpisodeRecord]

    @classmethod
    def of(cls, before: list[EpisodeRecord], after: list[EpisodeRecord]) -> Comparison:
        """Raises ValueError when the two are not of the same tasks."""
        return cls(counted(before), counted(after), differences(before, after))

    def ids(self, kind: str) -> list[str]:
        """Tasks whose reward is "better", "worse" or the "same"; the largest change first."""
        sign = {"better": 1, "worse": -1, "same": 0}[kind]
        chosen = [record for record in self.change if (record.reward > 0) - (record.reward < 0) == sign]
        return [record.id for record in sorted(chosen, key=lambda record: -abs(record.reward))]


class ReportWriter(TrainerCallback):
    """Writes the report at saves, at most once a minute. A report that fails is a warning: it must not end a run."""

    def __init__(self, run_folder: Path, tasks: Sequence[Task] | None) -> None:
        self._folder, self._tasks = run_folder, tasks
        self._written = -math.inf

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or time.monotonic() - self._written < DRAW_SECONDS:
            return
        self._written = time.monotonic()
        report_or_warn(self._folder, self._tasks or [])


def report_or_warn(run_folder: Path, tasks: Sequence[Task]) -> None:
    """`write_report` for the end and the middle of a run, which no picture is worth: any failure is a warning."""
    try:
        write_report(run_folder, tasks)
    except Exception as error:
        logger.warning(f"no report was written: {type(error).__name__}: {error}")


def write_report(run_folder: Path, tasks: Sequence[Task]) -> Path:
    """Write ``<run_folder>/report.html`` from what lies there, finished or not, and return its path.

    ``tasks``: those that the run is evaluated on, for questions and expert traces. Raises ValueError for a folder that
    is no run's and for evaluations of different tasks.
    """
    config = run_folder / CONFIG_FILE
    if not config.is_file():
        raise ValueError(f"{run_folder} is no run: it has no {CONFIG_FILE}; give --run runs/NAME")
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    metrics = read_metrics(run_folder / METRICS_FILE)
    before, after = (
        load_records(run_folder / name) if (run_folder / name).is_file() else None for name in (EVAL_START, EVAL_FINAL)
    )
    comparison = Comparison.of(before, after) if before and after else None
    start = "warm start" if settings.get("warm_start_steps") else "start"
    panels, name = draw_panels(metrics), run_folder.resolve().name
    text = page(
        "report.html",
        "report.js",
        title=f"pact train: {name}",
        name=name,
        about=_about(settings),
        start=start,
        facts=[*_rewards(before, comparison, start), *_costs(metrics)],
        evaluated=bool(before),
        changes=None if comparison is None else _changes(comparison),
        most_flips=MOST_FLIPS,
        panels=panels,
        samples=_samples(tasks, before, comparison, start),
        settings=[(key, value if isinstance(value, str) else json.dumps(value)) for key, value in settings.items()],
        data=[panel["hover"] for panel in panels],
    )
    return write_page(run_folder / REPORT_FILE, text)


def _about(settings: Mapping[str, Any]) -> str:
    named = ("anchor_q", "sft_coef", "advantage", "learning_rate")
    shown = [f"model {settings.get('model')}", f"environment {settings.get('env')}"]
    return " · ".join([*shown, *(f"{name} {settings[name]}" for name in named if name in settings)])


def _rewards(
    before: list[EpisodeRecord] | None, comparison: Comparison | None, start: str
) -> Iterator[tuple[str, str, str]]:
    """(what, value, remark) of the rewards at the run's start and end."""
    if before:
        reward = tabulate(before)[TOTAL]["reward"]
        yield f"reward after the {start}", f"{reward.mean:.3f}", f"on {reward.n} tasks"
    if comparison:
        change = tabulate(comparison.change)[TOTAL]["reward"]
        yield "reward at the end", f"{tabulate(comparison.after)[TOTAL]['reward'].mean:.3f}", ""
        yield "change", f"{change.mean:+.3f}", f"95%: {change.lower:+.3f} to {change.upper:+.3f}"


def _costs(metrics: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """(what, value, remark) of steps, time and tokens."""
    warm = max((record["step"] for record in metrics if record["phase"] == "warm_start"), default=0)
    training = [record for record in metrics if record["phase"] == "train"]
    steps = max((record["step"] for record in training), default=0)
    yield "optimiser steps", f"{steps:,}", f"after {warm:,} of warm start" if warm else ""
    spent = [
        sum(record.get(f"seconds/{what}", 0.0) for what in _STAGES) for record in training if "seconds/train" in record
    ]
    if spent:
        yield "seconds a step", f"{sum(spent) / len(spent):.2f}", ", ".join(_STAGES.values())
    dense, unique = (sum(record.get(f"tokens/{kind}", 0.0) for record in training) for kind in ("dense", "unique"))
    if dense:
        yield "tokens computed", f"{unique / dense:.0%}", "of what separate sequences take"


def _changes(comparison: Comparison) -> dict[str, Any]:
    """Every metric before and after with the paired difference, by group, and the tasks whose reward flipped."""
    before, after, change = (tabulate(records) for records in (comparison.before, comparison.after, comparison.change))
    rows = [
        {
            "group": group,
            "metric": metric,
            "before": before[group][metric].mean,
            "after": after[group][metric].mean,
            "change": estimate,
            "sign": "" if metric != "reward" else "good" if estimate.lower > 0 else "bad" if estimate.upper < 0 else "",
        }
        for group in (change if len(change) > 2 else [TOTAL])  # one group is the total
        for metric, estimate in change[group].items()
    ]
    first = {record.id: record for record in comparison.before}
    last = {record.id: record for record in comparison.after}
    flips = {
        kind: [{"id": task, "before": first[task], "after": last[task]} for task in comparison.ids(kind)]
        for kind in SAMPLES
    }
    return {"rows": rows, "flips": flips}


def _samples(
    tasks: Sequence[Task], before: list[EpisodeRecord] | None, comparison: Comparison | None, start: str
) -> list[dict[str, Any]]:
    """Tasks that got better, worse and stayed, each with the expert trace and the episodes of start and end."""
    by_id = {task.id: task for task in tasks}
    episodes = {f"after the {start}": {record.id: record for record in before or []}}
    chosen = [("", record.id) for record in (before or [])[: SAMPLES["same"]]]
    if comparison:
        episodes["at the end"] = {record.id: record for record in comparison.after}
        chosen = [(kind, name) for kind, most in SAMPLES.items() for name in comparison.ids(kind)[:most]]
    return [
        _sample(kind, by_id.get(name), {title: records[name] for title, records in episodes.items()})
        for kind, name in chosen
    ]


def _sample(kind: str, task: Task | None, episodes: Mapping[str, EpisodeRecord]) -> dict[str, Any]:
    sides: list[dict[str, Any]] = []
    if task is not None:
        note = "" if task.expert else "The task has none."
        sides.append({"title": "expert trace", "note": note, "blocks": list(_blocks(task.expert or []))})
    for title, record in episodes.items():
        note = f"reward {record.reward:.4g}, {record.turns} turns, ended by {record.stop_reason}"
        if record.messages is None:
            note += "; its messages were not kept"
        sides.append({"title": title, "note": note, "blocks": list(_blocks(record.messages or []))})
    asked = (
        [str(message.get("content") or "") for message in task.messages if message["role"] == "user"] if task else []
    )
    return {
        "kind": kind,
        "name": next(iter(episodes.values())).id,
        "rewards": " → ".join(f"{record.reward:.4g}" for record in episodes.values()),
        "question": "\n\n".join(asked) if task else None,
        "tools": ", ".join(str((tool.get("function") or tool).get("name")) for tool in task.tools) if task else "",
        "sides": sides,
    }


def _blocks(messages: Sequence[Message]) -> Iterator[dict[str, str]]:
    """The messages as labelled blocks by component."""
    for message in messages:
        content = str(message.get("content") or "")
        if message["role"] != "assistant":
            kind = "observation" if message["role"] == "tool" else "prompt"
            yield {
                "component": kind,
                "label": f"{message['role']} {message.get('name') or ''}".strip(),
                "text": content,
            }
            continue
        remark = "" if message.get("supervised", True) else ", not supervised"
        remark += ", cut at a limit" if message.get("cut") else ""
        if message.get("reasoning_content"):
            yield {"component": "reasoning", "label": f"reasoning{remark}", "text": str(message["reasoning_content"])}
        if content:
            yield {"component": "answer", "label": f"answer{remark}", "text": content}
        for call in calls_of(message):
            text = f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})"
            yield {"component": "tool_call", "label": f"tool call{remark}", "text": text}
