"""A prompt group far over one tree's budget trains in the memory of one tree, however many rollouts it has."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import one_pass


def peak(rollouts: int, budget: int) -> tuple[int, int]:
    """(trees, peak bytes) of a step on a group of sequences up to 1,700 tokens, in a process of its own."""
    code = (
        "import torch, one_pass; torch.set_num_threads(1); from dataclasses import replace;"
        "one_pass.SHAPES['long'] = replace(one_pass.SHAPES['long'], hidden=128, prompt=300, trace=200, response=1200);"
        f"one_pass.long_group({rollouts}, {budget});"  # first, what libraries load
        f"print(*one_pass.long_group({rollouts}, {budget}))"
    )
    environment = os.environ | {
        "PYTHONPATH": str(Path(one_pass.__file__).parent),
        "MALLOC_MMAP_THRESHOLD_": str(256 * 1024),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    trees, size = done.stdout.split()[-2:]
    return int(trees), int(size)


def test_memory_does_not_grow_with_the_rollouts() -> None:
    few_trees, few = peak(2, 2048)
    trees, many = peak(12, 2048)
    assert trees > 4 * few_trees
    assert many < 1.4 * few
    assert peak(12, 10**6)[1] > 3 * many  # what one tree of them all takes: the measure does see growth


def test_cut_trees_repeat_only_the_prompts() -> None:
    """Each tree holds one rollout on one branch, or a few: the least that the budget allows."""
    shape = replace(one_pass.SHAPES["tiny"], prompt=100, trace=50, response=400, rollouts=6)
    model = one_pass.build_model(shape)
    groups = one_pass.build_groups(shape, model)
    whole = one_pass.PactObjective(one_pass.CONFIG).build(groups, 0.0)
    budget = 1000
    cut = one_pass.PactObjective(replace(one_pass.CONFIG, token_budget=budget)).build(groups, 0.0)
    assert len(whole) == 1
    assert all(batch.tokens <= budget for batch in cut)
    # A prompt and two rollouts fit (900 and 950 tokens): six trees for 12 rollouts, and at most one for the trace.
    assert len(cut) in (6, 7)
    assert sum(batch.tokens for batch in cut) <= whole[0].tokens + 6 * 150
