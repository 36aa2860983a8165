"""Curves of a run: panels of metrics by component and branch, placed for drawing. Reads no files; knows no tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 190, 44, 412, 8, 170
MOST_POINTS = 400  # of a curve; more are averaged in equal stretches of steps
DOTTED = 25  # points below which each has a dot
SMOOTHED = 60  # points from which a running mean is drawn over the curve
SMALLEST, LARGEST = 1e-100, 1e100  # what is drawn lies between them or is 0, so that no step of the drawing overflows
WINDOW = 0.05  # of the running mean, share of the points


@dataclass(frozen=True)
class Curve:
    """One metric of metrics.jsonl in a panel: its name there, what it is called, its colour, dashed or not."""

    metric: str
    label: str
    colour: str
    dash: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves over optimiser steps in one frame. ``phase``: only that one's; None: the warm start's left of zero too."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    phase: str | None = None


def _one(metric: str, label: str, colour: str = "c-prompt") -> tuple[Curve, ...]:
    return (Curve(metric, label, colour),)


def _by_component(stem: str) -> tuple[Curve, ...]:
    parts = ("reasoning", "tool_call", "answer")
    return tuple(Curve(f"{stem}_{part}", part.replace("_", " "), f"c-{part}") for part in parts)


def _by_branch(stem: str) -> tuple[Curve, ...]:
    return (
        Curve(f"{stem}prompt", "prompt-only", "c-branch-prompt"),
        Curve(f"{stem}trace", "trace-conditioned", "c-branch-trace", dash=True),
    )


_REWARDS = (Curve("reward", "training rollouts", "c-branch-prompt"), Curve("eval_reward", "evaluation", "c-answer"))
_LATENT = (
    Curve("latent/bound", "bound through the trace", "c-reasoning"),
    Curve("latent/logp_rollout", "log-prob of the rollout", "c-observation", dash=True),
)
_STOPS = (
    Curve("stop/answer", "answer", "c-observation"),
    Curve("stop/turn_limit", "turn limit", "c-tool_call"),
    Curve("stop/token_limit", "token limit", "c-answer"),
    Curve("stop/context_limit", "context limit", "c-prompt"),
)
_SECONDS = (
    Curve("seconds/generate", "rollouts", "c-observation"),
    Curve("seconds/train", "update", "c-reasoning"),
    Curve("seconds/logprob", "log-probs", "c-prompt"),
)
PANELS = (
    Panel("Reward", "mean of an episode", _REWARDS),
    Panel("RL loss", "by branch", _by_branch("loss/rl_"), "train"),
    Panel("Supervised loss", "sft_coef included", _one("loss/sft", "SFT", "c-reasoning"), "train"),
    Panel("Warm start", "its supervised loss", _one("loss/sft", "SFT", "c-reasoning"), "warm_start"),
    Panel("Log-prob of the trace", "nats a token, by component", _by_component("logp/sft")),
    Panel("Supervised tokens", "a step, by component", _by_component("tokens/sft"), "train"),
    Panel("Entropy, prompt-only", "nats a token, by component", _by_component("entropy/prompt")),
    Panel("Entropy, trace-conditioned", "nats a token, by component", _by_component("entropy/trace")),
    Panel("Log-prob of rollouts", "nats a token, by branch", _by_branch("logp/")),
    Panel("Ratio", "mean of a token, by branch", _by_branch("ratio/")),
    Panel("Clipped", "share of tokens, by branch", _by_branch("clip_fraction/")),
    Panel("KL to the start", "k3, nats a token, by branch", _by_branch("kl/")),
    Panel("Engine against trainer", "gap of log-probs, nats a token", _one("engine/gap", "gap")),
    Panel("Latent-trace view", "nats a rollout", _LATENT),
    Panel("How episodes end", "share", _STOPS),
    Panel("Turns", "an episode", _one("turns", "turns", "c-observation")),
    Panel("Prompts with equal rewards", "share; they teach RL nothing", _one("reward_equal", "equal")),
    Panel("Unique / dense tokens", "what the tree leaves to compute", _one("tokens/unique_dense_ratio", "share")),
    Panel("Seconds", "a step", _SECONDS, "train"),
    Panel("Gradient norm", "before clipping", _one("grad_norm", "norm"), "train"),
    Panel("Learning rate", "", _one("learning_rate", "rate"), "train"),
)

Points = list[tuple[float, float]]


def series(records: Sequence[Mapping[str, Any]], metric: str, phase: str | None = None) -> Points:
    """(step, value) of ``metric`` in step order, of one phase or of both: then the warm start comes left of zero."""
    warm = max((r["step"] for r in records if r["phase"] == "warm_start"), default=0) if phase is None else 0
    points: dict[float, float] = {}
    for record in records:
        value = record.get(metric)
        if phase in (None, record["phase"]) and isinstance(value, int | float) and math.isfinite(value):
            drawn = 0.0 if abs(value) < SMALLEST else max(-LARGEST, min(float(value), LARGEST))
            points[record["step"] - (warm if record["phase"] == "warm_start" else 0)] = drawn
    return sorted(points.items())


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most about ``most`` points: means of stretches of equal length in steps, where there are more."""
    if len(points) <= most:
        return points
    first, last = points[0][0], points[-1][0]
    stretches: dict[int, Points] = {}
    for point in points:
        stretches.setdefault(int((point[0] - first) / (last - first) * (most - 1)), []).append(point)
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in stretches.values()]


def draw_panels(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every panel that has data, placed: what the template draws, and under ``hover`` what its script reads."""
    drawn = []
    for panel in PANELS:
        found = [(curve, series(records, curve.metric, panel.phase)) for curve in panel.curves]
        found = [(curve, points) for curve, points in found if points]
        # Next to others a curve of zeros is that of a branch or part that never occurs.
        found = [(curve, points) for curve, points in found if any(y for _, y in points)] or found
        if found:
            drawn.append(_place(panel, [(curve, thinned(points)) for curve, points in found]))
    return drawn


def _place(panel: Panel, curves: list[tuple[Curve, Points]]) -> dict[str, Any]:
    """The lines, dots and axes of one panel in the units of its drawing."""
    steps = [x for _, points in curves for x, _ in points]
    values = [y for _, points in curves for _, y in points]
    low_x, high_x = min(steps), max(steps)
    if low_x == high_x:
        low_x, high_x = low_x - 1, high_x + 1
    ticks = nice_ticks(min(values), max(values))
    low_y, high_y = min(ticks[0], min(values)), max(ticks[-1], max(values))

    def at_x(x: float) -> float:
        return round(LEFT + (x - low_x) / (high_x - low_x) * (RIGHT - LEFT), 1)

    def at_y(y: float) -> float:
        return round(TOP + (high_y - y) / (high_y - low_y) * (BOTTOM - TOP), 1)

    lines, dots, keys = [], [], []
    for curve, points in curves:
        placed = [(at_x(x), at_y(y)) for x, y in points]
        classes = f"{curve.colour} dash" if curve.dash else curve.colour
        if len(points) >= SMOOTHED:
            lines.append({"classes": f"{curve.colour} raw", "path": _path(placed)})
            placed = running_mean(placed)
        lines.append({"classes": classes, "path": _path(placed)})
        dots += [(x, y, curve.colour) for x, y in placed if len(points) < DOTTED]
        keys.append({"classes": classes, "label": curve.label, "last": f"{points[-1][1]:.4g}"})
    return {
        "title": panel.title,
        "unit": panel.unit,
        **{"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        "rows": [(at_y(tick), f"{tick:.4g}") for tick in ticks],
        "columns": [(at_x(tick), f"{tick:.6g}") for tick in nice_ticks(low_x, high_x)],
        "start": at_x(0) if low_x < 0 < high_x else None,
        "lines": lines,
        "dots": dots,
        "legend": keys,
        "hover": {
            **{"left": LEFT, "right": RIGHT, "low": low_x, "high": high_x},
            "curves": [[[round(x, 6) for x, _ in p], [float(f"{y:.6g}") for _, y in p]] for _, p in curves],
        },
    }


def running_mean(points: Points) -> Points:
    """Each point's y as the mean of a window around it, cut off at the ends."""
    reach = max(1, round(len(points) * WINDOW / 2))
    means = []
    for place, (x, _) in enumerate(points):
        near = points[max(0, place - reach) : place + reach + 1]
        means.append((x, sum(y for _, y in near) / len(near)))
    return means


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """About ``wanted`` round numbers within [low, high]; around a constant, on both sides of it."""
    if high - low < 1e-9 * max(abs(low), abs(high)) or high == low:
        room = abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
    raw = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _path(points: Points) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
