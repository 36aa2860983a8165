"""Reads what can be looked at: JSONL of tasks, traces and episodes. A fault is a ValueError with file, line, field."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pact.envs.base import Message, Task
from pact.envs.ftrl import expert_from_calls
from pact.envs.items import read_jsonl
from pact.envs.own_tasks import FieldError, read_line
from pact.messages import calls_of, check_messages, check_trace
from pact.rewards import failed
from pact.sandbox import ToolResult
from pact.viewer import Attempt


def read_tasks(path: Path) -> list[Task]:
    """The tasks of a JSONL file, one object a line.

    A line is a task as in docs/data_format.md (tools as schemas, also as JSON text); or a trace without its prompt, as
    in files of traces and of episodes: ``messages`` that begin with an assistant turn, or ``calls`` with their
    observations. Lines with ``"complete": false`` are passed over, as the environment does.
    """
    tasks: list[Task] = []
    seen: dict[str, int] = {}
    for number, row in _rows(path):
        if row.get("complete") is False:
            continue
        try:
            task = _trace_alone(number, row) or _task(number, row)
            if task.id in seen:
                raise FieldError("id", f"{task.id!r} is also the id of line {seen[task.id]}; make ids unique")
        except FieldError as error:
            raise ValueError(f"{path}, line {number}, field {error.field}: {error}") from None
        seen[task.id] = number
        tasks.append(task)
    if not tasks:
        raise ValueError(f"{path} holds no complete trace: every line says complete false")
    return tasks


def read_attempts(paths: Sequence[Path]) -> dict[str, list[Attempt]]:
    """Task id -> rollouts, from records of evaluations (episodes.jsonl, eval_final.jsonl) or lines of ``id``,
    ``messages`` (those after the prompt) and, where known, ``reward``. Several lines of an id are its rollouts."""
    attempts: dict[str, list[Attempt]] = {}
    for path in paths:
        for number, row in _rows(path):
            place = f"{path}, line {number}"
            if not isinstance(row.get("id"), str):
                raise ValueError(f"{place}, field id: {_kind(row, 'id')}; give the id of the rollout's task as text")
            if not isinstance(row.get("messages"), list):
                raise ValueError(
                    f"{place}, field messages: {_kind(row, 'messages')}; give those after the prompt (records of older "
                    "versions have none: evaluate again)"
                )
            reward = row.get("reward")
            if reward is not None and (not isinstance(reward, int | float) or isinstance(reward, bool)):
                raise ValueError(f"{place}, field reward: {_kind(row, 'reward')}; give a number or leave it out")
            try:
                check_messages(row["messages"] or [{"role": "assistant"}], "rollout")
            except ValueError as error:
                raise ValueError(f"{place}, field messages: {error}") from None
            found = attempts.setdefault(row["id"], [])
            name = f"{path.stem} {sum(a.name.startswith(path.stem + ' ') for a in found) + 1}"
            found.append(Attempt(name, row["messages"], None if reward is None else float(reward)))
    return attempts


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(number, object) of each line that is not blank; at least one."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a JSONL file, or --run {path} for the folder of a run")
    rows = read_jsonl(path)
    if not rows:
        raise ValueError(f"{path} holds no lines: give JSONL, one task or episode a line")
    return rows


def _task(number: int, row: dict[str, Any]) -> Task:
    """A task with its prompt, as the environments read it."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            row = {**row, "tools": json.loads(tools)}
        except json.JSONDecodeError as error:
            raise FieldError("tools", f"it is not valid JSON ({error})") from None
    line = read_line(number, row, None)
    schemas = [entry for entry in line.tools or () if not isinstance(entry, str)]
    if len(schemas) < len(line.tools or ()):
        raise FieldError(
            "tools", "it names functions; take the task from --env FILE.py:NAME --data FILE, or write schemas"
        )
    return replace(line.task, tools=schemas)


def _trace_alone(number: int, row: dict[str, Any]) -> Task | None:
    """A trace without its prompt; None for a line that is no such thing."""
    trace: Any
    if row.get("calls") is not None:
        field, trace = "calls", _from_calls(row["calls"], row.get("answer"))
    else:
        field, trace = "messages", row.get("messages")
        first = trace[0] if isinstance(trace, list) and trace else None
        if not isinstance(first, dict) or first.get("role") != "assistant":
            return None
    try:
        check_trace(trace)
    except ValueError as error:
        raise FieldError(field, str(error)) from None
    name = row.get("id", f"ftrl/{row['row']}" if "row" in row else f"line-{number}")
    return Task(str(name), [], [], expert=trace)


def _from_calls(calls: Any, answer: Any) -> list[Message]:
    """The trace of an FTRL line of calls, as the environment makes it."""
    if not isinstance(calls, list) or not calls:
        raise FieldError("calls", "write a list of {name, arguments, observation}, at least one")
    parsed = []
    for number, call in enumerate(calls):
        if not isinstance(call, dict) or not isinstance(call.get("observation"), str):
            raise FieldError(
                "calls",
                f"call {number} has no observation as text; add it, or run the tools: --env ftrl --data ITEMS --traces "
                "FILE --task ftrl/ROW",
            )
        given = {**call, "arguments": call.get("arguments", call.get("parameters", {}))}
        try:
            [made] = calls_of({"role": "assistant", "tool_calls": [given]})
        except ValueError as error:
            raise FieldError("calls", f"call {number}: {error}") from None
        parsed.append({**given, **made})
    results = [ToolResult(not failed(call["observation"]), call["observation"]) for call in calls]
    answered = isinstance(answer, str) and bool(answer.strip())
    trace = expert_from_calls(parsed, results, str(answer))
    return trace if answered else trace[:-1]


def _kind(row: dict[str, Any], field: str) -> str:
    return "missing" if row.get(field) is None else f"{type(row[field]).__name__} {json.dumps(row[field])[:60]}"
