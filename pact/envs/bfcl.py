"""BFCL v4 (Berkeley Function Calling Leaderboard): multi-turn and memory categories with the released checker.

The package ``bfcl-eval`` is never imported here: data, tools and checker all run inside the sandbox
(``pact.envs.bfcl_worker``). It holds no data, and its items carry no expert traces.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from pact.envs.base import Message, Score, Task, ToolSchema
from pact.envs.items import default_workers
from pact.messages import calls_of
from pact.sandbox import Sandbox, ToolResult

logger = logging.getLogger(__name__)

VERSION = "2026.3.23"
MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
MEMORY = ("memory_kv", "memory_rec_sum")
COLLECTIONS = {"multi_turn": MULTI_TURN, "memory": MEMORY, "all": MULTI_TURN + MEMORY}
ABSENT = {
    "memory_vector": "its memory needs an embedding model from a hub",
    "web_search": "it searches the live web",
    "format_sensitivity": "it varies prompts of single-turn items, which are not played here",
}
LOST_LIMIT = 3  # calls of an episode that may run out of time before no more are executed
STEP_LIMIT = 21  # the released loop counts its 20 after a step, so that it makes one more
NEW_TOOLS = "I have updated some more functions you can choose from. What about now?"  # the released words

_NEEDS = ("bfcl_eval", "mpmath", "numpy", "overrides", "rank_bm25")
_INSTALL = f"pip install --no-deps bfcl-eval=={VERSION}, and pip install 'mpmath<1.4' numpy overrides rank_bm25"


@dataclass(frozen=True)
class BfclItem:
    """What the policy does not see. ``entry``: what the checker needs of the released entry; ``turns``: the user's
    messages after the prompt, one list a turn; ``held_out``: turn -> tools that appear with it; ``gold``: call strings
    a turn (multi-turn), possible answers (memory) or None (a conversation that only fills the memory)."""

    entry: dict[str, Any]
    turns: list[list[Message]]
    held_out: dict[int, list[ToolSchema]]
    gold: list[Any] | None


class Bfcl:
    """The environment over categories of BFCL v4; all items are "test". Ids are the released ones, the group is the
    category.

    Multi-turn: one episode is all user turns of an entry. Contexts are append-only, so tools that were held out come as
    text in the user message of their turn, as the released prompting mode has them (``Episode.tools`` has them too).

    Memory: conversations first fill the memory, then questions are asked about it (``Staged``); the conversations have
    no group and are not scored. A question's prompt shows the memory as the same policy left it.

    Args:
        categories: names of categories, or "multi_turn", "memory", "all".
        timeout: wall-clock limit of a tool call, seconds; a check may take six times as long.
        workers: calls that may run at once, from threads; None: the number of cores, at most 8.
        unsafe_no_isolation: run bfcl-eval, which evaluates what the policy writes, without a sandbox (see
            ``pact.sandbox.Sandbox``).

    Raises:
        ValueError: a category that does not exist or cannot run here (the message says why).
        RuntimeError: bfcl-eval or what it needs is missing, or of another version; the sandbox cannot start.
    """

    eval_limits: ClassVar[dict[str, int]] = {
        "max_turns": 1000,  # what ends an episode is the limit of a user turn, and the context
        "max_user_turn_steps": STEP_LIMIT,
        "max_turn_tokens": 4096,
        "max_response_tokens": 1 << 20,
    }

    def __init__(
        self,
        categories: str | Sequence[str] = MULTI_TURN,
        *,
        timeout: float = 10.0,
        workers: int | None = None,
        unsafe_no_isolation: bool = False,
    ) -> None:
        self.categories = _chosen(categories)
        self.averages = {
            name: members
            for name, members in (("multi_turn", MULTI_TURN), ("memory", MEMORY))
            if set(members) <= set(self.categories)  # a part of them is not the published average
        }
        self.workers = workers or default_workers()
        options: Any = {
            "packages": _packages(),
            "preload": ["bfcl_worker"],
            "unsafe_no_isolation": unsafe_no_isolation,
            "memory_bytes": 2 << 30,
            "output_bytes": 1 << 26,  # entries with all their tools, memories
        }
        with Sandbox(**options) as loader:
            loaded = [_json(_call(loader, "load", {"category": name}, 120.0)) for name in self.categories]
        self._sandbox = Sandbox(workers=self.workers, **options)
        self._timeout = timeout
        seen: dict[str, ToolSchema] = {}  # entries share their tools: keep each once
        self._tasks = [
            _task(category, entry, data["answers"].get(entry["id"]), seen)
            for category, data in zip(self.categories, loaded, strict=True)
            for entry in data["entries"]
        ]
        self._memory: dict[tuple[str, str], Any] = {}  # (category, scenario) -> what its last conversation left

    def tasks(self, split: str) -> Sequence[Task]:
        """All items, category by category, in released order (memory: conversations before questions)."""
        if split != "test":
            raise ValueError(f"bfcl: there is no split {split!r}: all items are test items")
        return self._tasks

    def start(self, task: Task) -> BfclEpisode:
        """One attempt at ``task``."""
        return BfclEpisode(task, self)

    def stage(self, task: Task) -> int:
        """Conversations of a scenario follow each other; questions come after all of them."""
        entry = task.data.entry
        if "scenario" not in entry:
            return 0
        return int(entry["id"].rpartition("-")[2]) if task.data.gold is None else 1000

    def ready(self, task: Task) -> Task:
        """A memory item with its prompt, which shows what is remembered so far; other items as they are."""
        entry = task.data.entry
        if "scenario" not in entry:
            return task
        entry = entry | {"memory": self._memory.get((entry["category"], entry["scenario"]))}
        turns = _json(self.run("opening", entry=entry))
        return replace(task, messages=turns[0], data=replace(task.data, entry=entry))

    def keep(self, task: Task, artifact: Any) -> None:
        """Remember what a conversation left in the memory; one whose memory could not be read leaves it as it was."""
        if artifact and artifact.get("memory") is not None:
            self._memory[task.data.entry["category"], task.data.entry["scenario"]] = artifact["memory"]

    def gold(self, task: Task) -> list[list[dict[str, Any]]]:
        """The gold calls of a multi-turn item, a list a user turn, as ``{"name", "arguments"}``."""
        return _json(self.run("gold_calls", entry=task.data.entry, gold=task.data.gold))

    def run(self, function: str, **arguments: Any) -> ToolResult:
        """Call a function of ``bfcl_worker`` in the sandbox."""
        patience = 1 if function == "execute" else 6
        return _call(self._sandbox, function, arguments, patience * self._timeout)

    def close(self) -> None:
        """End the sandbox's processes."""
        self._sandbox.close()


class BfclEpisode:
    """One attempt. Nothing of it lives in the sandbox between calls: each call executes those before it again, as the
    released checker does with all of them."""

    def __init__(self, task: Task, env: Bfcl) -> None:
        self._item: BfclItem = task.data
        self._env = env
        self._done: list[dict[str, Any]] = []
        self._calls = 0
        self._lost: set[int] = set()  # places of calls that did not end
        self._turn = 0
        self.tools = list(task.tools)

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """The observation of one call; a failing one reads `Error during execution: REASON`, the released wording.

        A call that runs out of time or breaks its process is undone: what follows, and the score, go on without it.
        After ``LOST_LIMIT`` of them nothing is executed any more.
        """
        place, call = self._calls, {"name": name, "arguments": arguments}
        self._calls += 1
        if len(self._lost) >= LOST_LIMIT:
            self._lost.add(place)
            return "Error during execution: too many calls ran out of time; no more are executed"
        result = self._env.run("execute", entry=self._item.entry, done=self._done, call=call)
        if not result.ok:
            self._lost.add(place)
            return f"Error during execution: {result.error}"
        self._done.append(call)
        return result.output

    def user_turn(self) -> list[Message] | None:
        """The user's next messages, with the tools that appear with them; None after the last turn."""
        self._turn += 1
        if self._turn > len(self._item.turns):
            return None
        appearing = self._item.held_out.get(self._turn, [])
        self.tools += appearing
        return _with_tools(self._item.turns[self._turn - 1], appearing)

    def score(self, messages: list[Message]) -> Score:
        """``valid`` as released; the reward is ``valid``.

        Multi-turn: after every user turn the state equals the gold state and the gold outputs were all seen. An attempt
        that did not get through all user turns is not valid; a turn that the context ended before its answer counts as
        not played (the release fails such an entry), one of 21 steps as played (so does the release). Turn rewards:
        each user turn is worth an equal share when its check and all before it hold, on the last assistant turn that
        answers it.

        Memory: one of the possible answers stands in the last message, which calls nothing. Conversations that fill the
        memory score 0 and leave it in the artifact.

        ``artifact``: ``result``, the released form of the attempt, ``error_type`` and ``error`` of the checker.
        """
        turns = _user_turns(messages)
        rewards = [0.0] * sum(map(len, turns))
        if turns and messages[-1]["role"] != "assistant" and len(turns[-1]) < STEP_LIMIT:
            turns.pop()
        artifact: dict[str, Any] = {"result": [[_released_text(step) for step in steps] for steps in turns]}
        steps = float(len(rewards))
        if self._item.gold is None:
            left = self._env.run("snapshot", entry=self._item.entry, done=self._done)
            if not left.ok:
                logger.warning(f"bfcl: the memory after {self._item.entry['id']} is lost: {left.error}")
            artifact |= {"memory": _json(left) if left.ok else None, "error": left.error}
            return Score(0.0, rewards, {"steps": steps}, artifact)
        if "scenario" in self._item.entry:
            verdict = self._answered(messages)
            rewards[-1:] = [float(verdict["valid"])] * bool(rewards)
        else:
            verdict = self._checked(turns)
            place = -1
            for answered, held in zip(turns, verdict["held"]):
                place += len(answered)
                if answered:
                    rewards[place] = held / len(self._item.gold)
        artifact |= {"error_type": verdict.get("error_type"), "error": verdict.get("error")}
        valid = float(verdict["valid"])
        return Score(valid, rewards, {"valid": valid, "steps": steps}, artifact)

    def close(self) -> None:
        """Nothing to release: the sandbox belongs to the environment."""

    def _checked(self, turns: list[list[Message]]) -> dict[str, Any]:
        """The checker's verdict on the calls that were executed."""
        gold = self._item.gold or []
        calls: list[list[list[dict[str, Any]]]] = []
        place = 0
        for steps in turns:
            calls.append([])
            for step in steps:
                made = list(enumerate(calls_of(step), start=place))
                place += len(made)
                calls[-1].append([call for number, call in made if number not in self._lost])
        result = self._run_check("check", entry=self._item.entry, turns=calls, gold=gold)
        if not result.ok:
            return {"valid": False, "held": [False] * len(turns), "error_type": "check_failed", "error": result.error}
        verdict = _json(result)
        if len(turns) < len(gold):
            verdict |= {"error_type": "multi_turn:force_terminated", "error": f"{len(turns)} of {len(gold)} user turns"}
        return verdict | {"valid": len(turns) == len(gold) and all(verdict["held"])}

    def _answered(self, messages: list[Message]) -> dict[str, Any]:
        if not messages or messages[-1]["role"] != "assistant" or calls_of(messages[-1]):
            return {"valid": False, "error_type": "agentic:no_last_message"}
        text = messages[-1].get("content") or ""
        result = self._run_check("answered", text=text, answers=self._item.gold)
        return _json(result) if result.ok else {"valid": False, "error_type": "check_failed", "error": result.error}

    def _run_check(self, function: str, **arguments: Any) -> ToolResult:
        result = self._env.run(function, **arguments)
        if not result.ok:
            logger.warning(
                f"bfcl: the check of {self._item.entry['id']} failed, it counts as not valid: {result.error}"
            )
        return result


def _chosen(categories: str | Sequence[str]) -> tuple[str, ...]:
    names = [categories] if isinstance(categories, str) else list(categories)
    chosen: list[str] = []
    for name in names:
        reason = next((why for start, why in ABSENT.items() if name.startswith(start)), None)
        if reason:
            raise ValueError(f"bfcl: the category {name} does not run here: {reason}; leave it out")
        if name not in (*COLLECTIONS, *MULTI_TURN, *MEMORY):
            known = ", ".join((*COLLECTIONS, *MULTI_TURN, *MEMORY))
            raise ValueError(f"bfcl: there is no category {name!r} here (single-turn ones are not played): use {known}")
        chosen += COLLECTIONS.get(name, (name,))
    if not chosen:
        raise ValueError("bfcl: no category is chosen: name at least one")
    return tuple(dict.fromkeys(chosen))


def _packages() -> list[Path]:
    """What the sandbox must hold of site-packages, found without importing any of it."""
    found = {name: find_spec(name) for name in _NEEDS}
    missing = [name for name, spec in found.items() if spec is None or spec.origin is None]
    if missing:
        raise RuntimeError(f"bfcl needs {', '.join(missing)}, which is not installed: {_INSTALL}")
    version = importlib.metadata.version("bfcl-eval")
    if version != VERSION:
        raise RuntimeError(f"bfcl needs bfcl-eval {VERSION} and {version} is installed: {_INSTALL}")
    paths = [Path(__file__).with_name("bfcl_worker.py")]
    for spec in found.values():
        assert spec is not None
        assert spec.origin is not None
        origin = Path(spec.origin)
        paths.append(origin.parent if origin.name == "__init__.py" else origin)
    libraries = paths[_NEEDS.index("numpy") + 1].with_name("numpy.libs")
    return [*paths, *([libraries] if libraries.is_dir() else [])]


def _call(sandbox: Sandbox, function: str, arguments: dict[str, Any], timeout: float) -> ToolResult:
    return sandbox.call(f"from bfcl_worker import {function}", function, arguments, timeout)


def _json(result: ToolResult) -> Any:
    if not result.ok:
        raise RuntimeError(f"bfcl-eval failed in the sandbox: {result.error}")
    return json.loads(result.output)


def _task(category: str, entry: dict[str, Any], gold: list[Any] | None, seen: dict[str, ToolSchema]) -> Task:
    def shared(tools: list[ToolSchema]) -> list[ToolSchema]:
        return [seen.setdefault(json.dumps(tool), tool) for tool in tools]

    kept: dict[str, Any] = {"category": category}
    kept |= {key: entry[key] for key in ("id", "initial_config", "involved_classes", "scenario") if key in entry}
    if "scenario" in entry:
        kept |= {"question": entry["question"], "memory": None}
    first, *turns = deepcopy(entry["question"])
    held_out = {int(turn): shared(tools) for turn, tools in entry.get("missed_function", {}).items()}
    item = BfclItem(kept, turns, held_out, gold)
    group = category if gold is not None else None
    return Task(entry["id"], first, shared(entry["function"]), data=item, group=group)


def _with_tools(messages: list[Message], tools: list[ToolSchema]) -> list[Message]:
    if not tools:
        return deepcopy(messages)
    schemas = json.dumps([tool["function"] for tool in tools])
    return [*deepcopy(messages), {"role": "user", "content": f"{schemas}\n{NEW_TOOLS}"}]


def _user_turns(messages: list[Message]) -> list[list[Message]]:
    """The assistant's messages, a list a user turn."""
    turns: list[list[Message]] = [[]] if messages else []
    for place, message in enumerate(messages):
        if message["role"] == "user" and messages[place - 1]["role"] != "user":
            turns.append([])
        elif message["role"] == "assistant":
            turns[-1].append(message)
    return turns


def _released_text(message: Message) -> str:
    """One step as the released Qwen handlers store it: prose, then calls in ``<tool_call>`` blocks."""
    blocks = [f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls_of(message)]
    prose = (message.get("content") or "").replace("<tool_call>", "<tool_call >")  # it called nothing
    return "\n".join(([prose] if prose else []) + blocks)
