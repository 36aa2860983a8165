"""The LM head's log-probs and gradients: ours beside PyTorch and the peers, and beside the bare matmuls.

    python benchmarks/head.py [--shapes 8192x2560x151936 ...]   GPU: bf16, CUDA events; without one: small, float32
    python benchmarks/head.py --gate                            correctness alone
    pytest benchmarks/head.py --benchmark-only                  small CPU cases

Workloads: `dense`, every row has a coefficient; `pact`, 60% of the rows have weight 0, and 10% of the rest coefficient
0 (advantage 0). Peers get the pact batch with the rows of weight 0 taken out; ours gets all rows, as a caller has them,
and the compacted batch as well. Phases: `forward`, log-probs without gradients; `forward+backward`, gradients of hidden
and weight. The limit is the matmuls alone (1 or 3 torch.mm), for pact of the fewest rows that could do. A way is timed
only when it agrees with float64 on a small batch first; one that is absent or fails says so and the others go on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from head_ways import WAYS, Absent, Calls, Operands, Shape, Way, make_batches, one_line
from measure import (
    MiB,
    Seconds,
    interleaved,
    interleaved_cuda,
    peak_cuda_memory,
    peak_memory,
    return_freed_memory,
    save,
)
from torch import Tensor

GPU_SHAPES = (Shape(8192, 2560, 151936), Shape(8192, 4096, 151936), Shape(8192, 2304, 256000))
CPU_SHAPES = (Shape(512, 256, 4096),)
PYTEST_SHAPE = Shape(128, 128, 2048)
GATE_SHAPES = {"cuda": Shape(512, 256, 2048), "cpu": Shape(64, 32, 160)}
WORKLOADS = ("dense", "pact")
FORWARD, BOTH = PHASES = ("forward", "forward+backward")
MATMULS = {FORWARD: 1, BOTH: 3}
LIMIT = "limit"
# Largest error of a log-prob (nats) and of a gradient (of its largest entry). Wide enough for logits rounded to bf16
# (0.06 at 16), which some peers do: the gate asks whether a way does this work, the tests of the library how well.
TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (0.1, 0.05)}


class GateFailed(Exception):
    """A way does not compute what it says; the message gives the errors."""


@dataclass(frozen=True)
class Job:
    """What one row of the table runs: a way on a batch."""

    name: str
    way: Way
    batch: str


@dataclass
class Outcome:
    """What became of a job: a status, a reason unless it was measured, and the figures if it was."""

    status: str  # measured | absent | failed | gate failed
    reason: str = ""
    gate_error: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def record(self, job: Job) -> dict[str, Any]:
        said = {"reason": self.reason} if self.reason else {}
        batch = {"batch": job.batch, "note": job.way.note, "uniform": job.way.uniform}
        return {"status": self.status, **said, **self.figures, "gate_error": self.gate_error, **batch}


class Guarded:
    """A run that stops at its first failure and keeps the reason; out of memory in one way must not end the others."""

    def __init__(self, name: str, run: Callable[[], object]) -> None:
        self.name, self.run, self.failure = name, run, ""

    def __call__(self) -> None:
        if self.failure:
            return
        try:
            self.run()
        except Exception as error:  # whatever a peer raises; its traceback would keep its tensors alive
            self.failure = one_line(error)
        if self.failure and torch.cuda.is_available():
            self._check_gpu()

    def _check_gpu(self) -> None:
        """After an illegal access every later call fails and no later figure would mean anything: stop there."""
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise SystemExit(
                f"the GPU is lost after {self.name!r} ({self.failure}); --skip it. {one_line(error)}"
            ) from None
        torch.cuda.empty_cache()


def jobs_of(workload: str, ways: Iterable[Way]) -> list[Job]:
    """The rows of the table of ``workload``."""
    jobs = []
    for way in ways:
        if workload == "dense" or way.ours:
            jobs.append(Job(way.name, way, workload))
        if workload == "pact":
            jobs.append(Job(f"{way.name}, compacted" if way.ours else way.name, way, "pact compacted"))
    return jobs


def step(loss: Callable[[Operands], Tensor], operands: Operands) -> None:
    """Forward and backward. The gradients are dropped at the end: the next way finds the memory as this one did."""
    loss(operands).backward()
    operands.clear()


def forward(logp: Callable[[Operands], Tensor], operands: Operands) -> None:
    with torch.no_grad():
        logp(operands)


def runner(calls: Calls, operands: Operands, phase: str) -> Callable[[], object]:
    """What is timed."""
    if phase == FORWARD:
        return partial(forward, calls.forward, operands.frozen())
    return partial(step, calls.loss, operands)


def expected(operands: Operands, uniform: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs and gradients of hidden and weight in float64, from the same rounded operands."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (operands.hidden, operands.weight))
    logp_N = torch.log_softmax(hidden @ weight.T, dim=-1).gather(1, operands.target[:, None])[:, 0]
    gain_N = torch.ones_like(logp_N) if uniform else operands.gain.double()
    d_hidden, d_weight = torch.autograd.grad(-(gain_N * logp_N).sum(), (hidden, weight))
    return logp_N.detach(), d_hidden, d_weight


def check(calls: Calls, uniform: bool, operands: Operands) -> dict[str, float]:
    """The errors of a way against what it claims to compute.

    Raises:
        GateFailed: one of them is too large, or not a number.
    """
    logp_N, d_hidden, d_weight = expected(operands, uniform)
    with torch.no_grad():
        got = calls.forward(operands.frozen()).double()
    wanted = logp_N if got.dim() else logp_N[operands.live].sum() / len(logp_N)
    errors = {"logp": _largest((got if got.dim() else got / len(logp_N)) - wanted)}
    operands.clear()
    calls.loss(operands).backward()
    for name, operand, gradient in (("d_hidden", operands.hidden, d_hidden), ("d_weight", operands.weight, d_weight)):
        if operand.grad is None:
            raise GateFailed(f"no gradient {name}")
        errors[name] = _largest(operand.grad.double() - gradient) / _largest(gradient)
    operands.clear()
    logp_tolerance, gradient_tolerance = TOLERANCE[operands.hidden.dtype]
    tolerances = {"logp": logp_tolerance, "d_hidden": gradient_tolerance, "d_weight": gradient_tolerance}
    if not all(errors[name] <= tolerances[name] for name in errors):  # NaN fails too
        said = ", ".join(f"{name} {error:.1e} (may be {tolerances[name]:.0e})" for name, error in errors.items())
        raise GateFailed(f"max error {said}")
    return errors


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


class Gate:
    """Opens each way once and holds it against float64 on small batches, with the table's dtype and device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, skip: Iterable[str] = (), timed: bool = True) -> None:
        self.device, self.skip, self.timed = device, set(skip), timed
        self.batches = make_batches(GATE_SHAPES[device.type], device, dtype)
        self.calls: dict[str, Calls] = {}
        self.outcomes: dict[tuple[str, str], Outcome] = {}

    def outcome(self, job: Job) -> Outcome:
        """``measured`` with the errors and no figures where the job may be timed."""
        key = job.way.name, job.batch
        if key not in self.outcomes:
            self.outcomes[key] = self._try(job)
        return self.outcomes[key]

    def _try(self, job: Job) -> Outcome:
        if job.way.name in self.skip:
            return Outcome("absent", "skipped on request")
        errors: dict[str, float] = {}
        checked = Guarded(job.name, lambda: errors.update(self._check(job)))
        try:
            if job.way.name not in self.calls:
                self.calls[job.way.name] = job.way.open(self.device, interpreted=not self.timed)
            checked()
        except Absent as reason:
            return Outcome("absent", str(reason))
        if checked.failure:
            kind, _, said = checked.failure.partition(": ")
            return Outcome("gate failed", said) if kind == GateFailed.__name__ else Outcome("failed", checked.failure)
        return Outcome("measured", gate_error=errors)

    def _check(self, job: Job) -> dict[str, float]:
        return check(self.calls[job.way.name], job.way.uniform, self.batches[job.batch])


@dataclass(frozen=True)
class Settings:
    """How a table is measured: ``repeats`` rounds or, on a GPU, as many as fit into ``seconds``.

    Warm-up, where ways compile, may take twice ``seconds``; ways that come after that are left out.
    """

    device: torch.device
    dtype: torch.dtype
    repeats: int
    seconds: float

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def mode(self) -> str:
        if self.on_gpu:
            return f"GPU: {torch.cuda.get_device_name()}, {self.dtype}, CUDA events, allocator's peak"
        return f"CPU: {torch.get_num_threads()} thread(s), {self.dtype}, wall clock, resident memory; no GPU found"


def limit_run(operands: Operands, rows: int, phase: str) -> Callable[[], object]:
    """The matmuls of ``rows`` rows alone, into buffers made here.

    Operands like those of the work, softmax-like where the gradient of the logits stands: what a GPU's clock does
    depends on the numbers.
    """
    hidden, weight = operands.hidden.detach()[:rows], operands.weight.detach()
    logits = hidden @ weight.T
    if phase == FORWARD:
        return partial(torch.mm, hidden, weight.T, out=logits)
    d_logits = torch.softmax(logits, dim=-1)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(d_logits, weight, out=d_hidden)
        torch.mm(d_logits.T, hidden, out=d_weight)

    return run


def limit_rows(shape: Shape, workload: str, phase: str) -> int:
    """The fewest rows that could do: those that need a log-prob, or those that have a gradient."""
    if workload == "dense":
        return shape.n
    return shape.live if phase == FORWARD else shape.active


def percent_of_limit(limit_s: float, seconds: float) -> float:
    """100 is as fast as the bare matmuls; a way that skips work may exceed it."""
    return 100 * limit_s / seconds


def figures_of(seconds: list[float], limit_s: float, peak: int) -> dict[str, float]:
    low, _, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * seconds
    return {
        "median_s": median(seconds),
        "quartile_1_s": low,
        "quartile_3_s": high,
        "min_s": min(seconds),
        "max_s": max(seconds),
        "rounds": len(seconds),
        "peak_mib": peak / MiB,
        "percent_of_limit": percent_of_limit(limit_s, median(seconds)),
    }


def measure_cell(
    shape: Shape,
    workload: str,
    phase: str,
    batches: dict[str, Operands],
    gate: Gate,
    ways: Iterable[Way],
    how: Settings,
) -> dict[str, Any]:
    """Every way of one workload and phase: gate, warm-up, memory, then interleaved rounds."""
    jobs = {job.name: job for job in jobs_of(workload, ways)}
    outcomes = {name: gate.outcome(job) for name, job in jobs.items()}
    rows = limit_rows(shape, workload, phase)
    matmuls = limit_run(batches["pact compacted" if workload == "pact" else "dense"], rows, phase)
    runs = {LIMIT: Guarded(LIMIT, matmuls)}
    for name, job in jobs.items():
        if outcomes[name].status == "measured":
            runs[name] = Guarded(name, runner(gate.calls[job.way.name], batches[job.batch], phase))
    peaks = warm_up(runs, how)
    seconds = timed({name: run for name, run in runs.items() if not run.failure}, how)
    if runs[LIMIT].failure:
        raise RuntimeError(f"the limit's matmuls failed: {runs[LIMIT].failure}")
    limit_s = median(seconds[LIMIT])
    for name, run in runs.items():
        if run.failure:
            outcomes[name] = Outcome("failed", run.failure, outcomes[name].gate_error)
        elif name != LIMIT:
            figures = figures_of(seconds[name], limit_s, peaks[name])
            outcomes[name] = Outcome("measured", gate_error=outcomes[name].gate_error, figures=figures)
    flops = 2 * MATMULS[phase] * rows * shape.h * shape.v
    return {
        "shape": asdict(shape),
        "workload": workload,
        "phase": phase,
        "rows": {"all": shape.n, "weight_not_0": shape.live, "coefficient_not_0": shape.active, "of_limit": rows}
        if workload == "pact"
        else {"all": shape.n, "of_limit": rows},
        "limit": {"flops": flops, "tflop_per_s": flops / limit_s / 1e12, **figures_of(seconds[LIMIT], limit_s, 0)},
        "ways": {name: outcomes[name].record(job) for name, job in jobs.items()},
    }


def warm_up(runs: dict[str, Guarded], how: Settings) -> dict[str, int]:
    """Run each once, to compile what it compiles, then once more for its peak memory."""
    peaks = {}
    deadline = time.perf_counter() + 2 * how.seconds
    for name, run in runs.items():
        if time.perf_counter() > deadline:
            run.failure = f"not run: the warm-up's {2 * how.seconds:.0f} s were spent before it (--seconds)"
            continue
        run()
        if not run.failure:
            peaks[name] = (peak_cuda_memory if how.on_gpu else peak_memory)(run)
    return peaks


def timed(runs: dict[str, Guarded], how: Settings) -> Seconds:
    if how.on_gpu:
        return interleaved_cuda(runs, how.repeats, how.seconds)
    return interleaved(runs, how.repeats)[0]


def show(cell: dict[str, Any]) -> None:
    """Print one table, fastest first."""
    shape, rows, limit = Shape(**cell["shape"]), cell["rows"], cell["limit"]
    row_text = f"{rows['all']} rows"
    if cell["workload"] == "pact":
        row_text += f", {rows['weight_not_0']} of weight not 0, {rows['coefficient_not_0']} of coefficient not 0"
    print(f"\n{shape} {cell['workload']} {cell['phase']}: {row_text}")
    print(
        f"limit: {MATMULS[cell['phase']]} matmul(s) of {rows['of_limit']} rows, {limit['flops'] / 1e12:.4g} Tflop, "
        f"{1e3 * limit['median_s']:.2f} ms, {limit['tflop_per_s']:.4g} Tflop/s; {limit['rounds']} rounds"
    )
    print(f"{'way':26} {'median ms':>10} {'quartiles':>19} {'% of limit':>10} {'peak MiB':>9}")
    order = sorted(cell["ways"].items(), key=lambda item: item[1].get("median_s", float("inf")))
    for name, way in order:
        if way["status"] != "measured":
            print(f"{name:26} {way['status']}: {way['reason']}")
            continue
        mid, low, high = (1e3 * way[key] for key in ("median_s", "quartile_1_s", "quartile_3_s"))
        star = "*" if way["uniform"] else ""
        spread = f"{low:.2f}..{high:.2f}"
        print(f"{name + star:26} {mid:10.2f} {spread:>19} {way['percent_of_limit']:10.1f} {way['peak_mib']:9.0f}")


def run_table(
    shapes: Iterable[Shape], gate: Gate, ways: tuple[Way, ...], how: Settings, output: Path
) -> dict[str, Any]:
    """Measure, print and save all cells; what is done is on disk after every shape."""
    print(f"mode: {how.mode}; up to {how.repeats} interleaved rounds a table")
    print("peak MiB: above the operands, gradients included. *: an easier job, see its note")
    result: dict[str, Any] = {"mode": how.mode, "repeats": how.repeats, "cells": []}
    for shape in shapes:
        torch.compiler.reset()  # it gives up on a function after a few shapes
        batches = make_batches(shape, how.device, how.dtype)
        for workload in WORKLOADS:
            for phase in PHASES:
                cell = measure_cell(shape, workload, phase, batches, gate, ways, how)
                show(cell)
                sys.stdout.flush()
                result["cells"].append(cell)
        save(output.stem, result, output)
    print("\nnotes")
    for way in ways:
        print(f"{way.name + ('*' if way.uniform else ''):26} {way.note}")
    print(f"written to {output}")
    return result


def show_gate(gate: Gate, ways: Iterable[Way]) -> None:
    for job in jobs_of("pact", ways):
        outcome = gate.outcome(job)
        said = ", ".join(f"{name} {error:.1e}" for name, error in outcome.gate_error.items()) or outcome.reason
        print(f"{job.name:34} {'agrees' if outcome.status == 'measured' else outcome.status}: {said}")


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, metavar="NxHxV")
    parser.add_argument("--repeats", type=int, default=10, help="rounds of a table")
    parser.add_argument("--seconds", type=float, default=8, help="time budget of a table's rounds")
    parser.add_argument("--skip", nargs="+", default=[], choices=[way.name for way in WAYS], metavar="WAY")
    parser.add_argument("--output", type=Path, help="default: results/head_<device>.json beside this file")
    parser.add_argument("--gate", action="store_true", help="check each way against float64, and stop")
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # many ways, many buffer sizes
    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    gate = Gate(device, dtype, chosen.skip, timed=not chosen.gate)
    if chosen.gate:
        return show_gate(gate, WAYS)
    if not on_gpu:
        return_freed_memory()
    slug = torch.cuda.get_device_name().lower().replace(" ", "_") if on_gpu else "cpu"
    output = chosen.output or Path(__file__).parent / "results" / f"head_{slug}.json"
    shapes = chosen.shapes or (GPU_SHAPES if on_gpu else CPU_SHAPES)
    run_table(shapes, gate, WAYS, Settings(device, dtype, chosen.repeats, chosen.seconds), output)


def pytest_generate_tests(metafunc) -> None:
    """The small CPU cases: what runs in a second without a compiler or a GPU."""
    if "job" in metafunc.fixturenames:
        ways = [way for way in WAYS if not way.needs_gpu and way.name not in ("torch.compile", "liger scaled")]
        jobs = [job for name in WORKLOADS for job in jobs_of(name, ways) if "triton" not in job.name]
        metafunc.parametrize("phase", PHASES)
        metafunc.parametrize("job", jobs, ids=[f"{job.name}, {job.batch}" for job in jobs])


def test_head(job: Job, phase: str, benchmark) -> None:
    cpu = torch.device("cpu")
    calls = job.way.open(cpu)
    check(calls, job.way.uniform, make_batches(GATE_SHAPES["cpu"], cpu, torch.float32)[job.batch])
    benchmark(runner(calls, make_batches(PYTEST_SHAPE, cpu, torch.float32)[job.batch], phase))


if __name__ == "__main__":
    main()
