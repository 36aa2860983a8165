"""What an environment is: tasks, episodes, scores. It does not know models, tokens or training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

Message = dict[str, Any]
ToolSchema = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One prompt: ``messages`` and ``tools`` are what the policy sees, ``expert`` is the privileged trace.

    ``expert`` holds the assistant and tool messages that follow ``messages`` and end with the final answer, or None
    where the task carries no trace. ``data`` is the environment's own record (answers, sources); it is never shown, nor
    is ``answer``, the gold final answer where there is one. ``group``: what evaluation tables are broken down by.
    """

    id: str
    messages: list[Message]
    tools: list[ToolSchema]
    expert: list[Message] | None = None
    data: Any = field(default=None, repr=False, compare=False)
    answer: str | None = field(default=None, repr=False)
    group: str | None = None

    def without_expert(self) -> Task:
        """The task as the sampler may see it."""
        return self if self.expert is None else replace(self, expert=None)


@dataclass(frozen=True)
class Score:
    """``reward`` of the whole episode, one entry of ``turn_rewards`` an assistant turn, ``metrics`` by public name.

    ``artifact``: what else an evaluation should keep of the episode, as JSON data (see ``Staged``).
    """

    reward: float
    turn_rewards: list[float]
    metrics: dict[str, float]
    artifact: Any = field(default=None, repr=False)


@runtime_checkable
class Episode(Protocol):
    """One attempt at one task."""

    @property
    def tools(self) -> list[ToolSchema]:
        """The schemas on offer now; they may change between turns."""
        ...

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Run one tool call and return its observation. A failing call returns an error text, it does not raise."""
        ...

    def user_turn(self) -> list[Message] | None:
        """The next user messages once the assistant has answered, or None when the episode is over."""
        ...

    def score(self, messages: list[Message]) -> Score:
        """Score the messages that followed the prompt (assistant, tool and later user messages)."""
        ...

    def close(self) -> None:
        """Release what the episode holds."""
        ...


@runtime_checkable
class Environment(Protocol):
    """A source of tasks and the place where they are attempted.

    It may also have ``workers`` (calls and scores of different episodes that may run at once, from threads; else 1),
    ``eval_limits`` (its benchmark's own limits: keyword arguments of ``pact.rollout.RolloutLimits``) and ``averages``
    (row of the evaluation table -> the groups whose means it averages).
    """

    def tasks(self, split: str) -> Sequence[Task]:
        """All tasks of ``split`` in a fixed order. Raises ValueError for a split that does not exist."""
        ...

    def start(self, task: Task) -> Episode:
        """Begin one attempt; attempts are independent of each other."""
        ...


@runtime_checkable
class Staged(Protocol):
    """An environment in which some tasks are made of what earlier episodes left behind (BFCL's memory questions).

    An evaluation plays all tasks of a stage before the next stage, hands each finished episode's ``Score.artifact`` to
    ``keep`` (also those read back from an earlier, interrupted run) and asks ``ready`` for a task right before it.
    """

    def stage(self, task: Task) -> int:
        """The stage a task belongs to, from 0."""
        ...

    def ready(self, task: Task) -> Task:
        """The task as it stands after all earlier stages."""
        ...

    def keep(self, task: Task, artifact: Any) -> None:
        """Take note of how the episode of ``task`` ended."""
        ...
