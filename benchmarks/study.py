"""The study: six ways of training and the parts of PACT, on the toybox (benchmarks/STUDY.md). It draws nothing.

python benchmarks/study.py [STUDY.yaml] [--plan] [--hours H] [--workers 2]

Every run is a process of its own; what is recorded in results/STUDY/ is not run again, so the command goes on where it
stopped; runs/STUDY/progress.log says how far it is. --plan prints what is left and about how long it takes; --hours
begins no run that would end after that time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from threading import Lock

from study_plan import STAGES, Job, Record, Study, Unfinished, load_records

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "study.yaml"
GUESS = {"warm_start": 240.0}  # seconds of a run before one of its stage has been measured
USUAL = 330.0


class Runner:
    """Runs jobs, ``workers`` at once, and appends their records to ``records``/STAGE.jsonl.

    Raises RuntimeError, after the runs under way have ended, when one fails; its log stays in ``work``.
    """

    def __init__(self, study: Study, records: Path, work: Path, workers: int, until: float) -> None:
        self.study, self.folder, self.work, self.workers, self.until = study, records, work, workers, until
        self.records = load_records(sorted(records.glob("*.jsonl")))
        self._lock = Lock()

    def missing(self, stage: str) -> list[Job]:
        """The jobs of ``stage`` without a record. Raises Unfinished as `Study.jobs`."""
        return [job for job in self.study.jobs(stage, self.records) if job.key not in self.records]

    def seconds(self, stage: str) -> float:
        """About what a run of ``stage`` takes."""
        took = [record["cost"]["seconds"] for record in self.records.values() if record["stage"] == stage]
        return sum(took) / len(took) if took else GUESS.get(stage, USUAL)

    def run(self) -> bool:
        """Whether the study is complete."""
        self.work.mkdir(parents=True, exist_ok=True)
        if not self._warm():
            return False
        for stage in STAGES[1:]:
            while jobs := self.missing(stage):  # tuning has two rounds
                with ThreadPoolExecutor(self.workers) as pool:
                    if not all(list(pool.map(self._one, jobs))):
                        return False
        return True

    def _warm(self) -> bool:
        """The warm start that all runs begin with: run where its model is not there, and the same as on record."""
        job = self.study.warm_start()
        known = self.records.get(job.key)
        here = self.work / "warm_start.json"
        if here.is_file() and json.loads(here.read_text())["key"] == job.key:
            return True
        if not self._one(job):
            return False
        now = json.loads((self.work / f"{job.name}.json").read_text())
        if known is not None and now["weights"] != known["weights"]:
            self.say(f"warm start: weights {now['weights']} here, {known['weights']} on record (another processor?)")
        here.write_text(json.dumps({"key": job.key, "name": job.name}))
        return True

    def _one(self, job: Job) -> bool:
        """Run one job, unless time is short: then False."""
        if time.time() + self.seconds(job.stage) > self.until:
            return False
        files = [self.work / f"{job.name}{end}" for end in (".job", ".json", ".log")]
        files[0].write_text(json.dumps(asdict(job)))
        files[1].unlink(missing_ok=True)
        begin = time.time()
        with files[2].open("w") as log:
            command = [sys.executable, str(HERE / "study_run.py"), str(files[0]), str(files[1])]
            paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
            code = subprocess.run(command, cwd=self.work, stdout=log, stderr=log, env=environment).returncode
        if code:
            raise RuntimeError(f"{job.name} failed with exit code {code}: see {files[2]}")
        record = json.loads(files[1].read_text())
        with self._lock:
            self._keep(record)
            left = len(self.missing(job.stage))
            scores = ", ".join(f"{name} {split['success']:.3f}" for name, split in record["final"].items())
            points = " ".join(f"{value:.3f}" for value in record["curve"]["validation"])
            self.say(f"{job.name}: {points}; {scores}; {time.time() - begin:.0f} s; {left} left in {job.stage}")
        return True

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "progress.log").open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M} {text}\n")

    def _keep(self, record: Record) -> None:
        if record["key"] in self.records:
            return
        self.records[record["key"]] = record
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{record['stage']}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def plan(runner: Runner) -> str:
    """Runs that are left, stage by stage, and the time they take."""
    lines, total = [], 0.0
    for stage in STAGES:
        try:
            jobs = runner.study.jobs(stage, runner.records)
            left = len(runner.missing(stage))
        except Unfinished:
            jobs = runner.study.jobs(stage, Everything())
            left = len(jobs)
        hours = left * runner.seconds(stage) / 3600
        total += hours
        lines.append(f"{stage:14} {len(jobs):3} runs, {left:3} left, {hours:5.1f} core-hours")
    return "\n".join([*lines, f"{'together':14} {total:.1f} core-hours, {total / runner.workers:.1f} hours"])


class Everything(dict[str, Record]):
    """Records of a study that is done, for counting runs: every key has one, and no value is better than another."""

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: str) -> Record:
        return {"curve": {"validation": [0.0]}}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "config", type=Path, nargs="?", default=CONFIG, metavar="STUDY.yaml", help="default: study.yaml"
    )
    parser.add_argument("--plan", action="store_true", help="print the runs and their time")
    parser.add_argument("--hours", type=float, default=float("inf"), help="begin no run that would end later")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, a thread each")
    options = parser.parse_args(argv)
    study = Study.load(options.config)
    runner = Runner(study, study.records, study.work, options.workers, time.time() + 3600 * options.hours)
    if options.plan:
        print(plan(runner))
        return 0
    runner.say(plan(runner))
    runner.say("the study is complete" if runner.run() else "time is up: the same command goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
