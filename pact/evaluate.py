"""Evaluation: episodes to per-task records, means with bootstrap intervals, paired improvements. It trains nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from pact.envs.base import Environment, Task
from pact.rollout import GREEDY, Generator, RolloutLimits, Sampling, run_rollouts

RESAMPLES = 10_000


@dataclass(frozen=True)
class EpisodeRecord:
    """The outcome of one task: what to keep of an evaluation. ``turns`` counts assistant turns."""

    id: str
    reward: float
    metrics: dict[str, float]
    turns: int
    stop_reason: str

    def value(self, metric: str) -> float:
        """``reward`` or the environment's metric of that name. Raises ValueError for any other name."""
        if metric == "reward":
            return self.reward
        if metric not in self.metrics:
            raise ValueError(f"unknown metric {metric!r}: choose one of {', '.join(['reward', *sorted(self.metrics)])}")
        return self.metrics[metric]


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` tasks with its 95% percentile-bootstrap interval."""

    mean: float
    lower: float
    upper: float
    n: int


def evaluate(
    engine: Generator,
    env: Environment,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    limits: RolloutLimits | None = None,
    sampling: Sampling = GREEDY,
    batch_size: int | None = None,
    seed: int = 0,
) -> list[EpisodeRecord]:
    """One episode a task, records in the order of ``tasks``. A prompt that does not fit the context is an episode of no
    turn. Raises ValueError for no task, for two tasks of one id or a reward that is not finite, otherwise as
    ``run_rollouts``."""
    ids = [task.id for task in tasks]
    if not ids:
        raise ValueError("there is no task to evaluate: give at least one")
    if len(set(ids)) < len(ids):
        raise ValueError("two tasks share an id, so records could not be told apart: make the ids unique")
    options = {"sampling": sampling, "limits": limits, "seed": seed, "batch_size": batch_size}
    episodes = run_rollouts(env, tasks, engine, tokenizer, n=1, fail_long_prompts=True, **options)  # type: ignore[arg-type]
    for task, [done] in zip(tasks, episodes):
        if not math.isfinite(done.score.reward):
            raise ValueError(f"the reward of task {task.id!r} is {done.score.reward}: mend the environment's score")
    return [
        EpisodeRecord(task.id, done.score.reward, dict(done.score.metrics), len(done.turns), done.stop_reason)
        for task, [done] in zip(tasks, episodes)
    ]


def summarize(records: Sequence[EpisodeRecord], *, seed: int = 0) -> dict[str, Estimate]:
    """``reward`` and every metric that all records carry: mean and 95% interval, by name."""
    if not records:
        raise ValueError("there is no record to summarise: evaluate at least one task")
    names = ["reward", *(name for name in records[0].metrics if all(name in record.metrics for record in records))]
    return {name: _estimate([record.value(name) for record in records], seed) for name in names}


def paired_improvement(
    before: Sequence[EpisodeRecord], after: Sequence[EpisodeRecord], metric: str = "reward", *, seed: int = 0
) -> tuple[float, float, int]:
    """(mean, lower, n): mean of after minus before, task by task, the lower end of its 95% interval (2.5% percentile of
    the bootstrap over tasks), and the number of tasks. Raises ValueError when the two are not of the same tasks."""
    earlier = {record.id: record.value(metric) for record in before}
    later = {record.id: record.value(metric) for record in after}
    if not earlier or earlier.keys() != later.keys():
        raise ValueError(
            f"a paired comparison needs the same tasks: {len(earlier)} before, {len(later)} after, "
            f"{len(earlier.keys() & later.keys())} in common; evaluate both on one list"
        )
    estimate = _estimate([later[task] - earlier[task] for task in earlier], seed)
    return estimate.mean, estimate.lower, estimate.n


def save_records(records: Sequence[EpisodeRecord], path: Path) -> None:
    """One JSON object a line."""
    part = path.with_suffix(".part")  # never half a file under the final name
    part.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records), encoding="utf-8")
    part.replace(path)


def load_records(path: Path) -> list[EpisodeRecord]:
    """What ``save_records`` wrote."""
    return [EpisodeRecord(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _estimate(values: Sequence[float], seed: int) -> Estimate:
    value_N = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.concatenate([rng.choice(value_N, (100, len(value_N))).mean(axis=1) for _ in range(RESAMPLES // 100)])
    lower, upper = np.percentile(means, [2.5, 97.5])
    return Estimate(float(value_N.mean()), float(lower), float(upper), len(value_N))
