"""Rewards that the user wrote: which parameters they may name, and what they may return. It knows none of ours."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pact.user_code import load_object

PARAMETERS = ("task", "messages", "turns", "calls", "env_reward")


@dataclass(frozen=True)
class OwnReward:
    """A function of the user as the reward of an episode; docs/custom_reward.md.

    It takes any of these parameters, by name: ``task`` (``pact.envs.Task``, with the expert trace), ``messages`` (what
    followed the prompt), ``turns`` (``pact.rewards.Turn``, one an assistant message), ``calls`` (all calls that could
    be read, ``{"name", "arguments"}``) and ``env_reward`` (what the environment gives). It returns the reward, or
    (reward, one reward a turn); a reward alone counts for the last turn.
    """

    reference: str
    function: Callable[..., Any]
    wanted: tuple[str, ...]

    @classmethod
    def load(cls, reference: str) -> OwnReward:
        """The function that ``FILE.py:NAME`` names. Raises ValueError for one that cannot be a reward."""
        function = load_object(reference)
        if not callable(function) or inspect.isclass(function) or inspect.iscoroutinefunction(function):
            raise ValueError(f"reward {reference} is no plain function: write one that returns a number")
        parameters = inspect.signature(function).parameters.values()
        named = [item for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
        unknown = [item.name for item in parameters if item.name not in PARAMETERS and item.default is item.empty]
        if unknown:
            raise ValueError(
                f"reward {reference} has the parameter {unknown[0]}: it may take {', '.join(PARAMETERS)}, and others "
                "with a default"
            )
        return cls(reference, function, tuple(item.name for item in named if item.name in PARAMETERS))

    def of(self, task_id: str, turns: int, values: dict[str, Any]) -> tuple[float, list[float]]:
        """(reward, turn rewards) of one episode of ``turns`` turns; ``values``: one a parameter.

        Raises RuntimeError when the function raises, ValueError when it returns something else.
        """
        place = f"reward {self.reference}, task {task_id!r}"
        return run_reward(place, turns, lambda: self.function(**{name: values[name] for name in self.wanted}))


def run_reward(place: str, turns: int, function: Callable[[], Any]) -> tuple[float, list[float]]:
    """(reward, turn rewards) from what ``function`` returns: a number, or (number, one number a turn).

    ``place`` begins the messages of RuntimeError (it raised) and ValueError (it returned something else).
    """
    try:
        value = function()
    except (Exception, SystemExit) as error:
        raise RuntimeError(f"{place}: it raised {type(error).__name__}: {error}; mend it") from error
    if not isinstance(value, tuple):
        reward = _number(place, value)
        return reward, [0.0] * (turns - 1) + [reward] * (turns > 0)
    if len(value) != 2 or not isinstance(value[1], Sequence) or isinstance(value[1], str):
        raise ValueError(f"{place}: it returned {value!r:.80}; return a number, or (number, [one number a turn])")
    reward, of_turns = _number(place, value[0]), [_number(place, item) for item in value[1]]
    if len(of_turns) != turns:
        raise ValueError(f"{place}: it returned {len(of_turns)} turn rewards for {turns} turns; return one a turn")
    return reward, of_turns


def _number(place: str, value: Any) -> float:
    """A finite float: of a number, or of an array or tensor that holds one."""
    try:
        number = math.nan if value is None or isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{place}: it returned {value!r:.80}, and a reward is a finite number; return a number, or (number, "
            "[one number a turn])"
        )
    return number
