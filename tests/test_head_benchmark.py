"""The LM-head benchmark runs end to end on a CPU, and times nothing that is wrong. Says nothing about speed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import head
import head_ways
import measure
from head_ways import WAYS, Absent, Calls, Shape, Way, from_logp, naive_logp

CPU = torch.device("cpu")
TINY = Shape(40, 16, 48)
LCE_OPTIONS = "LinearCrossEntropyOptions"
HOW = head.Settings(CPU, torch.float32, repeats=2, seconds=60)


def way(name: str, calls: Calls, **options) -> Way:
    return Way(name, "of the test", lambda device: calls, **options)


def scaled(factor: float) -> Calls:
    """The naive way with gradients (and loss) off by a factor."""
    right = from_logp(naive_logp)
    return Calls(right.forward, lambda x: factor * right.loss(x))


def cells_of(ways: tuple[Way, ...], output: Path, skip: tuple[str, ...] = ()) -> list[dict]:
    gate = head.Gate(CPU, torch.float32, skip)
    head.run_table([TINY], gate, ways, HOW, output)
    return json.loads(output.read_text())["cells"]


def test_table_on_cpu(tmp_path, capsys) -> None:
    output = tmp_path / "deep" / "head.json"
    cells = cells_of(WAYS, output, skip=("torch.compile",))
    assert [(cell["workload"], cell["phase"]) for cell in cells] == [
        (workload, phase) for workload in head.WORKLOADS for phase in head.PHASES
    ]
    for cell in cells:
        for entry in WAYS:
            record = cell["ways"][
                f"{entry.name}, compacted" if entry.ours and cell["workload"] == "pact" else entry.name
            ]
            if record["status"] == "measured":
                assert 0 < record["min_s"] <= record["quartile_1_s"] <= record["median_s"] <= record["max_s"]
                assert record["percent_of_limit"] > 0
                assert record["rounds"] == HOW.repeats
            else:
                assert record["status"] in ("absent", "failed")
                assert record["reason"]
                assert "median_s" not in record
        for name in ("fused torch", "logprob torch", "naive"):
            assert cell["ways"][name]["status"] == "measured", cell["ways"][name]
        assert cell["ways"]["torch.compile"]["reason"] == "skipped on request"
        assert cell["ways"]["fused triton"]["status"] == "absent"  # never timed in the interpreter
    printed = capsys.readouterr().out
    assert "mode: CPU" in printed
    assert "skipped on request" in printed
    assert {"torch", "commit", "cores"} <= json.loads(output.read_text())["machine"].keys()


def test_wrong_way_gets_no_time(tmp_path, capsys) -> None:
    ways = (way("right", scaled(1.0)), way("wrong", scaled(1.01)))
    for cell in cells_of(ways, tmp_path / "head.json"):
        assert cell["ways"]["right"]["status"] == "measured"
        wrong = cell["ways"]["wrong"]
        assert wrong["status"] == "gate failed"
        assert wrong["reason"].startswith("max error")
        assert "median_s" not in wrong
    assert "gate failed: max error" in capsys.readouterr().out


@pytest.mark.parametrize(
    "calls",
    [
        Calls(lambda x: naive_logp(x.hidden, x.weight, x.target) + 1e-3, scaled(1.0).loss),
        Calls(lambda x: naive_logp(x.hidden, x.weight, x.target).sum() * 1.01, scaled(1.0).loss),
        scaled(float("nan")),
        Calls(scaled(1.0).forward, lambda x: -(x.gain * naive_logp(x.hidden, x.weight.detach(), x.target)).sum()),
    ],
    ids=["log-probs off", "sum off", "nan", "no gradient of the weight"],
)
def test_gate_rejects(calls: Calls) -> None:
    batch = head_ways.make_batches(TINY, CPU, torch.float32)["pact compacted"]
    with pytest.raises(head.GateFailed):
        head.check(calls, False, batch)


def test_row_weights_are_no_uniform_job() -> None:
    batch = head_ways.make_batches(TINY, CPU, torch.float32)["pact compacted"]
    weighted, uniform = from_logp(naive_logp), head_ways.from_total(lambda *x: -naive_logp(*x).sum())
    head.check(weighted, False, batch)
    head.check(uniform, True, batch)
    for calls, claim in ((weighted, True), (uniform, False)):
        with pytest.raises(head.GateFailed):
            head.check(calls, claim, batch)


def test_others_go_on(tmp_path) -> None:
    """A way that is missing, one that breaks in the gate, and one that runs out of memory at the real shape."""

    def missing(device: torch.device) -> Calls:
        raise ImportError("No module named 'peer'")

    def broken(*operands: torch.Tensor) -> torch.Tensor:
        raise ValueError("cannot compile\nbecause of much else")

    def large(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if weight.shape[0] == TINY.v:
            raise torch.OutOfMemoryError("out of memory")
        return naive_logp(hidden, weight, target)

    ways = (
        Way("missing", "", missing),
        way("broken", from_logp(broken)),
        way("large", from_logp(large)),
        way("gpu", scaled(1.0), needs_gpu=True),
        way("right", scaled(1.0)),
    )
    for cell in cells_of(ways, tmp_path / "head.json"):
        said = {name: (record["status"], record.get("reason")) for name, record in cell["ways"].items()}
        assert said["missing"] == ("absent", "ImportError: No module named 'peer'")
        assert said["broken"] == ("failed", "ValueError: cannot compile")
        assert said["large"] == ("failed", "OutOfMemoryError: out of memory")
        assert said["gpu"] == ("absent", "needs a GPU")
        assert said["right"] == ("measured", None)


def test_percent_of_limit(tmp_path) -> None:
    assert head.percent_of_limit(0.05, 0.1) == 50
    assert head.percent_of_limit(0.1, 0.05) == 200
    figures = head.figures_of([0.2, 0.1, 0.4], 0.1, 3 * measure.MiB)
    assert figures["median_s"] == 0.2
    assert figures["percent_of_limit"] == 50
    assert figures["peak_mib"] == 3
    for cell in cells_of((way("right", scaled(1.0)),), tmp_path / "head.json"):
        record, limit = cell["ways"]["right"], cell["limit"]
        assert record["percent_of_limit"] == pytest.approx(100 * limit["median_s"] / record["median_s"])
        matmuls = 3 if cell["phase"] == head.BOTH else 1
        assert limit["flops"] == 2 * matmuls * cell["rows"]["of_limit"] * TINY.h * TINY.v
        assert limit["tflop_per_s"] == pytest.approx(limit["flops"] / limit["median_s"] / 1e12)


def test_rows() -> None:
    shape = Shape.parse("8192x2560x151936")
    assert (shape.n, shape.h, shape.v) == (8192, 2560, 151936)
    assert (shape.live, shape.active) == (3280, 2952)
    assert head.limit_rows(shape, "dense", head.BOTH) == 8192
    assert head.limit_rows(shape, "pact", head.FORWARD) == 3280
    assert head.limit_rows(shape, "pact", head.BOTH) == 2952
    batches = head_ways.make_batches(TINY, CPU, torch.float32)
    assert int((batches["pact"].terms.weight > 0).sum()) == len(batches["pact compacted"].target) == TINY.live
    assert int((batches["pact"].gain != 0).sum()) == TINY.active
    assert int((batches["dense"].gain != 0).sum()) == TINY.n


@pytest.mark.parametrize(("owner", "name"), [(torch.nn.functional, "linear_cross_entropy"), (torch.nn, LCE_OPTIONS)])
def test_older_torch_is_absence(owner, name: str, monkeypatch) -> None:
    monkeypatch.delattr(owner, name, raising=False)
    with pytest.raises(Absent, match=name):
        next(entry for entry in WAYS if entry.name == "torch lce chunked").open(CPU)


def test_cuda_rounds_stop_at_the_budget(monkeypatch) -> None:
    clock = [0.0]

    def tick(run) -> float:
        run()
        clock[0] += 1.0
        return 1.0

    monkeypatch.setattr(measure, "_cuda_seconds", tick)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    ways = {"a": lambda: None, "b": lambda: None}
    for budget, rounds in ((0.5, measure.MIN_ROUNDS), (7.0, 4), (1e9, 10)):
        assert {name: len(seconds) for name, seconds in measure.interleaved_cuda(ways, 10, budget).items()} == {
            "a": rounds,
            "b": rounds,
        }


def test_machine_leaves_out_what_is_not_installed(monkeypatch) -> None:
    monkeypatch.setattr(measure, "LIBRARIES", ("triton", "no-such-library"))
    record = measure.machine()
    assert "no-such-library" not in record
    assert "transformers" not in record
