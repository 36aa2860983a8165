"""One line of the user's JSONL -> one task, every field checked (docs/data_format.md). Runs no tool."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pact.envs.base import Message, Task, ToolSchema
from pact.envs.items import Row
from pact.messages import calls_of, check_messages, check_trace
from pact.tools import validate_tools

PROMPTS = ("messages", "prompt", "question")
FIELDS = ("id", *PROMPTS, "expert", "answer", "split", "tools")

Checks = Mapping[str, Callable[[dict[str, Any]], str | None]]  # tool name -> what is wrong with its arguments


class FieldError(ValueError):
    """What is wrong with one field of a line, and what to write there."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Line:
    """A task as its line has it, without tools, and the split it belongs to."""

    task: Task
    split: str
    tools: list[str | ToolSchema] | None


def read_line(number: int, row: Row, system: str | None) -> Line:
    """The task of line ``number``. ``system``: first message of prompts that have no system message of their own.

    Raises FieldError for what cannot be used. Tools are not known yet: see ``with_tools``.
    """
    messages, expert = _conversation(row)
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    answer = _text(row, "answer", numbers=True)
    if expert is not None and answer is None:
        answer = expert[-1]["content"].strip()
    task = Task(
        id=_text(row, "id", numbers=True) or f"line-{number}",
        messages=messages,
        tools=[],
        expert=expert,
        data={key: value for key, value in row.items() if key not in FIELDS},
        answer=answer,
    )
    return Line(task, _text(row, "split") or "train", _tools(row))


def with_tools(line: Line, known: Mapping[str, ToolSchema], checks: Checks) -> Task:
    """The task with its schemas: all ``known`` ones, or those its line names or describes itself.

    Raises FieldError for a tool that no function stands for, and a supervised call of the trace that would fail.
    """
    schemas = [_schema(entry, known) for entry in line.tools] if line.tools is not None else list(known.values())
    names = [schema["function"]["name"] for schema in schemas]
    if len(set(names)) < len(names):
        raise FieldError("tools", f"two tools are called {_first_double(names)}; name each tool once")
    for place, message in enumerate(line.task.expert or ()):
        if message["role"] != "assistant" or not message.get("supervised", True):
            continue
        for call in calls_of(message):
            _check_call(f"trace message {place}", call, names, checks)
    return replace(line.task, tools=schemas)


def _check_call(where: str, call: dict[str, Any], names: Collection[str], checks: Checks) -> None:
    mend = 'correct it, or mark the message "supervised": false if the trace recovers from it'
    if call["name"] not in names:
        raise FieldError(
            "expert", f"{where} calls {call['name']!r}, and the tools are {', '.join(names) or 'none'}; {mend}"
        )
    problem = checks[call["name"]](call["arguments"])
    if problem:
        raise FieldError("expert", f"{where} calls {call['name']} wrongly: {problem}; {mend}")


def _conversation(row: Row) -> tuple[list[Message], list[Message] | None]:
    """Prompt and trace. ``messages`` may hold both: what follows the last user message is then the trace."""
    given = [field for field in PROMPTS if row.get(field) is not None]
    if len(given) != 1:
        wrong = f"{' and '.join(given)} are both there" if given else "it is missing"
        raise FieldError(given[-1] if given else "messages", f"{wrong}; write one of {', '.join(PROMPTS)}")
    [field] = given
    value = row[field]
    if not isinstance(value, {"messages": list, "prompt": str | list, "question": str}[field]):
        kinds = {"messages": "a list of messages", "prompt": "text or a list of messages", "question": "text"}
        raise FieldError(field, f"it is {type(value).__name__}; write {kinds[field]}")
    if isinstance(value, str):
        if not value.strip():
            raise FieldError(field, "it is empty; write what the user asks")
        value = [{"role": "user", "content": value}]
    messages, expert, of_expert = value, row.get("expert"), "expert"
    if expert is None and field == "messages":
        users = [place for place, message in enumerate(value) if _role(message) == "user"]
        if users and _role(value[-1]) != "user":
            messages, expert, of_expert = value[: users[-1] + 1], value[users[-1] + 1 :], "messages"
    _checked(field, check_messages, messages, "prompt")
    if messages[-1]["role"] != "user":
        raise FieldError(
            field, f"it ends with role {messages[-1]['role']}; the last message of a prompt is the user's question"
        )
    return messages, None if expert is None else _trace(of_expert, expert)


def _trace(field: str, expert: Any) -> list[Message]:
    if not isinstance(expert, list):
        raise FieldError(field, f"it is {type(expert).__name__}; write the list of messages that follow the prompt")
    _checked(field, check_trace, expert)
    for place, message in enumerate(expert):
        if not isinstance(message.get("supervised", True), bool):
            raise FieldError(field, f"trace message {place}: supervised must be true or false")
        for entry in message.get("tool_calls") or ():
            call = entry.get("function") or entry
            if "arguments" not in call:
                raise FieldError(
                    field,
                    f"trace message {place}: the call of {call['name']} has no arguments; write an object, "
                    "{} if it takes none",
                )
    last = expert[-1]
    if last["role"] != "assistant" or last.get("tool_calls") or not (last.get("content") or "").strip():
        ends = "a tool call" if last.get("tool_calls") else f"role {last['role']}, without an answer"
        raise FieldError(field, f"it ends with {ends}; end it with the assistant's answer as content")
    return expert


def _checked(field: str, check: Callable[..., Any], *arguments: Any) -> None:
    try:
        check(*arguments)
    except ValueError as error:
        raise FieldError(field, str(error)) from None


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _text(row: Row, field: str, numbers: bool = False) -> str | None:
    value = row.get(field)
    if value is None:
        return None
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        kind, kinds = type(value).__name__, "text or a number" if numbers else "text"
        raise FieldError(field, f"it is {'empty' if kind == 'str' else kind}; write {kinds}, or leave it out")
    return value


def _tools(row: Row) -> list[str | ToolSchema] | None:
    entries = row.get("tools")
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise FieldError("tools", f"it is {type(entries).__name__}; write a list of tool names or of schemas")
    described = [entry for entry in entries if not isinstance(entry, str)]
    _checked("tools", validate_tools, described)
    return entries


def _schema(entry: str | ToolSchema, known: Mapping[str, ToolSchema]) -> ToolSchema:
    name = entry if isinstance(entry, str) else entry["function"]["name"]
    if name not in known:
        raise FieldError(
            "tools", f"no function is called {name}; the environment has {', '.join(known) or 'none'}: add it there"
        )
    return known[name] if isinstance(entry, str) else entry


def _first_double(names: list[str]) -> str:
    return next(name for place, name in enumerate(names) if name in names[:place])
