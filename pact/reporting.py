"""What a run shows: metrics.jsonl, curves.png, the progress bar, peak memory, errors. It decides nothing."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from pact.files import replace_file, write_whole
from pact.rollout import Trajectory
from pact.visible import visible

METRICS_FILE, CURVES_FILE = "metrics.jsonl", "curves.png"
STOP_REASONS = ("answer", "turn_limit", "token_limit", "context_limit")
DRAW_SECONDS = 60.0  # at least, between two drawings at saves

# One panel a row: title, then the metrics of metrics.jsonl drawn in it.
_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("reward", "eval_reward")),
    ("loss, RL", ("loss/rl_prompt", "loss/rl_trace")),
    ("loss, SFT", ("loss/sft",)),
    ("clip fraction", ("clip_fraction/prompt", "clip_fraction/trace")),
    ("entropy", ("entropy/prompt", "entropy/trace")),
    ("KL to the start", ("kl/prompt", "kl/trace")),
    ("turns an episode", ("turns",)),
    ("seconds a step", ("seconds/generate", "seconds/train")),
)


class Meter:
    """Sums of numbers and of what they are divided by, so that meters of steps and processes can be merged."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    @classmethod
    def of(cls, sums: Mapping[str, tuple[float, float]]) -> Meter:
        """The meter with these ``sums``."""
        meter = cls()
        meter.sums.update(sums)
        return meter

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        """Add ``value`` to a mean over ``count`` units: episodes, seconds, steps."""
        total, units = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (total + value, units + count)

    def merge(self, other: Meter) -> None:
        for name, (value, count) in other.sums.items():
            self.add(name, value, count)

    def means(self) -> dict[str, float]:
        """Sum over count by name; what has no count is left out."""
        return {name: value / count for name, (value, count) in self.sums.items() if count}


def meter_episodes(meter: Meter, episodes: Sequence[Sequence[Trajectory]]) -> None:
    """Add what the episodes of each prompt earned, how long they were and why they ended."""
    for attempts in episodes:
        rewards = [episode.score.reward for episode in attempts]
        meter.add("reward_std", statistics.pstdev(rewards))
        meter.add("reward_equal", float(len(set(rewards)) == 1))
        for episode in attempts:
            meter.add("reward", episode.score.reward)
            meter.add("turns", len(episode.turns))
            meter.add("tokens/response", len(episode.ids))
            meter.add("tokens/sampled", sum(episode.sampled))
            for name, value in episode.score.metrics.items():
                meter.add(name, value)
            for reason in STOP_REASONS:
                meter.add(f"stop/{reason}", float(episode.stop_reason == reason))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, oldest first; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class MetricsWriter(TrainerCallback):
    """Appends every log of one phase to ``<run>/metrics.jsonl`` as a flat JSON line and redraws the curves.

    A line holds ``phase`` ("warm_start" or "train"), ``step`` and the logged numbers; a number that is not finite is
    written as null. On resume, lines of this phase past the checkpoint are dropped: those steps are run again. The
    closing summary of transformers is left out: it is of a process, not of a step.
    """

    def __init__(self, run: Path, phase: str) -> None:
        self.path, self.curves, self.phase = run / METRICS_FILE, run / CURVES_FILE, phase
        self._drawn = -math.inf  # when the curves were last drawn
        self._begun = False  # whether this process has written to the file

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.keep(lambda record: record["phase"] != self.phase or record["step"] <= state.global_step)

    def forget_evaluation(self, step: int) -> None:
        """Drop what a process that was killed has written of the evaluation at ``step``: it is run again."""
        at = (self.phase, step)
        self.keep(lambda record: (record["phase"], record["step"]) != at or "eval_reward" not in record)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and "train_runtime" not in (logs or {}):
            self.write(state.global_step, logs or {})

    def write(self, step: int, logs: Mapping[str, Any]) -> None:
        """Append one line; usable outside a training loop (an evaluation before the first step)."""
        record = {"phase": self.phase, "step": step}
        record |= {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in logs.items()
            if isinstance(value, int | float)
        }
        if not self._begun:  # a process that was killed may have left half a line
            self.keep(lambda record: True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Leave only the ``wanted`` records in the file."""
        self._begun = True
        if self.path.exists():
            write_whole(self.path, "".join(json.dumps(r) + "\n" for r in read_metrics(self.path) if wanted(r)))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and time.monotonic() - self._drawn > DRAW_SECONDS:
            draw_curves(self.path, self.curves)
            self._drawn = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            draw_curves(self.path, self.curves)


class RewardProgress(ProgressCallback):
    """The progress bar, with the current reward and loss beside it instead of a printed dictionary at every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        shown = {key: f"{logs[key]:.4g}" for key in ("reward", "eval_reward", "loss") if key in logs}
        if "eval_reward" in logs:
            self.training_bar.write(f"step {state.global_step}: eval_reward {shown['eval_reward']}")
        elif shown:
            self.training_bar.set_postfix(shown)


class RewardPrinter(TrainerCallback):
    """One short line a log: what `RewardProgress` shows, for ``--disable_tqdm``."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        shown = [f"{key} {logs[key]:.4g}" for key in ("reward", "eval_reward", "loss") if logs and key in logs]
        if state.is_world_process_zero and shown:
            print(f"step {state.global_step}/{state.max_steps}: {', '.join(shown)}", flush=True)


def draw_curves(metrics: Path, image: Path) -> None:
    """Draw the panels of ``_PANELS`` from a metrics.jsonl; warm-start steps come left of zero."""
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    warm = max((r["step"] for r in records if r["phase"] == "warm_start"), default=0)
    figure = Figure(figsize=(16, 7))
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.08, top=0.94, hspace=0.35)
    for axes, (title, names) in zip(figure.subplots(2, 4).flat, _PANELS, strict=True):
        for name in names:
            points = [
                (record["step"] - (warm if record["phase"] == "warm_start" else 0), record[name])
                for record in records
                if record.get(name) is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 40 else "", linewidth=1)
        axes.set_title(title)
        axes.set_xlabel("optimiser step")
        if axes.lines:
            axes.legend(fontsize="small")
        if warm:
            axes.axvline(0, color="grey", linewidth=0.5)
    replace_file(image, lambda path: figure.savefig(path, dpi=100, format="png"))


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak memory of this process: allocated on the accelerator, or resident (VmHWM) on CPU; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = (line.split() for line in status.read_text(encoding="utf-8").splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[0] == "VmHWM:"), None)


def exit_code(command: Callable[[], None], interrupted: str) -> int:
    """Run ``command`` with errors as one line on stderr (a traceback with PACT_DEBUG=1).

    Returns 0 when it is done, 2 for what the user can mend (or the error's own ``exit_code``), 130 for an interrupt;
    ``interrupted`` says how to go on.
    """
    try:
        command()
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if os.environ.get("PACT_DEBUG"):
            raise
        print(f"pact: error: {visible(' '.join(str(error).split()))}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        print(f"pact: interrupted; {interrupted}", file=sys.stderr)
        return 130
    return 0
