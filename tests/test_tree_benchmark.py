"""The tree-attention benchmark runs end to end on a CPU, and times nothing that is wrong. Says nothing about speed."""

from __future__ import annotations

import builtins
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import tree_attention as bench
import tree_ways
from tree_attention import BOTH, FORWARD, MEASURED, PHASES
from tree_ways import MODES, WAYS, Absent, Batch, Operands, Prepare, Shape, Way, Work

CPU = torch.device("cpu")
TINY = bench.SHAPES["tiny"]
NEVER = 1e9  # a deadline beyond any run
HERE = {"ours torch", "duplicates SDPA", "PrefixGrouper SDPA"}  # on any CPU
if shutil.which("g++"):
    HERE.add("FlexAttention")  # compiled


def way_named(name: str) -> Way:
    return next(way for way in WAYS if way.name == name)


OURS, DUPLICATES = way_named("ours torch"), way_named("duplicates SDPA")


def changed(name: str, change: Callable[[Work, Batch], Work], kind: str = "peer") -> Way:
    """Dense duplicates with something done to them."""

    def load(device: torch.device) -> Prepare:
        prepare = DUPLICATES.open(device)
        return lambda batch: change(prepare(batch), batch)

    return Way(name, "of the test", load, kind)


def scaled(factor: float) -> Callable[[Work, Batch], Work]:
    def change(work: Work, batch: Batch) -> Work:
        def attend(pieces: Sequence[Operands]) -> list[torch.Tensor]:
            return [factor * out for out in work.attend(pieces)]

        return replace(work, attend=attend)

    return change


def gate_of(**options) -> bench.Gate:
    return bench.Gate(CPU, torch.float32, **options)


def cells_of(ways: Sequence[Way], output: Path, skip: tuple[str, ...] = (), deadline: float = NEVER) -> list[dict]:
    run = bench.Run(CPU, torch.float32, 2, time.perf_counter() + deadline)
    bench.run_tables(["tiny"], MODES, gate_of(skip=skip), ways, run, output)
    return json.loads(output.read_text())["cells"] if output.exists() else []


def test_gates_pass() -> None:
    gate = gate_of()
    for mode in MODES:
        for way in WAYS:
            outcome = gate.outcome(way, mode)
            if way.name in HERE:
                assert outcome.status == MEASURED, (way.name, outcome.reason)
                forward_only = way.name == "FlexAttention"
                assert outcome.gate_error.keys() == ({"out"} if forward_only else {"out", "dq", "dk", "dv"})
            else:
                assert outcome.status in (MEASURED, "absent") or way.compiled, (way.name, outcome.reason)
        assert gate.outcome(way_named("ours triton"), mode).reason == "needs a GPU"  # never in the interpreter


def test_tables_on_cpu(tmp_path, capsys) -> None:
    output = tmp_path / "deep" / "tree.json"
    cells = cells_of(WAYS, output, skip=("FlexAttention",))
    assert [(cell["name"], cell["mode"], cell["phase"]) for cell in cells] == [
        ("tiny", mode, phase) for mode in MODES for phase in PHASES
    ]
    for cell in cells:
        shape, flops = cell["shape"], cell["flops"]
        assert flops == {FORWARD: 4, BOTH: 14}[cell["phase"]] * cell["pairs"]["visible"] * shape["heads"] * 32
        assert cell["dense"]["length"] ** 2 / 2 == pytest.approx(cell["pairs"]["visible"], rel=0.05)
        assert cell["tree_s"] > 0
        for way in WAYS:
            record = cell["ways"][way.name]
            assert record["note"] == way.note
            if record["status"] != MEASURED:
                assert (record["status"], bool(record["reason"])) == ("absent", True)
                assert "median_s" not in record
                continue
            assert 0 < record["min_s"] <= record["quartile_1_s"] <= record["median_s"] <= record["quartile_3_s"]
            assert record["rounds"] == 2
            assert record["peak_mib"] >= 0
            assert record["tflop_per_s"] == pytest.approx(flops / record["median_s"] / 1e12)
            share = record["tflop_per_s"] / cell["dense"]["tflop_per_s"]
            assert record["percent_of_dense_rate"] == pytest.approx(100 * share)
            assert record["ratio_to_ours"] > 0
        assert cell["ways"][cell["ours"]]["ratio_to_ours"] == 1
        for name in ("ours torch", "duplicates SDPA", "PrefixGrouper SDPA"):
            assert cell["ways"][name]["status"] == MEASURED, cell["ways"][name]
        assert cell["ways"]["FlexAttention"]["reason"] == "skipped on request"
    printed = capsys.readouterr().out
    assert "mode: CPU" in printed
    assert "needs a GPU" in printed
    assert {"torch", "commit", "cores"} <= json.loads(output.read_text())["machine"].keys()


def test_wrong_way_gets_no_time(tmp_path, capsys) -> None:
    ways = (OURS, changed("right", scaled(1.0)), changed("wrong", scaled(1.001)))
    for cell in cells_of(ways, tmp_path / "tree.json"):
        assert cell["ways"]["right"]["status"] == MEASURED
        wrong = cell["ways"]["wrong"]
        assert wrong["status"] == "gate failed"
        assert wrong["reason"].startswith("max error")
        assert "median_s" not in wrong
    assert "gate failed: max error" in capsys.readouterr().out


def forgotten_gradient(work: Work, batch: Batch) -> Work:
    def attend(pieces: Sequence[Operands]) -> list[torch.Tensor]:
        return work.attend([Operands(x.q, x.k, x.v.detach() + 0.0 * x.v) for x in pieces])

    return replace(work, attend=attend)


def one_copy_off(work: Work, batch: Batch) -> Work:
    """One row of the first sequence is off, where the other copies of its position are right."""

    def attend(pieces: Sequence[Operands]) -> list[torch.Tensor]:
        first, *others = work.attend(pieces)
        return [first + 0.1 * (torch.arange(len(first)) == 3)[:, None, None], *others]

    return replace(work, attend=attend)


def swapped_branches(work: Work, batch: Batch) -> Work:
    return replace(work, at=[at.flip(0) for at in work.at])


@pytest.mark.parametrize(
    "change", [scaled(float("nan")), forgotten_gradient, one_copy_off, swapped_branches, scaled(1.0 + 1e-3)]
)
@pytest.mark.parametrize("mode", MODES)
def test_gate_rejects(change, mode: str) -> None:
    assert gate_of().outcome(changed("wrong", change), mode).status == "gate failed"


def test_others_go_on(tmp_path) -> None:
    """A way that is missing, one that breaks in the gate, and two that run out of memory at the real shape."""
    real = len(tree_ways.make_batch(TINY, "mixture", CPU, torch.float32).tree)

    def missing(device: torch.device) -> Prepare:
        raise ImportError("No module named 'peer'")

    def broken(work: Work, batch: Batch) -> Work:
        raise ValueError("cannot compile\nbecause of much else")

    def large(work: Work, batch: Batch) -> Work:
        if len(batch.tree) == real:
            raise torch.OutOfMemoryError("out of memory")
        return work

    def large_later(work: Work, batch: Batch) -> Work:
        def attend(pieces: Sequence[Operands]) -> list[torch.Tensor]:
            large(work, batch)
            return work.attend(pieces)

        return replace(work, attend=attend)

    ways = (
        Way("missing", "", missing),
        changed("broken", broken),
        changed("large", large),
        changed("large later", large_later),
        OURS,
    )
    for cell in cells_of(ways, tmp_path / "tree.json"):
        said = {name: (record["status"], record.get("reason")) for name, record in cell["ways"].items()}
        assert said["missing"] == ("absent", "ImportError: No module named 'peer'")
        assert said["broken"] == ("failed", "ValueError: cannot compile")
        if cell["mode"] == "mixture":
            for name in ("large", "large later"):
                assert said[name] == ("failed", "OutOfMemoryError: out of memory")
        assert said["ours torch"] == (MEASURED, None)


def test_forward_alone_is_said(tmp_path) -> None:
    """A way without a backward is timed forward, and absent with its reason in the other table."""

    def no_backward(work: Work, batch: Batch) -> Work:
        return replace(work, no_backward="has no backward")

    for cell in cells_of((OURS, changed("half", no_backward)), tmp_path / "tree.json"):
        half = cell["ways"]["half"]
        if cell["phase"] == FORWARD:
            assert half["status"] == MEASURED
        else:
            assert (half["status"], half["reason"]) == ("absent", "has no backward")


def test_spent_budget_stops(tmp_path, capsys) -> None:
    assert cells_of((OURS,), tmp_path / "tree.json", deadline=-1.0) == []
    assert "the time is spent" in capsys.readouterr().out


@pytest.mark.parametrize("mode", MODES)
def test_group(mode: str) -> None:
    shape = Shape(2, 1, 16, prompt=30, trace=20, response=10, rollouts=3)
    batch = tree_ways.make_batch(shape, mode, CPU, torch.float32)
    branches = 2 if mode == "mixture" else 1
    assert len(batch.tree) == 30 + 20 + 20 + branches * 3 * 10
    lengths = sorted(path.numel() for path in batch.tree.index)
    assert lengths == sorted([50] + [30 + 20 - tree_ways.SUFFIX + 10] * 3 + [40] * 3 * (mode == "mixture"))
    assert batch.duplicated_pairs == sum(n * (n + 1) // 2 for n in lengths)
    assert batch.tree.pairs < batch.duplicated_pairs
    for branch, count in zip(batch.branches, (1 + 3 * (mode == "mixture"), 3)):
        assert len(branch.response_at) == count
        for path in branch.response_at:
            ids = batch.tree.input_ids[torch.cat([branch.prompt_at, path])]
            assert torch.equal(batch.tree.position_ids[path], torch.arange(len(branch.prompt_at), len(ids)))
    work = DUPLICATES.open(CPU)(batch)
    total = torch.zeros_like(batch.dout)
    for at, dout in zip(work.at, work.douts):
        total.index_add_(0, at, dout)
    torch.testing.assert_close(total, batch.dout)


def packed_attention(device: torch.device) -> tree_ways.Dense:
    """What the variable-length kernels of a GPU compute, sequence by sequence from the bounds they are given."""

    def attend(x: Operands, lengths: tree_ways.Lengths) -> torch.Tensor:
        bounds_q, bounds_k = (bounds.tolist() for bounds in lengths.bounds)
        assert (bounds_q[-1], bounds_k[-1]) == (len(x.q), len(x.k))
        outputs = []
        for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:]):
            q, k, v = (rows.transpose(0, 1) for rows in (x.q[q0:q1], x.k[k0:k1], x.v[k0:k1]))
            mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - q1 + q0)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            outputs.append(out.transpose(0, 1))
        return torch.cat(outputs)

    return attend


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("load", [tree_ways.load_duplicates, tree_ways.load_grouper])
def test_layouts_of_the_variable_length_kernels(load, mode: str) -> None:
    provider = tree_ways.Provider("packed", "of the test", packed_attention, ragged=True, needs_gpu=False)
    outcome = gate_of().outcome(Way("packed", "", partial(load, provider=provider)), mode)
    assert outcome.status == MEASURED, outcome.reason


def test_backend_of_the_library_that_is_not_there(monkeypatch) -> None:
    def refuse(*operands, **options):
        raise RuntimeError("tree_attention: this build has no such kernel")

    monkeypatch.setattr(tree_ways, "tree_attention", refuse)
    with pytest.raises(Absent, match="no such kernel"):
        OURS.open(CPU)


def test_growth(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench, "FACTORS", (1, 2))
    output = tmp_path / "deep" / "growth.json"
    run = bench.Run(CPU, torch.float32, 2, time.perf_counter() + NEVER)
    bench.run_growth(TINY, MODES, gate_of(), WAYS, run, output)
    result = json.loads(output.read_text())
    points = result["points"]
    assert [(p["mode"], p["grown"], p["factor"]) for p in points] == [
        (mode, letter, factor) for mode in MODES for letter in "GPTY" for factor in (1, 2)
    ]
    for point in points:
        assert point["duplicates"]["way"] == "duplicates SDPA"
        assert point["ours"]["median_s"] > 0
        assert point["ratio"] > 0
    tokens = {(p["mode"], p["grown"], p["factor"]): p["tokens"] for p in points}
    for mode in MODES:
        branches = 2 if mode == "mixture" else 1
        more = {"G": branches * 3 * 16, "P": 40, "T": 2 * 24, "Y": branches * 3 * 16}
        for letter, extra in more.items():
            assert tokens[mode, letter, 2] - tokens[mode, letter, 1] == extra
    assert "T x2" in capsys.readouterr().out


def test_plot_or_its_absence(tmp_path, monkeypatch, capsys) -> None:
    sides = {kind: {"way": kind, "median_s": 0.1} for kind in ("ours", "duplicates")}
    points = [{"mode": "sample", "grown": letter, "factor": f, **sides} for letter in "GPTY" for f in (1, 2)]
    real = builtins.__import__

    def without(name: str, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    try:
        import matplotlib  # noqa: F401
    except ImportError:
        pass
    else:
        bench.plot_growth(points, tmp_path / "growth.png")
        assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(builtins, "__import__", without)
    bench.plot_growth(points, tmp_path / "none.png")
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "none.png").exists()
