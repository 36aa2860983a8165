"""Tree attention on one prompt group, beside what peers do with the same group.

    python benchmarks/tree_attention.py [--shapes cpu 4b] [--modes sample mixture]   4b in bf16 on a GPU; cpu, float32
    python benchmarks/tree_attention.py --growth           ours against dense duplicates as G, P, T and Y double
    python benchmarks/tree_attention.py --gate             correctness alone
    pytest benchmarks/tree_attention.py --benchmark-only   small CPU cases

Modes: `sample`, rollouts under the trace and the SFT path under the prompt; `mixture`, rollouts under both. Phases:
`forward`, without gradients; `forward+backward`, gradients of q, k and v. A way is timed only when it agrees with
float64 on a small group first; one that is absent or fails says so and the others go on. Flop rates count visible pairs
alone (2 matmuls forward, 7 with backward), so a way that computes more pays for it; beside stands the rate of one dense
causal sequence with as many pairs.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from head import GateFailed, Guarded, Settings, figures_of, timed, warm_up
from head_ways import Absent
from measure import RESULTS, Seconds, ratio, return_freed_memory, save
from torch import Tensor
from tree_ways import MODES, WAYS, Batch, Operands, Prepare, Shape, Way, Work, make_batch

from pact_kernels import PrefixTree
from pact_kernels.tree_attention.reference import tree_attention_reference

SHAPES = {
    "4b": Shape(32, 8, 128, prompt=4096, trace=2048, response=1024, rollouts=16),
    "cpu": Shape(8, 4, 64, prompt=1024, trace=512, response=256, rollouts=8),
    "tiny": Shape(4, 2, 32, prompt=40, trace=24, response=16, rollouts=3),
}
# Of the gate: tiles that are full, cut and empty, in little memory. The head dims of the tables.
GATE_SHAPES = {
    "cuda": Shape(8, 2, 128, prompt=300, trace=200, response=90, rollouts=5),
    "cpu": Shape(4, 2, 64, prompt=70, trace=40, response=20, rollouts=3),
}
FORWARD, BOTH = PHASES = ("forward", "forward+backward")
MATMULS = {FORWARD: 2, BOTH: 7}  # of 2 pairs D flops a head
DENSE = "dense"
GROWTH_BASES = {
    "cuda": Shape(32, 8, 128, prompt=1024, trace=512, response=256, rollouts=4),
    "cpu": Shape(4, 2, 64, prompt=256, trace=128, response=64, rollouts=4),
}
GROWN = {"G": "rollouts", "P": "prompt", "T": "trace", "Y": "response"}
FACTORS = (1, 2, 4, 8)
# Largest error of the output and of a gradient, each of its largest entry.
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (0.02, 0.05)}
MEASURED = "measured"


@dataclass
class Outcome:
    """What became of a way: a status, a reason unless it was measured, and the figures if it was."""

    status: str  # measured | absent | failed | gate failed
    reason: str = ""
    gate_error: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float | str] = field(default_factory=dict)

    def record(self, way: Way) -> dict[str, Any]:
        said = {"reason": self.reason} if self.reason else {}
        return {"status": self.status, **said, **self.figures, "gate_error": self.gate_error, "note": way.note}


def runner(work: Work, phase: str) -> Callable[[], object]:
    """What is timed. Gradients are dropped at the end: the next way finds the memory as this one did."""
    if phase == FORWARD:
        frozen = [Operands(*(x.detach() for x in piece)) for piece in work.pieces]

        def forward() -> None:
            with torch.no_grad():
                work.attend(frozen)

        return forward
    return partial(gradients, work)


def gradients(work: Work) -> Sequence[Tensor]:
    """Those of q, k and v of each piece, piece by piece."""
    return torch.autograd.grad(work.attend(work.pieces), [x for piece in work.pieces for x in piece], work.douts)


def expected(batch: Batch) -> dict[str, Tensor]:
    """Output and gradients in float64, from the same rounded operands, in the tree's layout."""
    q, k, v = (x.double().requires_grad_() for x in (batch.q, batch.k, batch.v))
    out = tree_attention_reference(q, k, v, batch.tree.subtree_end)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), batch.dout.double())
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


def check(work: Work, batch: Batch) -> dict[str, float]:
    """The errors of a way: of every row it puts out, and of the sums of its gradients over each tree position.

    Raises:
        GateFailed: one of them is too large, or not a number.
    """
    wanted = expected(batch)
    with torch.no_grad():
        outputs = work.attend([Operands(*(x.detach() for x in piece)) for piece in work.pieces])
    if len(outputs) != len(work.at) or any(len(out) != len(at) for out, at in zip(outputs, work.at)):
        raise GateFailed("the output has not one row for each row of the input")
    errors = {"out": max(_largest(out - wanted["out"][at]) for out, at in zip(outputs, work.at))}
    errors["out"] /= _largest(wanted["out"])
    if not work.no_backward:
        got = gradients(work)
        for i, name in enumerate(("dq", "dk", "dv")):
            total = torch.zeros_like(wanted[name])
            for gradient, at in zip(got[i::3], work.at):
                total.index_add_(0, at, gradient.double())
            errors[name] = _largest(total - wanted[name]) / _largest(wanted[name])
    output_tolerance, gradient_tolerance = TOLERANCE[batch.q.dtype]
    tolerances = {name: output_tolerance if name == "out" else gradient_tolerance for name in errors}
    if not all(errors[name] <= tolerances[name] for name in errors):  # NaN fails too
        said = ", ".join(f"{name} {error:.1e} (may be {tolerances[name]:.0e})" for name, error in errors.items())
        raise GateFailed(f"max error {said}")
    return errors


def _largest(values: Tensor) -> float:
    return float(values.double().abs().max().nan_to_num(nan=math.inf))


class Gate:
    """Opens each way once and holds it against float64 on a small group, with the table's dtype and device."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, skip: Iterable[str] = (), deadline: float = math.inf
    ) -> None:
        self.device, self.skip, self.deadline = device, set(skip), deadline
        self.batches = {mode: make_batch(GATE_SHAPES[device.type], mode, device, dtype) for mode in MODES}
        self.prepares: dict[str, Prepare] = {}
        self.outcomes: dict[tuple[str, str], Outcome] = {}

    def outcome(self, way: Way, mode: str) -> Outcome:
        """``measured`` with the errors and no figures where the way may be timed."""
        key = way.name, mode
        if key not in self.outcomes:
            self.outcomes[key] = self._try(way, mode)
        known = self.outcomes[key]
        return Outcome(known.status, known.reason, known.gate_error)

    def _try(self, way: Way, mode: str) -> Outcome:
        if way.name in self.skip:
            return Outcome("absent", "skipped on request")
        if time.perf_counter() > self.deadline:
            return Outcome("absent", "not run: the time was spent before it (--budget)")
        errors: dict[str, float] = {}
        batch = self.batches[mode]
        try:
            if way.name not in self.prepares:
                self.prepares[way.name] = way.open(self.device)
        except Absent as reason:
            return Outcome("absent", str(reason))
        prepare = self.prepares[way.name]
        checked = Guarded(way.name, lambda: errors.update(check(prepare(batch), batch)))
        checked()
        if checked.failure:
            kind, _, said = checked.failure.partition(": ")
            return Outcome("gate failed", said) if kind == GateFailed.__name__ else Outcome("failed", checked.failure)
        return Outcome(MEASURED, gate_error=errors)


@dataclass(frozen=True)
class Run:
    """Where and how long: up to ``repeats`` rounds a table, ``deadline`` (of ``perf_counter``) over all."""

    device: torch.device
    dtype: torch.dtype
    repeats: int
    deadline: float

    @property
    def is_over(self) -> bool:
        return time.perf_counter() > self.deadline

    def share(self, parts: int) -> Settings:
        """Settings of the next of ``parts`` equal parts; warm-up may take twice as long as the rounds."""
        seconds = max(1.0, self.deadline - time.perf_counter()) / (3 * parts)
        return Settings(self.device, self.dtype, self.repeats, seconds)


def dense_work(shape: Shape, pairs: int, device: torch.device, dtype: torch.dtype) -> tuple[Callable, int]:
    """One causal sequence with about as many pairs through PyTorch's attention; and its length."""
    length = round(math.sqrt(2 * pairs))
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, heads, length, shape.head_dim, generator=generator, device=device).to(dtype)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    )
    leaves = tuple(x.requires_grad_() for x in (q, k, v))

    def run(phase: str) -> None:
        with torch.set_grad_enabled(phase == BOTH):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            if phase == BOTH:
                torch.autograd.grad(out, leaves, dout)

    return run, length


def measure_cell(shape: Shape, mode: str, phase: str, gate: Gate, ways: Sequence[Way], how: Settings) -> dict[str, Any]:
    """Every way of one shape, mode and phase: gate, layout, warm-up, memory, then interleaved rounds."""
    batch = make_batch(shape, mode, how.device, how.dtype)
    pairs = batch.tree.pairs
    flops = MATMULS[phase] * 2 * pairs * shape.heads * shape.head_dim
    outcomes = {way.name: gate.outcome(way, mode) for way in ways}
    dense, length = dense_work(shape, pairs, how.device, how.dtype)
    runs = {DENSE: Guarded(DENSE, partial(dense, phase))}
    setups = {}
    for way in ways:
        if outcomes[way.name].status == MEASURED:
            setups[way.name] = prepare_run(way, batch, phase, gate, outcomes, runs)
    peaks = warm_up(runs, how)
    seconds = timed({name: run for name, run in runs.items() if not run.failure}, how)
    if runs[DENSE].failure:
        raise RuntimeError(f"the dense sequence failed: {runs[DENSE].failure}")
    ours = fastest(running(runs, ways, "ours"), seconds)
    rate = 2 * MATMULS[phase] * (length * (length + 1) / 2) * shape.heads * shape.head_dim
    rate /= median(seconds[DENSE])
    for name, run in runs.items():
        if run.failure:
            outcomes[name] = Outcome("failed", run.failure, outcomes[name].gate_error)
        elif name != DENSE:
            outcomes[name].figures = {
                **visible_figures(seconds[name], flops, rate, peaks[name]),
                **({"ratio_to_ours": ratio(seconds, name, ours)} if ours else {}),
                "setup_s": setups[name],
            }
    return {
        "shape": asdict(shape), "mode": mode, "phase": phase, "dtype": str(how.dtype), "ours": ours,
        "tokens": {"tree": len(batch.tree), "duplicated": sum(map(len, batch.tree.index))},
        "pairs": {"visible": pairs, "duplicated": batch.duplicated_pairs},
        "flops": flops, "tree_s": tree_seconds(shape, mode), "rounds": len(seconds[DENSE]),
        "dense": {"length": length, "tflop_per_s": rate / 1e12},
        "ways": {way.name: outcomes[way.name].record(way) for way in ways},
    }  # fmt: skip


def prepare_run(
    way: Way, batch: Batch, phase: str, gate: Gate, outcomes: dict[str, Outcome], runs: dict[str, Guarded]
) -> float:
    """Add what is timed of ``way`` to ``runs``, or say in ``outcomes`` why not; its set-up seconds."""
    works: list[Work] = []
    laid_out = Guarded(way.name, lambda: works.append(gate.prepares[way.name](batch)))
    laid_out()
    if laid_out.failure:
        runs[way.name] = laid_out
        return 0.0
    if phase == BOTH and works[0].no_backward:
        outcomes[way.name] = Outcome("absent", works[0].no_backward, outcomes[way.name].gate_error)
    else:
        runs[way.name] = Guarded(way.name, runner(works[0], phase))
    return works[0].setup_s


def running(runs: dict[str, Guarded], ways: Iterable[Way], kind: str) -> list[str]:
    """Names of the ways of this kind that have not failed."""
    return [way.name for way in ways if way.kind == kind and way.name in runs and not runs[way.name].failure]


def fastest(names: Iterable[str], seconds: Seconds) -> str | None:
    """The name of the smallest median."""
    return min(names, key=lambda name: median(seconds[name]), default=None)


def visible_figures(seconds: list[float], flops: int, dense_rate: float, peak: int) -> dict[str, float]:
    """Times, memory, and the rate on visible pairs beside that of the dense sequence."""
    figures = figures_of(seconds, flops / dense_rate, peak)
    figures["percent_of_dense_rate"] = figures.pop("percent_of_limit")
    return {**figures, "tflop_per_s": flops / figures["median_s"] / 1e12}


def tree_seconds(shape: Shape, mode: str) -> float:
    """Seconds that the tree of this group takes to build, on the host; the second, since the first loads code."""
    sequences = [torch.cat([prompt, ids]) for prompt, responses in shape.branches(mode) for ids in responses]
    PrefixTree.from_sequences(sequences)
    begin = time.perf_counter()
    PrefixTree.from_sequences(sequences)
    return time.perf_counter() - begin


def show(name: str, cell: dict[str, Any]) -> None:
    """Print one table, fastest first."""
    tokens, pairs, dense = cell["tokens"], cell["pairs"], cell["dense"]
    print(
        f"\n{name} {cell['mode']} {cell['phase']}: {tokens['tree']} tokens, {pairs['visible']:,} visible pairs "
        f"(duplicated: {tokens['duplicated']} tokens, {pairs['duplicated']:,} pairs)\n"
        f"{cell['flops'] / 1e12:.4g} Tflop; dense causal SDPA of length {dense['length']}: "
        f"{dense['tflop_per_s']:.4g} Tflop/s; tree built in {1e3 * cell['tree_s']:.2f} ms; {cell['rounds']} rounds"
    )
    head = ("median ms", "quartiles", "x ours", "Tflop/s", "% dense", "peak MiB")
    print("{:27} {:>10} {:>19} {:>7} {:>8} {:>8} {:>9}".format("way", *head))
    for way, record in sorted(cell["ways"].items(), key=lambda item: item[1].get("median_s", math.inf)):
        if record["status"] != MEASURED:
            print(f"{way:27} {record['status']}: {record['reason']}")
            continue
        mid, low, high = (1e3 * record[key] for key in ("median_s", "quartile_1_s", "quartile_3_s"))
        spread, times = f"{low:.2f}..{high:.2f}", record.get("ratio_to_ours", math.nan)
        setup = f"   set-up {1e3 * record['setup_s']:.2f} ms" if record["setup_s"] else ""
        print(
            f"{way:27} {mid:10.2f} {spread:>19} {times:7.2f} {record['tflop_per_s']:8.3g} "
            f"{record['percent_of_dense_rate']:8.1f} {record['peak_mib']:9.0f}{setup}"
        )


def run_tables(
    names: Iterable[str], modes: Iterable[str], gate: Gate, ways: Sequence[Way], run: Run, output: Path
) -> dict[str, Any]:
    """Measure, print and save all cells; what is done is on disk after every cell."""
    mode_said = run.share(1).mode
    print(f"mode: {mode_said}; up to {run.repeats} interleaved rounds a table")
    print("Tflop/s and % dense: on visible pairs alone. peak MiB: above the operands, output and gradients included")
    result: dict[str, Any] = {"mode": mode_said, "repeats": run.repeats, "cells": []}
    cells = list(product(names, modes, PHASES))
    for done, (name, mode, phase) in enumerate(cells):
        torch.compiler.reset()  # it gives up on a function after a few shapes
        for way in ways:  # before the share of the cell is cut: ways that compile take seconds
            gate.outcome(way, mode)
        if run.is_over:
            print(f"\n{name} {mode} {phase} and what comes after: not run, the time is spent (--budget)")
            break
        cell = {"name": name, **measure_cell(SHAPES[name], mode, phase, gate, ways, run.share(len(cells) - done))}
        show(name, cell)
        sys.stdout.flush()
        result["cells"].append(cell)
        save(output.stem, result, output)
    print("\nnotes")
    for way in ways:
        print(f"{way.name:27} {way.note}")
    print(f"written to {output}")
    return result


def run_growth(
    base: Shape, modes: Iterable[str], gate: Gate, ways: Sequence[Way], run: Run, output: Path
) -> dict[str, Any]:
    """Print, save and plot how forward+backward of ours and of dense duplicates grows, each at its fastest."""
    print(f"mode: {run.share(1).mode}; {BOTH}, medians of up to {run.repeats} rounds\nbase: {base}")
    cells = [(mode, letter, factor) for mode in modes for letter in GROWN for factor in FACTORS]
    result: dict[str, Any] = {"base": asdict(base), "phase": BOTH, "dtype": str(run.dtype), "points": []}
    measured: dict[tuple[str, Shape], dict[str, Any]] = {}
    for done, (mode, letter, factor) in enumerate(cells):
        shape = base.grown(GROWN[letter], factor)
        if (mode, shape) not in measured:  # the base belongs to all four
            if run.is_over:
                print("the rest: not run, the time is spent (--budget)")
                break
            measured[mode, shape] = growth_point(shape, mode, gate, ways, run.share(len(cells) - done))
        point = {"mode": mode, "grown": letter, "factor": factor, **measured[mode, shape]}
        result["points"].append(point)
        said = "   ".join(
            f"{kind} {1e3 * point[kind]['median_s']:9.2f} ms ({point[kind]['way']})" if point[kind] else f"{kind} none"
            for kind in ("ours", "duplicates")
        )
        times = f"{point['ratio']:6.2f} x" if point["ratio"] else ""
        print(f"{mode:8} {letter} x{factor}: {point['tokens']:6} tokens   {said} {times}", flush=True)
    save(output.stem, result, output)
    print(f"written to {output}")
    plot_growth(result["points"], output.with_suffix(".png"))
    return result


def growth_point(shape: Shape, mode: str, gate: Gate, ways: Sequence[Way], how: Settings) -> dict[str, Any]:
    """The fastest of ours and of the duplicates at one shape."""
    batch = make_batch(shape, mode, how.device, how.dtype)
    outcomes = {way.name: gate.outcome(way, mode) for way in ways if way.kind in ("ours", "duplicates")}
    runs: dict[str, Guarded] = {}
    for way in ways:
        if way.name in outcomes and outcomes[way.name].status == MEASURED:
            prepare_run(way, batch, BOTH, gate, outcomes, runs)
    for run in runs.values():
        run()
    seconds = timed({name: run for name, run in runs.items() if not run.failure}, how)
    point: dict[str, Any] = {"tokens": len(batch.tree), "visible_pairs": batch.tree.pairs, "ratio": None}
    best = {kind: fastest(running(runs, ways, kind), seconds) for kind in ("ours", "duplicates")}
    for kind, name in best.items():
        point[kind] = {"way": name, "median_s": median(seconds[name])} if name else None
    if best["ours"] and best["duplicates"]:
        point["ratio"] = ratio(seconds, best["duplicates"], best["ours"])
    return point


def plot_growth(points: list[dict[str, Any]], path: Path) -> None:
    """One panel for each of G, P, T and Y, both axes logarithmic."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib, or the extra 'train')")
        return
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    panels = figure.subplots(1, len(GROWN), sharey=True)
    for panel, (letter, name) in zip(panels, GROWN.items()):
        for (kind, color), (mode, style) in product(
            {"ours": "C0", "duplicates": "C1"}.items(), zip(MODES, ("--", "-"))
        ):
            line = [p for p in points if p["grown"] == letter and p["mode"] == mode and p[kind]]
            times = [1e3 * p[kind]["median_s"] for p in line]
            if line:
                label = f"{kind}, {mode}"
                panel.plot([p["factor"] for p in line], times, style, color=color, marker="o", label=label)
        panel.set(xscale="log", yscale="log", xlabel=f"{letter} ({name}), times the base", xticks=FACTORS)
        panel.set_xticks(FACTORS, labels=[f"{factor}" for factor in FACTORS], minor=False)
        panel.minorticks_off()
    panels[0].set_ylabel(f"{BOTH}, ms")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"plot in {path}")


def show_gate(gate: Gate, modes: Iterable[str], ways: Iterable[Way]) -> None:
    for mode, way in product(modes, ways):
        outcome = gate.outcome(way, mode)
        said = ", ".join(f"{name} {error:.1e}" for name, error in outcome.gate_error.items()) or outcome.reason
        print(f"{mode:8} {way.name:27} {'agrees' if outcome.status == MEASURED else outcome.status}: {said}")


def main(arguments: list[str] | None = None) -> None:
    """Print the tables or the growth, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: 4b on a GPU, cpu without one")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--repeats", type=int, help="rounds of a table; default 20 on a GPU, 5 without one")
    parser.add_argument(
        "--budget", "--seconds", type=float, help="seconds over all; default 120 on a GPU, 900 without one"
    )
    parser.add_argument("--skip", nargs="+", default=[], choices=[way.name for way in WAYS], metavar="WAY")
    parser.add_argument("--output", type=Path, help="default: results/tree_attention[_growth]_<cpu or gpu>.json")
    parser.add_argument("--growth", action="store_true", help="the sweep over G, P, T and Y instead of the tables")
    parser.add_argument("--gate", action="store_true", help="check each way against float64, and stop")
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # many ways, many buffer sizes
    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    deadline = time.perf_counter() + (chosen.budget or (120 if on_gpu else 900))
    if chosen.gate:
        return show_gate(Gate(device, dtype, chosen.skip), chosen.modes, WAYS)
    if not on_gpu:
        return_freed_memory()
    gate = Gate(device, dtype, chosen.skip, deadline)
    run = Run(device, dtype, chosen.repeats or (20 if on_gpu else 5), deadline)
    stem = f"tree_attention{'_growth' if chosen.growth else ''}_{'gpu' if on_gpu else 'cpu'}"
    output = chosen.output or RESULTS / f"{stem}.json"
    if chosen.growth:
        run_growth(GROWTH_BASES[device.type], chosen.modes, gate, WAYS, run, output)
    else:
        run_tables(chosen.shapes or (("4b",) if on_gpu else ("cpu",)), chosen.modes, gate, WAYS, run, output)


def pytest_generate_tests(metafunc) -> None:
    """The small CPU cases: what runs in a second without a compiler or a GPU."""
    if "way" in metafunc.fixturenames:
        cpu = torch.device("cpu")
        ways = []
        for way in WAYS:
            try:
                if not way.compiled:
                    way.open(cpu)
                    ways.append(way)
            except Absent:
                continue
        metafunc.parametrize("phase", PHASES)
        metafunc.parametrize("mode", MODES)
        metafunc.parametrize("way", ways, ids=[way.name for way in ways])


def test_tree_attention(way: Way, mode: str, phase: str, benchmark) -> None:
    cpu = torch.device("cpu")
    prepare = way.open(cpu)
    small = make_batch(GATE_SHAPES["cpu"], mode, cpu, torch.float32)
    check(prepare(small), small)
    benchmark(runner(prepare(make_batch(SHAPES["tiny"], mode, cpu, torch.float32)), phase))


if __name__ == "__main__":
    main()
