"""A Generator that says given assistant messages, token by token: rollouts and their scores without a model.

It samples nothing and computes no probabilities.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pact.envs.base import Message, Task
from pact.envs.items import read_jsonl
from pact.messages import calls_of
from pact.rollout import Completion, Sampling
from pact.trace import end_of_turn_id, render_prompt, render_trace

Script = list[list[int]]  # ids of each turn


class ReplayEngine:
    """Generator of scripts that ``learn`` has been told. Every row of a prompt says the same, whatever the sampling.

    Turn i of a row is the i-th assistant message of its prompt's script; after the last one every turn is empty, which
    ends an episode. The log-prob of every token is 0. ``context_length``: as a model's, to see what would not fit.

    An engine sees prompts only. Where tasks with different scripts share a prompt (BFCL's categories do), each row of
    it says the next script in the order they were learnt: one rollout a task, rolled out in that order.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_batch: int = 256, context_length: int | None = None
    ) -> None:
        self.max_batch, self.context_length = max_batch, context_length
        self._tokenizer = tokenizer
        self._stop_id = end_of_turn_id(tokenizer)
        self._scripts: dict[tuple[int, ...], list[Script]] = {}  # prompt -> its different scripts
        self._waiting: dict[tuple[int, ...], deque[Script]] = {}  # those that no row has said since they were learnt

    def learn(self, task: Task, messages: Sequence[Message]) -> None:
        """What to say when asked for ``task``: the assistant messages among ``messages``; the others are passed over.

        Raises ValueError for a message that cannot be rendered.
        """
        head_ids, suffix_ids = render_prompt(task.messages, task.tools, self._tokenizer)
        prompt = (*head_ids, *suffix_ids)
        script = [self._turn(message) for message in messages if message.get("role") == "assistant"]
        known = self._scripts.setdefault(prompt, [])
        if script not in known:
            known.append(script)
        self._waiting.setdefault(prompt, deque()).append(script)

    def open(
        self, prompts: Sequence[list[int]], *, stop_id: int, sampling: Sampling, seeds: Sequence[int]
    ) -> ReplaySession:
        """Raises ValueError for a prompt it has no script for or more rows than different scripts, and for a stop id
        that is not its tokenizer's."""
        if stop_id != self._stop_id:
            raise ValueError(
                f"stop_id is {stop_id} and this tokenizer's turns end with {self._stop_id}: use one tokenizer"
            )
        unknown = sum(tuple(prompt) not in self._scripts for prompt in prompts)
        if unknown:
            raise ValueError(f"{unknown} of {len(prompts)} prompts have no script: tell the replay engine with learn()")
        return ReplaySession([self._next_script(tuple(prompt)) for prompt in prompts], stop_id)

    def _next_script(self, prompt: tuple[int, ...]) -> Script:
        if self._waiting[prompt]:
            return self._waiting[prompt].popleft()
        if len(self._scripts[prompt]) > 1:
            raise ValueError(
                f"a prompt has {len(self._scripts[prompt])} different scripts, and all were said: learn its tasks "
                "again and play one rollout of each"
            )
        return self._scripts[prompt][0]

    def _turn(self, message: Message) -> list[int]:
        """Ids of one assistant message up to and with its end of turn, as the training template renders it."""
        calls = calls_of(message)
        if not calls and not (message.get("content") or message.get("reasoning_content") or "").strip():
            return [self._stop_id]
        results = [{"role": "tool", "name": call["name"], "content": "-"} for call in calls]
        ids = render_trace([dict(message), *results], None, self._tokenizer).ids
        return ids[: ids.index(self._stop_id) + 1]


class ReplaySession:
    """Rows under way: what each still has to say. Every ``generate`` ends all rows it names."""

    def __init__(self, scripts: Sequence[Script], stop_id: int) -> None:
        self._scripts, self._stop_id = scripts, stop_id
        self._next = [0] * len(scripts)

    def generate(self, append: Mapping[int, list[int]], max_new_tokens: Mapping[int, int]) -> dict[int, Completion]:
        """See ``pact.rollout.Session``. A turn longer than its limit is cut there and not finished."""
        completions = {}
        for row, limit in max_new_tokens.items():
            turns, place = self._scripts[row], self._next[row]
            whole = turns[place] if place < len(turns) else [self._stop_id]
            self._next[row] += 1
            ids = whole[:limit]
            completions[row] = Completion(ids, [0.0] * len(ids), len(ids) == len(whole))
        return completions

    def close(self) -> None:
        """Nothing is held."""


def read_scripts(path: Path) -> dict[str, list[Message]]:
    """Task id -> messages, from JSONL: one object a task with ``id`` and either ``messages`` or ``calls``.

    ``calls`` (``{"name", "arguments"}``) become one turn each, then ``answer`` where the row has one. The episodes of
    an evaluation are such a file. Raises ValueError that names the line.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path} to replay: give JSONL with id and messages or calls")
    scripts: dict[str, list[Message]] = {}
    for number, row in read_jsonl(path):
        place = f"{path}, line {number}"
        if not isinstance(row.get("id"), str):
            raise ValueError(f"{place}: no id; a row is an object with id and messages or calls")
        if row["id"] in scripts:
            raise ValueError(f"{place}: a second script for {row['id']}; keep one a task")
        scripts[row["id"]] = _script(place, row)
    if not scripts:
        raise ValueError(f"{path} holds no scripts")
    return scripts


def _opens_with_thought(message: Message) -> bool:
    return (message.get("content") or "").lstrip().startswith("<think>")


def _script(place: str, row: dict[str, Any]) -> list[Message]:
    messages, calls = row.get("messages"), row.get("calls")
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        said = [message for message in messages if message.get("role") == "assistant"]
        unread = any(message.get("role") == "tool" and message.get("name") == "error" for message in messages)
        if unread or any(message.get("cut") or _opens_with_thought(message) for message in said):
            raise ValueError(
                f"{place}: a turn of this episode was cut or could not be read whole, so its messages do not hold what "
                "was sampled: take the line out"
            )
        return messages
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"{place}: neither messages nor calls, each a list of objects; a script needs one of them")
    script: list[Message] = [{"role": "assistant", "content": "", "tool_calls": [call]} for call in calls]
    try:
        for turn in script:
            calls_of(turn)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if isinstance(row.get("answer"), str):
        script.append({"role": "assistant", "content": row["answer"]})
    return script
