"""FTRL (arXiv 2508.08791): questions answered with real tools, each a piece of Python that runs in the sandbox.

Reads the benchmark's items from Parquet or JSONL. It ships no data, and it never makes up reasoning for a trace.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from pact.envs.base import Message, Score, Task
from pact.envs.items import SourceEpisode, default_workers, json_value, read_jsonl, read_rows, run_source
from pact.messages import calls_of, check_messages, check_trace
from pact.rewards import answer_f1, failed, solve_metrics, strike
from pact.sandbox import Sandbox, ToolResult
from pact.tools import validate_tools

logger = logging.getLogger(__name__)

_REQUIRED = ("messages", "tools", "codes", "unsolved_set", "answer")
_JSON_TEXT = ("tools", "codes", "unsolved_set", "ground_truth")


@dataclass(frozen=True)
class FtrlItem:
    """What the policy does not see: ``codes`` (tool name -> Python source), ``unsolved`` (tool name -> expected
    answers) and the final ``answer``."""

    codes: dict[str, str]
    unsolved: dict[str, list[str]]
    answer: str


class Ftrl:
    """The environment over one file of FTRL items.

    A row has ``messages``, ``tools``, ``codes``, ``unsolved_set`` (the last three as JSON text) and ``answer``; it may
    have ``split`` (without that column every row is "test"), ``data_source`` (its scenario, the tasks' group) and
    ``ground_truth``. Task ids are ``ftrl/ROW``.

    Expert traces come from the ``ground_truth`` column of the training file (JSON text: a list of ``{"name",
    "parameters"}`` in order), or from a JSONL file ``traces`` with one object for each row of the data that has one:
    ``row`` and either ``calls`` (a list of ``{"name", "arguments"}``, with ``observation`` and ``reasoning`` where they
    are known) or ``messages`` (a whole trace); ``"complete": false`` leaves that row without a trace. Calls become a
    trace as ``expert_from_calls`` says; ``tasks`` executes them, once.

    Args:
        path: the .parquet or .jsonl file, or a dataset (see ``pact.envs.items.read_rows``).
        traces: a JSONL file as above; "ground_truth": that column, which must be there; None: that column if it is.
        timeout: wall-clock limit of one tool call, seconds.
        workers: tool calls that may run at once, from threads; None: the number of cores, at most 8.
        strict: a call that fails cannot strike an expected answer. The release lets it, and its error may quote the
            answer out of the call's own arguments: for training, not for published numbers.
        unsafe_no_isolation: run the tools without a sandbox (see ``pact.sandbox.Sandbox``).

    Raises:
        ValueError: a file, column or value that cannot be used; one line that says where and what to do.
        RuntimeError: the sandbox cannot start.
    """

    # Turns as PACT and MatchTIR evaluate (FTRL's own script: 20). The release bounds a turn, and a response by the
    # context alone.
    eval_limits: ClassVar[dict[str, int]] = {"max_turns": 10, "max_turn_tokens": 4096, "max_response_tokens": 1 << 20}

    def __init__(
        self,
        path: str | Path,
        *,
        traces: str | Path | None = None,
        timeout: float = 10.0,
        workers: int | None = None,
        strict: bool = False,
        unsafe_no_isolation: bool = False,
    ) -> None:
        self._timeout, self._strict = timeout, strict
        rows = read_rows(path, "ftrl", _REQUIRED, _JSON_TEXT)
        self.path = Path(path)
        self._tasks = [_task(self._place(index), index, row) for index, row in enumerate(rows)]
        self._traces = (
            self._ground_truth(rows, traces) if traces in (None, "ground_truth") else self._trace_file(traces)
        )
        self._rows_of: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            self._rows_of.setdefault(str(row.get("split", "test")), []).append(index)
        self._ready: dict[str, tuple[Task, ...]] = {}
        self.workers = workers or default_workers()
        self._sandbox = Sandbox(workers=self.workers, unsafe_no_isolation=unsafe_no_isolation)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of this file, in order of appearance."""
        return tuple(self._rows_of)

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of ``split`` in file order. The first time, traces given as calls are executed; an observation that
        such a trace records stays, with a warning where the tool now returns another one."""
        if split not in self._rows_of:
            raise ValueError(f"ftrl: {self.path} has no split {split!r}; it has: {', '.join(self._rows_of)}")
        if split not in self._ready:
            with ThreadPoolExecutor(self.workers) as pool:
                tasks, executed, differing = zip(*pool.map(self._with_expert, self._rows_of[split]))
            self._ready[split] = tasks
            places = [place for of_row in differing for place in of_row]
            if sum(executed):
                logger.info(f"ftrl: executed {sum(executed)} tool calls of the expert traces")
            if places:
                logger.warning(
                    f"ftrl: {len(places)} observations recorded in the traces are not what the tools return now, first "
                    f"{places[0]}: make the traces again, unless these tools are random by nature"
                )
        return self._ready[split]

    def start(self, task: Task) -> FtrlEpisode:
        """One attempt at ``task``."""

        def execute(name: str, arguments: dict[str, Any]) -> str:
            return self._execute(task.data, name, arguments).output

        return FtrlEpisode(task, execute, self._strict)

    def close(self) -> None:
        """End the sandbox's processes."""
        self._sandbox.close()

    def _place(self, index: int) -> str:
        return f"ftrl: {self.path}, row {index}"

    def _execute(self, item: FtrlItem, name: str, arguments: dict[str, Any]) -> ToolResult:
        return run_source(self._sandbox, item.codes, name, arguments, self._timeout)

    def _with_expert(self, index: int) -> tuple[Task, int, list[str]]:
        """The task of a row with its trace, the number of calls executed for it, and those that gave another
        observation than the trace records."""
        task, trace = self._tasks[index], self._traces.get(index)
        if trace is None:
            return task, 0, []
        if "messages" in trace:
            return replace(task, expert=trace["messages"]), 0, []
        tagged = "<answer>" in task.messages[-1]["content"]
        answer = f"<answer>{task.data.answer}</answer>" if tagged else task.data.answer
        calls = trace["calls"]
        results = [self._execute(task.data, call["name"], call["arguments"]) for call in calls]
        differing = [
            f"row {index}, {call['name']}"
            for call, result in zip(calls, results, strict=True)
            if call.get("observation") not in (None, result.output)
        ]
        return replace(task, expert=expert_from_calls(calls, results, answer)), len(calls), differing

    def _ground_truth(self, rows: list[dict[str, Any]], asked: str | Path | None) -> dict[int, dict[str, Any]]:
        if asked is not None and not any("ground_truth" in row for row in rows):
            raise ValueError(
                f"ftrl: {self.path} has no ground_truth column: give traces=FILE.jsonl, or leave traces out"
            )
        return {
            index: {"calls": _calls(self._place(index), json_value(self._place(index), row, "ground_truth"))}
            for index, row in enumerate(rows)
            if row.get("ground_truth") is not None
        }

    def _trace_file(self, path: str | Path) -> dict[int, dict[str, Any]]:
        traces: dict[int, dict[str, Any]] = {}
        for line, trace in read_jsonl(Path(path)):
            place, row = f"ftrl traces: {path}, line {line}", trace.get("row")
            if not isinstance(row, int) or not 0 <= row < len(self._tasks):
                raise ValueError(f"{place}: row is {row!r}, but {self.path} has rows 0..{len(self._tasks) - 1}")
            if row in traces:
                raise ValueError(f"{place}: a second trace for row {row}; keep one a row")
            if not trace.get("complete", True):
                continue
            if isinstance(trace.get("messages"), list):
                traces[row] = {"messages": _trace(place, trace["messages"])}
            elif "calls" in trace:
                traces[row] = {"calls": _calls(place, trace["calls"])}
            else:
                raise ValueError(f"{place}: neither calls nor messages; a trace needs one of them")
        return traces


class FtrlEpisode(SourceEpisode):
    """One attempt; its score is a function of the messages alone."""

    def __init__(self, task: Task, execute: Callable[[str, dict[str, Any]], str], strict: bool = False) -> None:
        super().__init__(task, execute)
        self._strict = strict

    def score(self, messages: list[Message]) -> Score:
        """FTRL's solve_p, solve_r, solve_f1; the reward is solve_f1.

        Every call of an assistant message counts, and may strike one expected answer of its own tool with the tool
        message that answers it (the k-th call of a turn with the k-th tool message after it). Text inside an
        observation is never read as a call or an answer. Turn reward: the share of the turn's calls that struck; of a
        turn without calls, the answer F1 of its ``<answer>`` text.
        """
        item: FtrlItem = self._task.data
        unsolved = deepcopy(item.unsolved)
        n_calls, turn_rewards = 0, []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            calls = calls_of(message)
            struck = [
                strike(unsolved, name, observation)
                for name, observation in _answered(calls, messages[index + 1 :])
                if not (self._strict and failed(observation))
            ]
            n_calls += len(calls)
            turn_rewards.append(sum(struck) / len(calls) if calls else answer_f1(message["content"] or "", item.answer))
        expected, still_open = _count(item.unsolved), _count(unsolved)
        metrics = solve_metrics(expected - still_open, n_calls, expected)
        return Score(metrics["solve_f1"], turn_rewards, metrics)


def expert_from_calls(calls: Sequence[Mapping[str, Any]], results: Sequence[ToolResult], answer: str) -> list[Message]:
    """An expert trace from reference calls: one call a turn, its observation, and the answer last.

    Args:
        calls: ``{"name", "arguments"}`` in order, with ``observation`` and ``reasoning`` where they are known. A turn
            without given reasoning has none: nothing is made up.
        results: what executing each call gave; its output stands where no observation is recorded.
        answer: content of the last message.

    Returns:
        Messages as in ``Task.expert``. A call that fails keeps its place but is marked ``"supervised": False``.
    """
    messages: list[Message] = []
    for call, result in zip(calls, results, strict=True):
        name, arguments, observation, ok = call["name"], call["arguments"], call.get("observation"), result.ok
        if observation is None:
            observation = result.output
        else:
            ok = not failed(observation)
        function = {"name": name, "arguments": arguments}
        turn: Message = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        if call.get("reasoning"):
            turn["reasoning_content"] = call["reasoning"]
        if not ok:
            turn["supervised"] = False
        messages += [turn, {"role": "tool", "name": name, "content": observation}]
    return [*messages, {"role": "assistant", "content": answer}]


def _answered(calls: list[dict[str, Any]], following: list[Message]) -> list[tuple[str, str]]:
    """(tool name, observation) of the calls of one turn that were answered before the next assistant message."""
    observations = []
    for message in following:
        if message["role"] == "assistant":
            break
        if message["role"] == "tool":
            observations.append(message["content"])
    return [(call["name"], observation) for call, observation in zip(calls, observations, strict=False)]


def _count(unsolved: dict[str, list[str]]) -> int:
    return sum(len(answers) for answers in unsolved.values())


def _task(place: str, index: int, row: dict[str, Any]) -> Task:
    missing = [column for column in _REQUIRED if row.get(column) is None]
    if missing:
        raise ValueError(f"{place}: no {', '.join(missing)}; an FTRL row needs {', '.join(_REQUIRED)}")
    tools, codes, unsolved = (json_value(place, row, column) for column in ("tools", "codes", "unsolved_set"))
    if not all(isinstance(message, dict) for message in row["messages"]) or not isinstance(row["answer"], str):
        raise ValueError(f"{place}: messages must be objects with role and content, and answer must be text")
    messages = [{key: value for key, value in message.items() if value is not None} for message in row["messages"]]
    if not messages or messages[-1].get("role") != "user":
        raise ValueError(f"{place}: messages must end with a user message, the question")
    if not isinstance(tools, list) or not isinstance(codes, dict):
        raise ValueError(f"{place}: tools must be a JSON list and codes a JSON object")
    if not isinstance(unsolved, dict) or not all(isinstance(answers, list) for answers in unsolved.values()):
        raise ValueError(f"{place}: unsolved_set must be a JSON object of lists of expected answers")
    texts = [*codes.values(), *(answer for answers in unsolved.values() for answer in answers)]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{place}: sources in codes and expected answers in unsolved_set must be text")
    try:
        check_messages(messages, "prompt")
        validate_tools(tools)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if _count(unsolved) == 0:
        raise ValueError(f"{place}: unsolved_set has no expected answer, so no attempt can be scored; drop the row")
    item = FtrlItem(codes, unsolved, row["answer"])
    group = str(row.get("data_source") or "ftrl")
    return Task(f"ftrl/{index}", messages, tools, data=item, answer=item.answer, group=group)


def _trace(place: str, messages: list[Message]) -> list[Message]:
    try:
        check_trace(messages)
    except ValueError as error:
        raise ValueError(f"{place}, field messages: {error}") from None
    return messages


def _calls(place: str, value: Any) -> list[dict[str, Any]]:
    """Calls of a trace in our form; ``parameters`` (FTRL's name) and JSON text are accepted for ``arguments``."""
    calls = []
    for call in value if isinstance(value, list) else [value]:
        arguments = call.get("arguments", call.get("parameters")) if isinstance(call, dict) else None
        if isinstance(arguments, str):
            arguments = json_value(place, {"arguments": arguments}, "arguments")
        if not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
            raise ValueError(
                f'{place}: a trace is a list of {{"name": text, "arguments": object}}, got {str(call)[:80]}'
            )
        kept = {key: call[key] for key in ("observation", "reasoning") if call.get(key) is not None}
        if not all(isinstance(text, str) for text in kept.values()):
            raise ValueError(f"{place}: observation and reasoning of a call must be text, got {str(kept)[:80]}")
        calls.append({"name": call["name"], "arguments": arguments, **kept})
    return calls
