"""Tables and plots of the studies, from the records in results/STUDY/ alone. It runs nothing.

python benchmarks/study_report.py [--check]

writes the plots results/STUDY/*.png and the tables between the marks of STUDY.md and README.md; --check writes nothing
and fails where a table is not what the records give.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from study_plan import STAGES, TUNING, Record, Study, Unfinished, load_records, score, unpack

HERE = Path(__file__).resolve().parent
STUDIES = (HERE / "study.yaml", HERE / "smollm2.yaml")
PAGES = (HERE / "STUDY.md", HERE.parent / "README.md")
RESAMPLES = 10_000
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Arm:
    """The finished runs of one arm or ablation, seeds in rising order."""

    name: str
    label: str
    runs: list[Record]

    def hits(self, split: str) -> Array:
        """Successes [seeds, tasks] on ``split``: the same tasks in every arm."""
        return np.array([unpack(run["final"][split]["hits"], run["final"][split]["tasks"]) for run in self.runs])

    def has(self, split: str) -> bool:
        return bool(self.runs) and all(split in run["final"] for run in self.runs)


def bootstrap(hits: Sequence[Array], statistic: Callable[..., Array], seed: int = 0) -> Array:
    """``statistic`` of the mean success of every arm in ``hits`` [seeds, tasks], resampled: tasks once for all arms
    (they are the same), seeds of each arm on their own. Returns [RESAMPLES]."""
    rng = np.random.default_rng(seed)
    tasks = min(one.shape[1] for one in hits)
    weight_RT = rng.multinomial(tasks, [1 / tasks] * tasks, RESAMPLES) / tasks
    means = []
    for one in hits:
        seeds = len(one)
        weight_RS = rng.multinomial(seeds, [1 / seeds] * seeds, RESAMPLES) / seeds
        means.append(np.einsum("rs,rs->r", weight_RS, weight_RT @ one.T))
    return statistic(*means)


def interval(resampled: Array) -> tuple[float, float]:
    """The 95% percentile interval."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def p_value(resampled: Array) -> float:
    """Two-sided: twice the share of resampled differences on the other side of 0; at least 1 / RESAMPLES."""
    share = min(np.mean(resampled <= 0), np.mean(resampled >= 0))
    return float(min(1.0, max(2 * share, 1 / RESAMPLES)))


def estimate(arm: Arm, split: str) -> str:
    hits = arm.hits(split)
    low, high = interval(bootstrap([hits], lambda mean: mean))
    return f"{hits.mean():.3f} [{low:.3f}, {high:.3f}]"


def difference(one: Arm, other: Arm, split: str) -> tuple[float, float, float, float]:
    """Mean of ``one`` minus ``other`` on the same tasks, its 95% interval, and p."""
    pair = [one.hits(split), other.hits(split)]
    resampled = bootstrap(pair, lambda a, b: a - b)
    return float(pair[0].mean() - pair[1].mean()), *interval(resampled), p_value(resampled)


def calls(arm: Arm) -> str:
    """Tool calls an episode on test tasks: who tries again makes more."""
    return f"{np.mean([run['final']['test']['calls'] for run in arm.runs]):.1f}"


def reliance(arm: Arm) -> str:
    """Success with the trace in the prompt minus without, on the tasks of the former."""
    given = arm.hits("with_trace")
    alone = arm.hits("test")[:, : given.shape[1]]
    low, high = interval(bootstrap([given, alone], lambda a, b: a - b))
    return f"{given.mean() - alone.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def arms_of(study: Study, records: Mapping[str, Record], stage: str) -> list[Arm]:
    """Arms (or ablations) in the order of the YAML, with the runs that are there."""
    try:
        jobs = study.jobs(stage, records)
    except Unfinished:
        return []
    names = study.arms if stage == "arms" else study.ablations
    found = []
    for name, entry in names.items():
        runs = [records[job.key] for job in jobs if job.arm == name and job.key in records]
        if runs:
            found.append(Arm(name, entry["label"], sorted(runs, key=lambda run: run["seed"])))
    return found


def progress_table(study: Study, records: Mapping[str, Record]) -> str:
    """Runs on record and their time, stage by stage."""
    rows = []
    for stage in STAGES:
        runs = [record for record in records.values() if record["stage"] == stage]
        try:
            jobs = study.jobs(stage, records)
            done = [records[job.key] for job in jobs if job.key in records]
            of = str(len(jobs))
        except Unfinished:
            done, of = runs, "waits for tuning"
        hours = sum(run["cost"]["seconds"] for run in done) / 3600
        rows.append([stage, str(len(done)), of, f"{hours:.1f}"])
    return table(["stage", "runs on record", "of", "core-hours"], rows)


def warm_table(study: Study, records: Mapping[str, Record]) -> str:
    """What the warm start can do."""
    record = records.get(study.warm_start().key)
    if record is None:
        return "not run yet\n"
    final = record["final"]
    counts = np.array(final["groups"]["hits"])
    n = final["groups"]["rollouts"]
    return table(
        ["warm start", "value"],
        [
            ["success, validation, sampled", f"{final['validation']['success']:.3f}"],
            ["success with the trace in the prompt, the same tasks", f"{final['with_trace']['success']:.3f}"],
            [f"pass@{n} on {len(counts)} validation tasks", f"{np.mean(counts > 0):.3f}"],
            [f"groups of {n} with both outcomes", f"{np.mean((counts > 0) & (counts < n)):.3f}"],
        ],
    )


def tuning_table(study: Study, records: Mapping[str, Record]) -> str:
    """What every value tried gave, the mean over its seeds (their number where there are several); the chosen one in
    bold."""
    rows = []
    for stage in TUNING:
        for name, arm in study.arms.items():
            if stage not in arm["tune"]:
                continue
            try:
                trials, chosen = study.trials(stage, name, records), study.chosen(name, records)[stage]
            except Unfinished:
                continue
            cells = []
            for value, jobs in trials.items():
                seeds = f" ({len(jobs)} seeds)" if len(jobs) > 1 else ""
                cell = f"{score(jobs, records):.3f}"
                cells.append(f"{value:g}: {f'**{cell}**' if value == chosen else cell}{seeds}")
            rows.append([arm["label"], stage, ", ".join(cells)])
    return table(["arm", "tuned", "value: validation"], rows)


def final_table(study: Study, records: Mapping[str, Record]) -> str:
    """Every arm on the test splits, and its difference from the arm that is ablated (PACT)."""
    arms = arms_of(study, records, "arms")
    ours = next((arm for arm in arms if arm.name == study.config["ablated"]), None)
    rows = []
    for arm in arms:
        against = "" if ours is None or arm is ours else _against(ours, arm)
        rows.append(
            [
                arm.label,
                str(len(arm.runs)),
                estimate(arm, "test"),
                against,
                *(estimate(arm, split) if arm.has(split) else "" for split in ("unseen", "longer")),
                reliance(arm),
                calls(arm),
            ]
        )
    head = ["arm", "seeds", "test", "PACT minus it, p", "unseen", "longer", "reliance on the trace", "calls an episode"]
    return table(head, rows)


def summary_table(study: Study, records: Mapping[str, Record]) -> str:
    """The arms in short, for a page on something else."""
    rows = [
        [arm.label, *(estimate(arm, split) for split in ("test", "unseen"))] for arm in arms_of(study, records, "arms")
    ]
    return table(["arm", "test", "unseen tools"], rows)


def _against(ours: Arm, arm: Arm) -> str:
    mean, low, high, p = difference(ours, arm, "test")
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}], p {p:.4f}"


def whole_method(study: Study, records: Mapping[str, Record]) -> Arm | None:
    """The arm that is ablated, with the seeds of the ablations."""
    seeds = study.config["seeds"]["ablations"]
    for arm in arms_of(study, records, "arms"):
        if arm.name == study.config["ablated"]:
            runs = [run for run in arm.runs if run["seed"] in seeds]
            return Arm(arm.name, arm.label, runs) if runs else None
    return None


def ablation_table(study: Study, records: Mapping[str, Record]) -> str:
    """Every ablation beside the whole method with the same seeds."""
    ours = whole_method(study, records)
    if ours is None:
        return "not run yet\n"
    rows = []
    for arm in [ours, *arms_of(study, records, "ablations")]:
        label, against = ("nothing changed", "") if arm is ours else (arm.label, _against(ours, arm))
        rows.append([label, str(len(arm.runs)), estimate(arm, "test"), against, reliance(arm), calls(arm)])
    head = ["PACT with", "seeds", "test", "PACT minus it, p", "reliance on the trace", "calls an episode"]
    return table(head, rows)


def cost_table(study: Study, records: Mapping[str, Record]) -> str:
    rows = []
    for arm in arms_of(study, records, "arms"):
        costs = [run["cost"] for run in arm.runs]

        def mean(name: str, costs: list[dict[str, float]] = costs) -> float:
            return float(np.mean([cost[name] for cost in costs]))

        saved = mean("dense_tokens") / mean("trained_tokens")
        rows.append(
            [
                arm.label,
                f"{mean('sampled_tokens') / 1e3:,.0f}",
                f"{mean('trained_tokens') / 1e3:,.0f}",
                f"{saved:.2f}",
                f"{mean('seconds_generate'):,.0f}",
                f"{mean('seconds_train'):,.0f}",
                f"{mean('seconds_run'):,.0f}",
            ]
        )
    head = ["arm", "sampled, 1,000 tokens", "computed", "dense/computed", "s sampling", "s training", "s whole run"]
    return table(head, rows)


def gradient_table(study: Study, records: Mapping[str, Record]) -> str:
    """What study_gradients.py recorded."""
    path = study.records / "gradients.json"
    if not path.is_file():
        return "not run yet\n"
    terms = json.loads(path.read_text(encoding="utf-8"))["terms"]
    rows = [
        [name, *(f"{term[key]:.3f}" for key in ("norm", "halves", "cosine", "gain"))] for name, term in terms.items()
    ]
    head = ["term", "norm", "cosine of halves", "cosine with the true gradient, without noise", "first-order gain"]
    return table(head, rows)


def likelihood_table(study: Study, records: Mapping[str, Record]) -> str:
    """What the trace in the context makes of the warm start's own rollouts (study_gradients.py)."""
    path = study.records / "gradients.json"
    if not path.is_file():
        return "not run yet\n"
    kinds = json.loads(path.read_text(encoding="utf-8"))["likelihoods"]
    rows = [
        [name, *(f"{value:.3g}" for value in (one["share"], one["prompt"], one["trace"], one["trace"] - one["prompt"]))]
        for name, one in kinds.items()
    ]
    return table(["rollouts", "share", "log-prob from the prompt", "with the trace", "difference"], rows)


TABLES: dict[str, Callable[[Study, Mapping[str, Record]], str]] = {
    "progress": progress_table,
    "warm": warm_table,
    "tuning": tuning_table,
    "final": final_table,
    "summary": summary_table,
    "ablations": ablation_table,
    "cost": cost_table,
    "gradients": gradient_table,
    "likelihoods": likelihood_table,
}


def filled(text: str, study: Study, records: Mapping[str, Record]) -> str:
    """``text`` with what is between ``<!-- STUDY:TABLE -->`` and ``<!-- end -->`` made anew, for this ``study``."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]](study, records)}{match[3]}"

    return re.sub(rf"(<!-- {study.name}:(\w+) -->)\n.*?(<!-- end -->)", fill, text, flags=re.DOTALL)


# -- plots -----------------------------------------------------------------------------------------------------------


def draw(study: Study, records: Mapping[str, Record], folder: Path) -> None:
    from matplotlib.figure import Figure

    arms = arms_of(study, records, "arms")
    if not arms:
        return
    panels = {
        "curves": ("success on validation tasks", validation_points),
        "reward": ("reward of the rollouts, training prompts", lambda run: points(run, "reward")),
        "gap": ("latent-trace gap, nats a rollout", lambda run: points(run, "gap")),
        "entropy": ("entropy on the prompt-only branch, nats a token", lambda run: points(run, "entropy")),
    }
    for name, (title, source) in panels.items():
        figure = Figure(figsize=(7, 4.2))
        axes = figure.subplots()
        for arm in arms:
            curve(axes, arm, source)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(title)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")


def draw_ablations(study: Study, records: Mapping[str, Record], folder: Path) -> None:
    """Success on test of the whole method and of every ablation, with its interval."""
    from matplotlib.figure import Figure

    ours, ablations = whole_method(study, records), arms_of(study, records, "ablations")
    if ours is None or not ablations:
        return
    arms = [ours, *ablations]
    figure = Figure(figsize=(7, 0.28 * len(arms) + 1))
    axes = figure.subplots()
    for row, arm in enumerate(arms):
        hits = arm.hits("test")
        low, high = interval(bootstrap([hits], lambda mean: mean))
        axes.plot([low, high], [row, row], color="C0")
        axes.plot(hits.mean(), row, "o", color="C0")
        axes.plot(hits.mean(axis=1), [row] * len(hits), "|", color="C0")
    axes.axvline(ours.hits("test").mean(), color="gray", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(arms)), [arm.label for arm in arms], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("success on test tasks: mean, 95% interval, seeds")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(folder / "ablations.png", dpi=110, bbox_inches="tight")


def validation_points(run: Record) -> list[tuple[float, float]]:
    return list(zip(run["curve"]["step"], run["curve"]["validation"], strict=True))


def points(run: Record, name: str) -> list[tuple[float, float]]:
    return [(step, value) for step, value in run["curve"].get(name, [])]


def curve(axes: Any, arm: Arm, source: Callable[[Record], list[tuple[float, float]]]) -> None:
    """Mean over seeds, and the 95% t interval of that mean."""
    runs = [dict(source(run)) for run in arm.runs]
    steps = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    if not steps:
        return
    value_ST = np.array([[run[step] for step in steps] for run in runs])
    mean_T = value_ST.mean(axis=0)
    [line] = axes.plot(steps, mean_T, label=f"{arm.label} ({len(runs)} seeds)")
    if len(runs) > 1:
        from scipy.stats import t

        half_T = t.ppf(0.975, len(runs) - 1) * value_ST.std(axis=0, ddof=1) / np.sqrt(len(runs))
        axes.fill_between(steps, mean_T - half_T, mean_T + half_T, color=line.get_color(), alpha=0.15)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail where a page is not up to date")
    options = parser.parse_args(argv)
    studies = [Study.load(path) for path in STUDIES]
    records = [load_records(sorted(study.records.glob("*.jsonl"))) for study in studies]
    stale = []
    for page in PAGES:
        text = new = page.read_text(encoding="utf-8")
        for study, of_study in zip(studies, records, strict=True):
            new = filled(new, study, of_study)
        if new != text:
            stale.append(page.name)
            if not options.check:
                page.write_text(new, encoding="utf-8")
    if options.check:
        print(f"not up to date: {', '.join(stale)}" if stale else "up to date")
        return int(bool(stale))
    for study, of_study in zip(studies, records, strict=True):
        draw(study, of_study, study.records)
        draw_ablations(study, of_study, study.records)
    print(f"{sum(map(len, records))} records, pages written: {', '.join(stale) or 'none, they were up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
