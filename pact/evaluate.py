"""Evaluation: episodes to per-task records, tables of means with bootstrap intervals, paired comparisons. It trains
nothing and owns no folder (``pact.eval`` does)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pact.envs.base import Environment, Message, Staged, Task
from pact.rollout import GREEDY, CallRules, Generator, RolloutLimits, Sampling, Trajectory, run_rollouts

RESAMPLES = 10_000
HERMES = CallRules()
TOTAL = "total"

Table = dict[str, dict[str, "Estimate"]]


@dataclass(frozen=True)
class EpisodeRecord:
    """The outcome of one task: what to keep of an evaluation.

    ``turns`` counts assistant turns, ``response_tokens`` everything after the prompt; ``group`` is the task's row of
    the table. ``messages``: those after the prompt. ``artifact`` (the score's) is None unless asked for.
    """

    id: str
    reward: float
    metrics: dict[str, float]
    turns: int
    stop_reason: str
    group: str | None = None
    prompt_tokens: int = 0
    response_tokens: int = 0
    messages: list[Message] | None = field(default=None, repr=False)
    artifact: Any = field(default=None, repr=False)

    @property
    def overlong(self) -> bool:
        """The prompt alone filled the context: there was no turn."""
        return self.turns == 0 and self.stop_reason == "context_limit"

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

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.lower:.4f}, {self.upper:.4f}]"


@dataclass(frozen=True)
class Play:
    """How evaluation episodes are played. ``batch_size``: episodes that run together (None: all the engine holds).

    With a temperature above 0 the random stream of an episode depends on ``seed``, its batch and its place there.
    """

    limits: RolloutLimits | None = None
    sampling: Sampling = GREEDY
    rules: CallRules = HERMES
    batch_size: int | None = None
    seed: int = 0


def evaluate(
    engine: Generator,
    env: Environment,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    limits: RolloutLimits | None = None,
    sampling: Sampling = GREEDY,
    rules: CallRules = HERMES,
    batch_size: int | None = None,
    seed: int = 0,
) -> list[EpisodeRecord]:
    """One episode a task, records in the order of ``tasks``, without artifacts. A prompt that does not fit the context
    is an episode of no turn. Stages of a ``Staged`` environment are played one after the other.

    Raises ValueError for no task, for two tasks of one id or a reward that is not finite, otherwise as
    ``run_rollouts``.
    """
    play = Play(limits, sampling, rules, batch_size, seed)
    records: dict[str, EpisodeRecord] = {}
    for _, stage in _stages(env, tasks):
        records |= {record.id: record for record in _play(engine, env, tokenizer, stage, play, seed, artifacts=False)}
    return [records[task.id] for task in tasks]


def evaluate_in_batches(
    engine: Generator,
    env: Environment,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    play: Play,
    *,
    done: Mapping[str, EpisodeRecord] | None = None,
    prepare: Callable[[Sequence[Task]], None] = lambda tasks: None,
) -> Iterator[list[EpisodeRecord]]:
    """Yield the records of one batch after the other, with messages and artifacts, so that they can be kept at once.

    Args:
        done: records of an earlier, interrupted evaluation of the same ``tasks``, by task id; those are not played
            again, and a ``Staged`` environment hears of them.
        prepare: called with the tasks of each batch, as they stand, before it is played.

    Raises as ``evaluate``.
    """
    done = done or {}
    size = min(play.batch_size or engine.max_batch, engine.max_batch)
    for first, stage in _stages(env, tasks):
        for start in range(0, len(stage), size):
            batch = stage[start : start + size]
            if isinstance(env, Staged):
                for task in batch:
                    if task.id in done:
                        env.keep(task, done[task.id].artifact)
            missing = [task for task in batch if task.id not in done]
            if missing:
                seed = _batch_seed(play.seed, first + start)
                yield _play(engine, env, tokenizer, missing, play, seed, artifacts=True, prepare=prepare)


def _stages(env: Environment, tasks: Sequence[Task]) -> list[tuple[int, list[Task]]]:
    """The tasks of each stage in their order, and how many come before them."""
    ids = [task.id for task in tasks]
    if not ids:
        raise ValueError("there is no task to evaluate: give at least one")
    if len(set(ids)) < len(ids):
        raise ValueError("two tasks share an id, so records could not be told apart: make the ids unique")
    stages: dict[int, list[Task]] = {}
    for task in tasks:
        stages.setdefault(env.stage(task) if isinstance(env, Staged) else 0, []).append(task)
    ordered = [stages[stage] for stage in sorted(stages)]
    return [(sum(map(len, ordered[:place])), stage) for place, stage in enumerate(ordered)]


def _play(
    engine: Generator,
    env: Environment,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    play: Play,
    seed: int,
    *,
    artifacts: bool,
    prepare: Callable[[Sequence[Task]], None] = lambda tasks: None,
) -> list[EpisodeRecord]:
    """Records of ``tasks``, all of one stage."""
    ready = [env.ready(task) for task in tasks] if isinstance(env, Staged) else tasks
    prepare(ready)
    episodes = run_rollouts(
        env,
        ready,
        engine,
        tokenizer,
        n=1,
        sampling=play.sampling,
        limits=play.limits,
        rules=play.rules,
        seed=seed,
        batch_size=play.batch_size,
        fail_long_prompts=True,
    )
    for task, [episode] in zip(tasks, episodes):
        if not math.isfinite(episode.score.reward):
            raise ValueError(f"the reward of task {task.id!r} is {episode.score.reward}: mend the environment's score")
        if isinstance(env, Staged):
            env.keep(task, episode.score.artifact)
    return [_record(task, episode, artifacts) for task, [episode] in zip(tasks, episodes)]


def _record(task: Task, episode: Trajectory, artifacts: bool) -> EpisodeRecord:
    return EpisodeRecord(
        id=task.id,
        reward=episode.score.reward,
        metrics=dict(episode.score.metrics),
        turns=len(episode.turns),
        stop_reason=episode.stop_reason,
        group=task.group,
        prompt_tokens=len(episode.prompt_ids),
        response_tokens=len(episode.ids),
        messages=episode.messages,
        artifact=episode.score.artifact if artifacts else None,
    )


def _batch_seed(seed: int, first: int) -> int:
    """Another stream for every batch; the first has the evaluation's own."""
    return seed if first == 0 else int(np.random.SeedSequence((seed, first)).generate_state(1, np.uint64)[0])


def counted(records: Sequence[EpisodeRecord]) -> list[EpisodeRecord]:
    """The records that enter tables: those with a group, or all where none has one."""
    return [record for record in records if record.group is not None] or list(records)


def summarize(records: Sequence[EpisodeRecord], *, seed: int = 0) -> dict[str, Estimate]:
    """``reward`` and every metric that all counted records carry: mean and 95% interval, by name."""
    records = counted(records)
    if not records:
        raise ValueError("there is no record to summarise: evaluate at least one task")
    return {name: _estimate([[record.value(name) for record in records]], seed) for name in _names(records)}


def tabulate(
    records: Sequence[EpisodeRecord], averages: Mapping[str, Sequence[str]] | None = None, *, seed: int = 0
) -> Table:
    """Row -> metric -> estimate, over the counted records.

    Rows: every group in order of appearance, every row of ``averages`` (row -> groups; the mean of the groups' means,
    resampled within each group; left out unless records of all its groups are there), and "total", over all records.
    """
    records = counted(records)
    groups: dict[str, list[EpisodeRecord]] = {}
    for record in records:
        if record.group is not None:
            groups.setdefault(record.group, []).append(record)
    table = {group: summarize(members, seed=seed) for group, members in groups.items()}
    for row, of_row in (averages or {}).items():
        if of_row and all(group in groups for group in of_row):
            members = [groups[group] for group in of_row]
            names = _names([record for group in members for record in group])
            table[row] = {
                name: _estimate([[record.value(name) for record in group] for group in members], seed) for name in names
            }
    return table | {TOTAL: summarize(records, seed=seed)}


def differences(before: Sequence[EpisodeRecord], after: Sequence[EpisodeRecord]) -> list[EpisodeRecord]:
    """After minus before, task by task, as records of differences, fit for ``tabulate``: rewards and common metrics.

    Raises ValueError when the two are not of the same tasks.
    """
    earlier = {record.id: record for record in counted(before)}
    later = {record.id: record for record in counted(after)}
    if not earlier or earlier.keys() != later.keys():
        raise ValueError(
            f"a paired comparison needs the same tasks: {len(earlier)} before, {len(later)} after, "
            f"{len(earlier.keys() & later.keys())} in common; evaluate both on one list"
        )
    return [
        EpisodeRecord(
            id=task,
            reward=later[task].reward - record.reward,
            metrics={
                name: later[task].metrics[name] - value
                for name, value in record.metrics.items()
                if name in later[task].metrics
            },
            turns=later[task].turns - record.turns,
            stop_reason=later[task].stop_reason,
            group=record.group,
        )
        for task, record in earlier.items()
    ]


def paired_improvement(
    before: Sequence[EpisodeRecord], after: Sequence[EpisodeRecord], metric: str = "reward", *, seed: int = 0
) -> tuple[float, float, int]:
    """(mean, lower, n): mean of after minus before, task by task, the lower end of its 95% interval (2.5% percentile of
    the bootstrap over tasks), and the number of tasks. Raises ValueError when the two are not of the same tasks."""
    estimate = _estimate([[record.value(metric) for record in differences(before, after)]], seed)
    return estimate.mean, estimate.lower, estimate.n


def markdown(table: Table) -> str:
    """The table as Markdown: n, then mean and interval of every metric, and of the reward where it is none of them."""
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    if any(all(row.get(name) == row.get("reward") for row in table.values()) for name in names if name != "reward"):
        names.remove("reward")
    lines = [["", "n", *names], ["---"] + ["---:"] * (1 + len(names))]
    for row, metrics in table.items():
        n = next(iter(metrics.values())).n
        lines.append([row, str(n), *(str(metrics[name]) if name in metrics else "" for name in names)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def save_records(records: Sequence[EpisodeRecord], path: Path) -> None:
    """One JSON object a line."""
    part = path.with_suffix(".part")  # never half a file under the final name
    part.write_text("".join(record_line(record) for record in records), encoding="utf-8")
    part.replace(path)


def record_line(record: EpisodeRecord) -> str:
    """The line of ``save_records``; what was not asked for is left out."""
    return json.dumps({key: value for key, value in asdict(record).items() if value is not None}) + "\n"


def load_records(path: Path) -> list[EpisodeRecord]:
    """What ``save_records`` wrote."""
    return [EpisodeRecord(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _names(records: Sequence[EpisodeRecord]) -> list[str]:
    return ["reward", *(name for name in records[0].metrics if all(name in record.metrics for record in records))]


def _estimate(strata: Sequence[Sequence[float]], seed: int) -> Estimate:
    """The mean of the strata's means, each stratum resampled on its own; one stratum: the plain bootstrap."""
    rng = np.random.default_rng(seed)
    mean_S, resampled_SR = [], []
    for values in strata:
        value_N = np.asarray(values, dtype=np.float64)
        mean_S.append(value_N.mean())
        draws = [rng.choice(value_N, (100, len(value_N))).mean(axis=1) for _ in range(RESAMPLES // 100)]
        resampled_SR.append(np.concatenate(draws))
    lower, upper = np.percentile(np.mean(resampled_SR, axis=0), [2.5, 97.5])
    return Estimate(float(np.mean(mean_S)), float(lower), float(upper), sum(map(len, strata)))
