"""Reads what can be looked at: JSONL of tasks, traces and episodes. A fault is a ValueError with file, line, field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pact.envs.base import Message, Task
from pact.envs.ftrl import expert_from_calls
from pact.messages import calls_of, check_messages, check_trace
from pact.rewards import failed
from pact.sandbox import ToolResult
from pact.tools import validate_tools
from pact.viewer import Attempt


def read_tasks(path: Path) -> list[Task]:
    """The tasks of a JSONL file, one object a line.

    A line has the prompt, ``messages`` or ``question`` (or ``prompt``, either of them), and the trace, ``expert``; or
    ``messages`` are a whole conversation, whose first assistant message begins the trace; or they, or ``calls`` with
    their observations, are a trace without a prompt, as in files of traces and of episodes. ``id``, ``tools`` (also as
    JSON text) and ``answer`` are optional. Lines with ``"complete": false`` are passed over, as the environment does.
    """
    tasks: list[Task] = []
    seen: dict[str, int] = {}
    for number, row in _rows(path):
        if row.get("complete") is False:
            continue
        place = f"{path}, line {number}"
        task = _task(place, number, row)
        if task.id in seen:
            raise ValueError(f"{place}, field id: {task.id!r} is also the id of line {seen[task.id]}; make ids unique")
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
            if row["messages"]:
                _checked(check_messages, f"{place}, field messages", row["messages"], "rollout")
            found = attempts.setdefault(row["id"], [])
            name = f"{path.stem} {sum(a.name.startswith(path.stem + ' ') for a in found) + 1}"
            found.append(Attempt(name, row["messages"], None if reward is None else float(reward)))
    return attempts


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of each line that is not blank."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}: give JSONL, one task or episode a line") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder: give a JSONL file, or --run {path} for the folder of a run") from None
    except UnicodeDecodeError as error:
        place = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {place}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    empty = True
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error}); write one JSON object a line") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: {type(row).__name__} where a JSON object is needed")
        empty = False
        yield number, row
    if empty:
        raise ValueError(f"{path} holds no lines: give JSONL, one task or episode a line")


def _task(place: str, number: int, row: dict[str, Any]) -> Task:
    name = row.get("id", f"ftrl/{row['row']}" if isinstance(row.get("row"), int) else f"line {number}")
    if not isinstance(name, str | int):
        raise ValueError(f"{place}, field id: {_kind(row, 'id')}; give text")
    tools = _tools(place, row)
    prompt, trace = _conversation(place, row)
    if prompt:
        _checked(check_messages, f"{place}, field messages", prompt, "prompt")
        if prompt[-1].get("role") != "user":
            raise ValueError(f"{place}, field messages: a prompt ends with a user message, this one does not")
    if trace is not None:
        field = next(field for field in ("expert", "messages", "calls") if row.get(field) is not None)
        _checked(check_trace, f"{place}, field {field}", trace)
    if not prompt and trace is None:
        raise ValueError(f"{place}, field messages: missing; give messages or question, and expert or calls")
    return Task(str(name), prompt, tools, expert=trace)


def _conversation(place: str, row: dict[str, Any]) -> tuple[list[Message], list[Message] | None]:
    """The prompt (empty: there is none) and the trace (None: there is none) of one line."""
    messages = None
    for field in ("messages", "prompt", "question"):
        value = row.get(field)
        if isinstance(value, str) and field != "messages":
            value = [{"role": "user", "content": value}]
        if value is not None and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
            raise ValueError(f"{place}, field {field}: {_kind(row, field)}; give a list of messages")
        messages = messages if messages is not None else value
    messages = messages or []
    expert = row.get("expert")
    if expert is not None:
        if not isinstance(expert, list) or not all(isinstance(item, dict) for item in expert):
            raise ValueError(f"{place}, field expert: {_kind(row, 'expert')}; give the list of the trace's messages")
        return messages, expert
    if row.get("calls") is not None:
        return messages, _from_calls(f"{place}, field calls", row)
    turn = next((i for i, message in enumerate(messages) if message.get("role") == "assistant"), len(messages))
    return messages[:turn], messages[turn:] or None


def _from_calls(place: str, row: dict[str, Any]) -> list[Message]:
    """The trace of an FTRL line of calls, as the environment makes it."""
    calls = row["calls"]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls) or not calls:
        raise ValueError(f"{place}: {_kind(row, 'calls')}; give a list of {{name, arguments, observation}}")
    for number, call in enumerate(calls):
        if not isinstance(call.get("observation"), str):
            raise ValueError(
                f"{place}: call {number} has no observation as text; add it, or run the tools with --env ftrl --data "
                "ITEMS --traces FILE --task ftrl/ROW"
            )
    parsed = [calls_of_one(f"{place}: call {number}", call) for number, call in enumerate(calls)]
    results = [ToolResult(not failed(call["observation"]), call["observation"]) for call in calls]
    answer = row.get("answer")
    trace = expert_from_calls(parsed, results, answer if isinstance(answer, str) else "")
    return trace if isinstance(answer, str) and answer.strip() else trace[:-1]


def calls_of_one(place: str, call: dict[str, Any]) -> dict[str, Any]:
    """A call with its arguments parsed, and its observation and reasoning."""
    given = {**call, "arguments": call.get("arguments", call.get("parameters", {}))}
    [parsed] = _checked(calls_of, place, {"role": "assistant", "tool_calls": [given]})
    return {**given, **parsed}


def _tools(place: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    tools = row.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}, field tools: not valid JSON ({error})") from None
    if not isinstance(tools, list):
        raise ValueError(f"{place}, field tools: {type(tools).__name__}; give a list of function schemas")
    _checked(validate_tools, f"{place}, field tools", tools)
    return tools


def _checked(check: Any, place: str, *arguments: Any) -> Any:
    try:
        return check(*arguments)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _kind(row: dict[str, Any], field: str) -> str:
    return "missing" if row.get(field) is None else f"{type(row[field]).__name__} {json.dumps(row[field])[:60]}"
