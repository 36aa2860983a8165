"""Own tasks and tools: a JSONL file and Python functions become an environment.

The functions run in this process, with all its rights and no time limit, because the user wrote them. Code of others
belongs into ``pact.sandbox``, as in ``pact.envs.ftrl``.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from pact.envs import toybox_text
from pact.envs.base import Message, Score, Task, ToolSchema
from pact.envs.items import read_jsonl
from pact.envs.own_tasks import FIELDS, FieldError, read_line, with_tools
from pact.own_reward import run_reward
from pact.rewards import answer_match

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

__all__ = ["Tool", "ToolEnvironment", "ToolEpisode", "final_answer", "tool_schema"]

Function = Callable[..., Any]
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


@dataclass(frozen=True)
class Tool:
    """A Python function and the schema made of it."""

    function: Function
    schema: ToolSchema

    def call(self, arguments: dict[str, Any]) -> str:
        """What it returns: text as it is, all else as JSON. Any failure is a text ``error: REASON``."""
        problem = self.problem(arguments)
        if problem:
            return f"error: {problem}"
        try:
            result = self.function(**copy.deepcopy(arguments))  # what the policy wrote stays as it was
            return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, GeneratorExit, CancelledError: not ours to obey
            return f"error: {type(error).__name__}{_told(error)}"

    def problem(self, arguments: dict[str, Any]) -> str | None:
        """Why it cannot be called with ``arguments``; None when it can. Quotes nothing of them: an error that repeats
        what the policy wrote could pass for a result."""
        parameters = self.schema["function"]["parameters"]
        known = parameters["properties"]
        for name in parameters.get("required", ()):
            if name not in arguments:
                return f"argument {name} is missing"
        if arguments.keys() - known.keys():
            return f"there is no such argument; it takes {', '.join(known) or 'none'}"
        problems = (_value_problem(name, known[name], value) for name, value in arguments.items())
        return next((problem for problem in problems if problem), None)


def _told(error: BaseException) -> str:
    """``: MESSAGE`` of an exception, or nothing where making it fails too."""
    try:
        return f": {error}"
    except Exception:
        return ""


def _value_problem(name: str, schema: dict[str, Any], value: Any) -> str | None:
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if (value is None and schema.get("nullable")) or not types:
        return None
    fits = any(isinstance(value, _JSON_TYPES[kind]) for kind in types)
    if not fits or (isinstance(value, bool) and "boolean" not in types):
        return f"argument {name} must be of type {' or '.join(types)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"argument {name} must be one of {', '.join(map(str, schema['enum']))}"
    return None


class ToolEnvironment:
    """An environment over one JSONL file and Python functions. Subclass it, set ``tools``, and train with
    ``pact train --env FILE.py:NAME --data FILE.jsonl``.

    ``tools``: the functions that the policy may call. A schema is made of type hints and docstring (Google style, one
    line an argument under ``Args:``; ``transformers.utils.get_json_schema``). A call with wrong arguments and one that
    raises are answered with a text ``error: REASON``; what a function returns is shown as it is when it is text, else
    as JSON.
    ``system``: first message of prompts that have no system message.
    ``workers``: episodes whose calls may run at once, in threads; the functions must then be safe for that.

    Override ``functions`` for tools with a state of their own in each episode, and ``reward`` for another reward than
    the right final answer.

    Args:
        path: the JSONL file; docs/data_format.md has its fields. All lines are checked at once.

    Raises:
        ValueError: ``FILE, line N, field X: what is wrong; what to write``, or a function without schema.
    """

    tools: ClassVar[Sequence[Function]] = ()
    system: ClassVar[str | None] = None
    workers: int = 1

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._schemas: WeakKeyDictionary[Any, ToolSchema] = WeakKeyDictionary()  # functions may be of one episode
        self._tasks: dict[str, list[Task]] = {}
        seen: dict[str, int] = {}
        further: set[str] = set()
        for number, row in read_jsonl(self.path):
            try:
                line = read_line(number, row, self.system)
                tools = self._described(line.task)
                schemas = {name: tool.schema for name, tool in tools.items()}
                task = with_tools(line, schemas, {name: tool.problem for name, tool in tools.items()})
                if task.id in seen:
                    raise FieldError("id", f"line {seen[task.id]} has the id {task.id!r} too; give each line its own")
                if task.answer is None and type(self).reward is ToolEnvironment.reward:
                    raise FieldError(
                        "answer",
                        "it is missing, and there is no expert to take it from; write the final answer, or "
                        "give your environment a method reward",
                    )
            except FieldError as error:
                raise ValueError(f"{self.path}, line {number}, field {error.field}: {error}") from None
            seen[task.id] = number
            further |= task.data.keys()
            self._tasks.setdefault(line.split, []).append(task)
        if not seen:
            raise ValueError(f"{self.path} is empty: write one JSON object a line, with {', '.join(FIELDS)}")
        self._log(further)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the file, in order of appearance; lines without one are "train"."""
        return tuple(self._tasks)

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of ``split`` in file order."""
        if split not in self._tasks:
            raise ValueError(
                f"{self.path} has no split {split!r}, only {', '.join(self._tasks)}: choose one of them, or write "
                f'"split": "{split}" in some lines'
            )
        return self._tasks[split]

    def functions(self, task: Task) -> Sequence[Function]:
        """The functions of one episode of ``task``, asked for at its start; override it to give them a state.

        Names and signatures make the schemas, so those of a task must always be the same. Further fields of its line
        are in ``task.data``.
        """
        return self.tools

    def reward(self, task: Task, messages: list[Message]) -> float | tuple[float, Sequence[float]]:
        """What an episode is worth: 1 for the right final answer (``pact.rewards.answer_match``), else 0.

        Args:
            task: without its expert trace.
            messages: what followed the prompt: assistant and tool messages.

        Returns:
            The reward, or it and one reward for each assistant message. Alone it counts for the last one.
        """
        return answer_match(final_answer(messages), task.answer or "")

    def start(self, task: Task) -> ToolEpisode:
        """A fresh attempt at ``task``."""
        offered = {schema["function"]["name"] for schema in task.tools}
        tools = {name: tool for name, tool in self._described(task).items() if name in offered}
        return ToolEpisode(task, tools, self.reward)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of new small models (``--model toybox``): byte-level, so it takes any text."""
        return toybox_text.build_tokenizer()

    def _described(self, task: Task) -> dict[str, Tool]:
        tools: dict[str, Tool] = {}
        for function in self.functions(task):
            key = getattr(function, "__func__", function)  # of a method: one a class, not one an object
            if key not in self._schemas:
                self._schemas[key] = tool_schema(function)
            name = self._schemas[key]["function"]["name"]
            if name in tools:
                raise ValueError(f"{type(self).__name__} has two tools called {name}: rename one")
            tools[name] = Tool(function, self._schemas[key])
        return tools

    def _log(self, further: set[str]) -> None:
        counts = ", ".join(f"{split} {len(tasks)}" for split, tasks in self._tasks.items())
        traced = sum(task.expert is not None for tasks in self._tasks.values() for task in tasks)
        extra = f"; further fields, in Task.data: {', '.join(sorted(further))}" if further else ""
        logger.info(f"{self.path}: {counts} tasks, {traced} with a trace{extra}")


class ToolEpisode:
    """One attempt with Python functions as tools; ``reward`` is ``ToolEnvironment.reward``."""

    def __init__(self, task: Task, tools: Mapping[str, Tool], reward: Callable[[Task, list[Message]], Any]) -> None:
        self._task, self._tools, self._reward = task, tools, reward

    @property
    def tools(self) -> list[ToolSchema]:
        return self._task.tools

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """What the function returns, as text; any failure is a text ``error: REASON``."""
        if name not in self._tools:
            return f"error: there is no tool of this name; the tools are {', '.join(self._tools) or 'none'}"
        return self._tools[name].call(arguments)

    def user_turn(self) -> list[Message] | None:
        """None: the episode ends with the assistant's answer."""
        return None

    def score(self, messages: list[Message]) -> Score:
        """The reward, and the metric ``calls``: how many were made."""
        turns = sum(message["role"] == "assistant" for message in messages)
        place = f"the environment's reward, task {self._task.id!r}"
        reward, turn_rewards = run_reward(place, turns, lambda: self._reward(self._task, messages))
        calls = sum(len(message.get("tool_calls") or ()) for message in messages)
        return Score(reward, turn_rewards, {"calls": float(calls)})

    def close(self) -> None:
        """Nothing to release."""


def final_answer(messages: Sequence[Message]) -> str:
    """Text of the last message where it is a whole turn of the assistant that calls nothing, else "".

    >>> final_answer([{"role": "assistant", "content": "It is 42."}])
    'It is 42.'
    >>> final_answer([{"role": "tool", "name": "add", "content": "42"}])
    ''
    """
    last = messages[-1] if messages else {}
    ended = last.get("role") == "assistant" and not last.get("tool_calls") and not last.get("cut")
    return (last.get("content") or "") if ended else ""


def tool_schema(function: Function) -> ToolSchema:
    """The schema of a Python function, from its type hints and docstring. Raises ValueError for one that has none.

    >>> def add(a: int, b: int = 0) -> int:
    ...     '''Add two integers.
    ...
    ...     Args:
    ...         a: one of them
    ...         b: the other one
    ...     '''
    ...     return a + b
    >>> tool_schema(add)["function"]["parameters"]["required"]
    ['a']
    """
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    name = getattr(function, "__name__", None)
    if name is None or not callable(function):
        raise ValueError(f"a tool is a Python function, not {function!r}: give functions or methods")
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"tool {name} is async: write it as a plain function")
    if inspect.isclass(function) or inspect.isgeneratorfunction(function):
        kind = "class" if inspect.isclass(function) else "generator"
        raise ValueError(f"tool {name} is a {kind}: write a plain function that returns the result")
    try:
        kinds = [item.kind for item in inspect.signature(function).parameters.values()]
    except ValueError as error:
        raise ValueError(f"tool {name} has no signature ({error}): wrap it in a function of yours") from None
    if any(kind not in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY) for kind in kinds):
        raise ValueError(f"tool {name} takes arguments without a name (*, ** or /): name each of them")
    try:
        schema = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException, NameError, TypeError) as error:
        raise ValueError(
            f"tool {name} has no schema ({error}): give it a docstring, and each argument a type hint and a line "
            "'NAME: what it is' under 'Args:'"
        ) from None
    schema["function"].pop("return", None)  # templates do not show it
    return schema
