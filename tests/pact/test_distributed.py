"""Two processes (gloo) against one: DDP and FSDP2 give the same losses, gradients and weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pact.distributed import assign

WORKER = Path(__file__).parent / "distributed_worker.py"
SCENARIOS = ("plain", "uneven", "idle", "sft", "lora", "compiled", "evaluated")
TOLERANCE = 1e-5
METRICS = (
    "loss",
    "reward",
    "ratio/",
    "kl/",
    "entropy/",
    "logp/",
    "clip_fraction/",
    "tokens/",
    "latent/",
    "eval_reward",
)


def launch(folder, strategy, processes):
    """Run the worker; return what each process wrote, by scenario."""
    folder.mkdir()
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*(start if processes > 1 else [sys.executable]), str(WORKER), strategy, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    files = [folder / f"{strategy}_{processes}_{rank}.pt" for rank in range(processes)]
    return [torch.load(file, weights_only=True) for file in files]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("one") / "out", "ddp", 1)[0]


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two(request, tmp_path_factory):
    return request.param, launch(tmp_path_factory.mktemp(request.param) / "out", request.param, 2)


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_are_one(one, two, scenario):
    """SGD with rate 1: a gradient that is wrong by a factor is a weight that is wrong."""
    strategy, processes = two
    expected = one[scenario]
    assert max(g.abs().max() for g in expected["gradients"][0].values()) > 0.01  # far above the tolerance
    for found in (process[scenario] for process in processes):
        assert all(found["sharded"]) == (strategy == "fsdp2")
        assert len(found["gradients"]) == len(expected["gradients"])
        for theirs, ours in zip(expected["gradients"], found["gradients"]):
            assert largest_difference(theirs, ours) < TOLERANCE
        assert largest_difference(expected["weights"], found["weights"]) < TOLERANCE


def test_the_whole_command(one, two):
    """Warm start, evaluation, training, a stop and a resumption: where weights are sharded the model is loaded anew."""
    expected = one["command"]
    steps = [(line["phase"], line["step"]) for line in expected["logs"] if "loss" in line]
    assert steps == [("warm_start", 1), ("train", 1), ("train", 2)]
    for found in (process["command"] for process in two[1]):
        assert largest_difference(expected["weights"], found["weights"]) < TOLERANCE
        for line, other in zip(expected["logs"], found["logs"], strict=True):
            for name in ("loss", "reward", "eval_reward", "kl/prompt"):
                assert other.get(name) == pytest.approx(line.get(name), abs=TOLERANCE)


@pytest.mark.parametrize("scenario", [*SCENARIOS, "command"])
def test_logged_metrics_are_those_of_one_process(one, two, scenario):
    _, processes = two
    for line, found in zip(one[scenario]["logs"], processes[0][scenario]["logs"], strict=True):
        names = {name for name in line if name.startswith(METRICS) and "unique" not in name}
        assert "loss" in names or "eval_reward" in names
        for name in names - {"tokens/dense"}:
            assert found[name] == pytest.approx(line[name], abs=TOLERANCE, rel=TOLERANCE), name


def test_the_scenarios_are_what_they_say(one, two):
    _, processes = two
    assert sum(one["idle"]["groups"]) == 8
    assert [sum(process["idle"]["groups"]) for process in processes] == [6, 2]  # 2 + 4 and 2 + 0
    assert sum(sum(process["uneven"]["groups"]) for process in processes) == sum(one["uneven"]["groups"]) == 24


def test_assign_balances_costs():
    assert assign([5, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5]]
    assert assign([7], 3) == [[0], [], []]
    assert assign([], 2) == [[], []]
    costs = [13, 8, 8, 7, 5, 3, 2, 2]
    loads = [sum(costs[i] for i in share) for share in assign(costs, 3)]
    assert sorted(i for share in assign(costs, 3) for i in share) == list(range(8))
    assert max(loads) - min(loads) <= 2
