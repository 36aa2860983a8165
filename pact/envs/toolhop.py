"""ToolHop (arXiv 2501.02506): multi-hop questions over tools that are Python sources, run in the sandbox.

Reads the benchmark's items from a file or dataset. It ships no data, and its items carry no expert traces.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pact.envs.base import Message, Score, Task
from pact.envs.items import SourceEpisode, default_workers, json_value, read_rows, run_source
from pact.rewards import answer_verify
from pact.sandbox import Sandbox

logger = logging.getLogger(__name__)

Scenario = Literal["free", "mandatory", "direct"]

_REQUIRED = ("question", "answer", "tools", "functions")
_NESTED = ("tools", "functions")
_DEFINED = re.compile(r"^(?:async )?def (\w+)", re.MULTILINE)

# The released prompts (bytedance-research/ToolHop, Apache-2.0), word for word, its slip "nswer" included.
_FORMS = """If the {final}answer is a date, format is as follows: YYYY-MM-DD (ISO standard)
If the {final}{answer} is a name, format it as follows: Firstname Lastname
If the {final}answer contains any number, format it as a number, not a word, and only output that number. \
Do not include leading 0s.

Please provide the {final}answer in the following format: <answer>{place}</answer>
Answer as short as possible.
Question: {question}"""
_WITH_TOOLS = "You will be asked a question with some tools, and should provide a short final answer.\n"
_WITHOUT_TOOLS = "You will be asked a question, and should provide a short answer.\n"
_MUST_CALL = (
    "Please note that you must call the tool at every step, you must not use your own knowledge. "
    "Your final answer must also be returned from the tool.\n"
)


@dataclass(frozen=True)
class ToolHopItem:
    """What the policy does not see: ``codes`` (tool name -> Python source) and the final ``answer``."""

    codes: dict[str, str]
    answer: str


class ToolHop:
    """The environment over the items of ToolHop; all of them are "test" unless they have a column ``split``.

    A row has ``question``, ``answer``, ``tools`` (sub-question -> function schema) and ``functions`` (Python sources,
    or tool name -> source). Where two tools of an item share a name, both schemas are shown and the last source of that
    name in ``functions`` is called, as a name -> source dictionary has it. Task ids are ``toolhop/ROW``; the group is
    the scenario.

    Args:
        path: a .json (as published), .jsonl or .parquet file, or a dataset (see ``pact.envs.items.read_rows``).
        scenario: "free": tools may be used; "mandatory": the prompt demands them; "direct": there are none, and the
            first turn is what counts.
        timeout: wall-clock limit of one tool call, seconds.
        workers: tool calls that may run at once, from threads; None: the number of cores, at most 8.
        unsafe_no_isolation: run the tools without a sandbox (see ``pact.sandbox.Sandbox``).

    Raises:
        ValueError: an unknown scenario; a file, column or value that cannot be used; one line.
        RuntimeError: the sandbox cannot start.
    """

    # As released: turns and tokens a turn; a response is bounded by the context alone.
    eval_limits: ClassVar[dict[str, int]] = {"max_turns": 9, "max_turn_tokens": 4096, "max_response_tokens": 1 << 20}

    def __init__(
        self,
        path: str | Path,
        *,
        scenario: Scenario = "free",
        timeout: float = 10.0,
        workers: int | None = None,
        unsafe_no_isolation: bool = False,
    ) -> None:
        if scenario not in get_args(Scenario):
            raise ValueError(f"toolhop: unknown scenario {scenario!r}: choose one of {', '.join(get_args(Scenario))}")
        self.scenario, self._timeout = scenario, timeout
        rows = read_rows(path, "toolhop", _REQUIRED, _NESTED)
        self._tasks: dict[str, list[Task]] = {}
        for index, row in enumerate(rows):
            task = _task(f"toolhop: {path}, row {index}", index, row, scenario)
            self._tasks.setdefault(str(row.get("split", "test")), []).append(task)
        lacking = [task.id for tasks in self._tasks.values() for task in tasks if _without_source(task)]
        if lacking:
            logger.warning(
                f"toolhop: {len(lacking)} items show a tool that has no source: its calls fail; first {lacking[0]}"
            )
        self.workers = workers or default_workers()
        self._sandbox = Sandbox(workers=self.workers, unsafe_no_isolation=unsafe_no_isolation)

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of ``split`` in file order."""
        if split not in self._tasks:
            raise ValueError(f"toolhop: there is no split {split!r}; the data has: {', '.join(self._tasks)}")
        return self._tasks[split]

    def start(self, task: Task) -> ToolHopEpisode:
        """One attempt at ``task``."""

        def execute(name: str, arguments: dict[str, Any]) -> str:
            return run_source(self._sandbox, task.data.codes, name, arguments, self._timeout).output

        return ToolHopEpisode(task, execute, self.scenario)

    def close(self) -> None:
        """End the sandbox's processes."""
        self._sandbox.close()


class ToolHopEpisode(SourceEpisode):
    """One attempt; its score is a function of the messages alone."""

    def __init__(self, task: Task, execute: Callable[[str, dict[str, Any]], str], scenario: Scenario) -> None:
        super().__init__(task, execute)
        self._scenario = scenario

    def score(self, messages: list[Message]) -> Score:
        """``answer_correctness`` (the reward) and ``answer_correctness_strict``, each 0 or 1; 0 unless the last message
        is the assistant's. The reward is that of the last turn, the other turn rewards are 0.

        ``answer_correctness`` is the released rule (FTRL's and MatchTIR's version of the script): that message has some
        text, and ``answer_verify`` holds on it, reasoning included, or on the tool message right before it.
        ``answer_correctness_strict`` is ours: see ``strictly_correct``.
        """
        if self._scenario == "direct":
            messages = messages[:1]
        turns = sum(message["role"] == "assistant" for message in messages)
        if not messages or messages[-1]["role"] != "assistant":
            return _score(turns, False, False)
        gold, last = self._task.data.answer, messages[-1]
        reasoning, content = last.get("reasoning_content") or "", last.get("content") or ""
        text = f"{reasoning}\n{content}".strip()
        seen = _observation_before(messages, self._task.data.codes)
        correct = bool(text) and (answer_verify(text, gold) or answer_verify(seen, gold))
        return _score(turns, correct, strictly_correct(content, gold))


def strictly_correct(content: str, gold: str) -> bool:
    """Whether the final answer itself holds ``gold``: the text of the last ``<answer>`` tag, else all of ``content``
    (the last turn without its reasoning).

    Every part of ``gold``, split at ', ', must stand there as whole words or numbers, without regard to case and
    commas: "1" is not in "12", "1.5", "-1", "1/2", "11:1" or "b1".
    """
    start, end = content.rfind("<answer>"), content.rfind("</answer>")
    text = content[start + len("<answer>") : end] if 0 <= start < end else content
    text = text.lower().replace(",", "")
    parts = [part.lower().replace(",", "").strip() for part in gold.split(", ")]
    return all(re.search(rf"(?<![\w\-−.'])(?<!\d[/:]){re.escape(part)}(?![\w\-−]|[./:]\w)", text) for part in parts)


def _score(turns: int, correct: bool, strict: bool) -> Score:
    metrics = {"answer_correctness": float(correct), "answer_correctness_strict": float(strict)}
    rewards = [0.0] * turns
    if turns:
        rewards[-1] = float(correct)
    return Score(float(correct), rewards, metrics)


def _observation_before(messages: list[Message], codes: Collection[str]) -> str:
    """What the last tool said right before the last message. Complaints about a call that could not be read, or about a
    tool that there is not, are no tool's words: they quote the model, and numbers stand in them by chance."""
    before = messages[-2] if len(messages) > 1 else {}
    return before["content"] if before.get("role") == "tool" and before.get("name") in codes else ""


def _without_source(task: Task) -> bool:
    return any(tool["function"]["name"] not in task.data.codes for tool in task.tools)


def _task(place: str, index: int, row: dict[str, Any], scenario: Scenario) -> Task:
    missing = [column for column in _REQUIRED if row.get(column) is None]
    if missing:
        raise ValueError(f"{place}: no {', '.join(missing)}; a ToolHop row needs {', '.join(_REQUIRED)}")
    question, answer = row["question"], row["answer"]
    if not isinstance(question, str) or not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"{place}: question and answer must be text, and answer must not be empty")
    tools, functions = (json_value(place, row, column) for column in _NESTED)
    schemas = list(tools.values()) if isinstance(tools, dict) else None
    if schemas is None or not all(isinstance(schema, dict) and schema.get("name") for schema in schemas):
        raise ValueError(f"{place}: tools must be an object of function schemas with a name, by sub-question")
    names = [schema["name"] for schema in schemas]
    item = ToolHopItem(_codes(place, functions, names), answer)
    shown = [] if scenario == "direct" else [{"type": "function", "function": schema} for schema in schemas]
    messages = [{"role": "user", "content": prompt(question, scenario)}]
    return Task(f"toolhop/{index}", messages, shown, data=item, answer=answer, group=scenario)


def prompt(question: str, scenario: Scenario) -> str:
    """The released user message of a scenario."""
    if scenario == "direct":
        forms = _FORMS.format(final="", answer="answer", place="your answer here", question=question)
        return _WITHOUT_TOOLS + forms
    forms = _FORMS.format(final="final ", answer="nswer", place="final answer here", question=question)
    return _WITH_TOOLS + (_MUST_CALL if scenario == "mandatory" else "") + forms


def _codes(place: str, functions: Any, names: list[str]) -> dict[str, str]:
    """Tool name -> source. A source belongs to each tool that it defines at its top level."""
    sources = list(functions.values()) if isinstance(functions, dict) else functions
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise ValueError(f"{place}: functions must be a list of Python sources, or an object of them by name")
    if isinstance(functions, dict):
        return dict(functions)
    return {name: source for source in sources for name in _DEFINED.findall(source) if name in names}
