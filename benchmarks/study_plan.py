"""The runs of the study: which there are, which are done, which values tuning chose. It starts and plots nothing.

Stages, each in need of the ones before it: ``warm_start``, ``learning_rate`` and ``sft_coef`` (tuning), ``arms``,
``ablations``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from measure import RESULTS
from numpy.typing import NDArray

STAGES = ("warm_start", "learning_rate", "sft_coef", "arms", "ablations")
TUNING = ("learning_rate", "sft_coef")  # stages that tune the setting of their name
FINALISTS = 2
Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One process: a run of ``pact train`` with ``settings``, then evaluations on the splits of ``evaluation``.

    ``values``: what tuning has chosen, or tries here. ``start``: key of the warm start it begins with, None for the
    warm start itself.
    """

    stage: str
    arm: str
    seed: int
    values: Mapping[str, float]
    settings: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    start: str | None

    @property
    def name(self) -> str:
        """Unique within a study, and a file name."""
        tried = f"-{self.values[self.stage]:g}" if self.stage in TUNING else ""
        return f"{self.stage}-{self.arm}{tried}-seed{self.seed}"

    @property
    def key(self) -> str:
        """Hash of all that decides the result. The labels of the study are no part of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


class Unfinished(Exception):
    """A stage whose jobs depend on results that are not there yet."""


class Study:
    """A study as its YAML has it.

    Args:
        name: of the YAML file; names the folders of its records and of its work.
        config: ``settings`` of every run; ``warm_start``: its settings, ``seed``; ``seeds``: lists, of tuning, arms
            and ablations; ``tuning``: the values tried, by setting; ``evaluation``: by stage, name -> split;
            ``arms`` and ``ablations``: name -> ``label``, ``settings`` (for an ablation, on top of those of the arm
            ``ablated``), and for an arm ``tune`` (settings) and ``from_arm`` (setting -> [arm, its tuned setting]).

    Raises:
        ValueError: an arm that is tuned on what is not in ``tuning``, or an ``ablated`` that is no arm.
    """

    def __init__(self, config: Mapping[str, Any], name: str = "study") -> None:
        self.config, self.name = config, name
        self.arms: dict[str, Mapping[str, Any]] = dict(config["arms"])
        self.ablations: dict[str, Mapping[str, Any]] = dict(config["ablations"])
        for name, arm in self.arms.items():
            if unknown := set(arm["tune"]) - set(config["tuning"]):
                raise ValueError(f"arm {name} is tuned on {min(unknown)}: give tuning.{min(unknown)} its values")
        if config["ablated"] not in self.arms:
            raise ValueError(f"ablated: {config['ablated']} is no arm: choose one of {', '.join(self.arms)}")

    @classmethod
    def load(cls, path: Path) -> Study:
        return cls(yaml.safe_load(path.read_text(encoding="utf-8")), path.stem)

    @property
    def records(self) -> Path:
        """The folder of its records, STAGE.jsonl."""
        return RESULTS / self.name

    @property
    def work(self) -> Path:
        """The folder of its runs: models, logs."""
        return Path(__file__).resolve().parents[1] / "runs" / self.name

    def warm_start(self) -> Job:
        warm = self.config["warm_start"]
        settings = {**self.config["settings"], **warm["settings"], "num_rollouts": 0, "sft_coef": 1.0}
        settings |= {"max_steps": 1, "learning_rate": 0.0, "seed": warm["seed"]}  # what comes after it changes nothing
        return Job("warm_start", "warm_start", warm["seed"], {}, settings, self._evaluation("warm_start"), None)

    def jobs(self, stage: str, records: Mapping[str, Record]) -> list[Job]:
        """All jobs of ``stage``; ``records``: by key. Raises `Unfinished` where earlier stages have to choose first."""
        if stage == "warm_start":
            return [self.warm_start()]
        if stage in TUNING:
            return self._tuning(stage, records)
        seeds = self.config["seeds"][stage]
        if stage == "arms":
            return [self._job(stage, name, seed, self.chosen(name, records)) for name in self.arms for seed in seeds]
        values = self.chosen(self.config["ablated"], records)
        return [self._job(stage, name, seed, values) for name in self.ablations for seed in seeds]

    def _tuning(self, stage: str, records: Mapping[str, Record]) -> list[Job]:
        """Those that can be told by now."""
        jobs = []
        for name, arm in self.arms.items():
            if stage in arm["tune"]:
                trials = self.trials(stage, name, records)
                jobs += [job for of_value in trials.values() for job in of_value if job.stage == stage]
        return jobs

    def trials(self, stage: str, name: str, records: Mapping[str, Record]) -> dict[float, list[Job]]:
        """The runs that tune a setting of an arm, by the value tried in rising order.

        All values are tried with the first seed of tuning, the `FINALISTS` best of them (by `settled`) with the other
        seeds too: one run of an unstable setting may be lucky.
        """
        before = self.chosen(name, records, until=stage)
        first, *others = self.config["seeds"]["tuning"]
        jobs = {
            value: [self._trial(stage, name, before, value, first)] for value in sorted(self.config["tuning"][stage])
        }
        if all(of_value[0].key in records for of_value in jobs.values()):
            best = sorted(jobs, key=lambda value: (-settled(records[jobs[value][0].key]), value))[:FINALISTS]
            for value in best:
                jobs[value] += [self._trial(stage, name, before, value, seed) for seed in others]
        return jobs

    def _trial(self, stage: str, name: str, before: Mapping[str, float], value: float, seed: int) -> Job:
        """A run with ``value``: one of the stage before where the arm has had that value there."""
        arm, earlier = self.arms[name], TUNING[: TUNING.index(stage)]
        if earlier and earlier[-1] in arm["tune"] and arm["settings"].get(stage) == value:
            return self._job(earlier[-1], name, seed, before)
        return self._job(stage, name, seed, {**before, stage: value})

    def chosen(self, name: str, records: Mapping[str, Record], until: str | None = None) -> dict[str, float]:
        """The values of an arm that tuning chose, in the order of `TUNING`, those before ``until`` alone.

        Chosen is the finalist with the best mean of `settled` over the seeds of tuning, the smaller one of equals.
        """
        values: dict[str, float] = {}
        for setting, (other, theirs) in self.arms[name].get("from_arm", {}).items():
            values[setting] = self.chosen(other, records)[theirs]
        for stage in TUNING:
            if stage == until:
                break
            if stage in self.arms[name]["tune"]:
                trials = self.trials(stage, name, records)
                for job in (job for of_value in trials.values() for job in of_value):
                    if job.key not in records:
                        raise Unfinished(f"{job.name} comes first")
                seeds = len(self.config["seeds"]["tuning"])
                means = {value: score(jobs, records) for value, jobs in trials.items() if len(jobs) == seeds}
                values[stage] = max(means, key=lambda value: (means[value], -value))
        return values

    def _job(self, stage: str, name: str, seed: int, values: Mapping[str, float]) -> Job:
        arm = self.arms[self.config["ablated"]] if stage == "ablations" else self.arms[name]
        settings = {**self.config["settings"], **arm["settings"], **values}
        if stage == "ablations":
            settings |= self.ablations[name]["settings"]
        settings["seed"] = seed
        return Job(stage, name, seed, values, settings, self._evaluation(stage), self.warm_start().key)

    def _evaluation(self, stage: str) -> Mapping[str, Any]:
        splits: Mapping[str, Any] = self.config["evaluation"].get(stage, {})
        return splits


def score(jobs: Sequence[Job], records: Mapping[str, Record]) -> float:
    """Mean of `settled` over the jobs that are on record."""
    points = [settled(records[job.key]) for job in jobs if job.key in records]
    return sum(points) / len(points)


def settled(record: Record) -> float:
    """Mean of the last two validation points of a run."""
    last = record["curve"]["validation"][-2:]
    return float(sum(last) / len(last))


def load_records(paths: Iterable[Path]) -> dict[str, Record]:
    """Records by key. Raises ValueError for a line that is none."""
    records: dict[str, Record] = {}
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                record = json.loads(line)
                records[record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is no record ({error}): take that line out") from None
    return records


def pack(success: NDArray[np.float64]) -> str:
    """Zeros and ones as hexadecimal digits, the first one highest, zeros added at the end.

    >>> pack(np.array([1, 0, 0, 1, 1.0]))
    '98'
    """
    return np.packbits(success.astype(bool)).tobytes().hex()


def unpack(hits: str, count: int) -> NDArray[np.float64]:
    """The inverse of `pack`.

    >>> unpack("98", 5)
    array([1., 0., 0., 1., 1.])
    """
    return np.unpackbits(np.frombuffer(bytes.fromhex(hits), dtype=np.uint8))[:count].astype(float)
