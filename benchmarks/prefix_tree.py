"""Input tokens a second that PrefixTree.from_sequences takes in, on one core.

python benchmarks/prefix_tree.py                      a printed table
pytest benchmarks/prefix_tree.py --benchmark-only     the same through pytest-benchmark
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import pytest
import torch

from pact_kernels import PrefixTree

GOAL = 5e6  # input tokens a second


@dataclass(frozen=True)
class Shape:
    """``groups`` prompts of random ids, each shared by ``rollouts`` sequences. Lengths in tokens."""

    groups: int
    prompt: int
    rollouts: int
    response: int
    vocab: int = 151_936

    def sequences(self) -> list[np.ndarray]:
        """The sequences, group by group."""
        rng = np.random.default_rng(0)
        made = []
        for _ in range(self.groups):
            prompt = rng.integers(0, self.vocab, self.prompt)
            made += [np.concatenate([prompt, rng.integers(0, self.vocab, self.response)]) for _ in range(self.rollouts)]
        return made


SHAPES = {
    "cpu: 1 x 8 x (1024 + 256)": Shape(1, 1024, 8, 256),
    "4b: 1 x 16 x (4096 + 1024)": Shape(1, 4096, 16, 1024),
    "a million tokens: 13 x 16 x (4096 + 1024)": Shape(13, 4096, 16, 1024),
    "short: 200 x 16 x (60 + 40)": Shape(200, 60, 16, 40),
}
INPUTS: dict[str, Callable[[np.ndarray], object]] = {
    "lists": np.ndarray.tolist,
    "numpy": np.asarray,
    "torch": torch.from_numpy,
}


def gate(sequences: list[np.ndarray], inputs: list) -> None:
    """Every sequence reads back along its path, and sees exactly that path at its last token."""
    tree = PrefixTree.from_sequences(inputs)
    for sequence, path in zip(sequences, tree.index):
        last = int(path[-1])
        assert np.array_equal(tree.input_ids[path].numpy(), sequence)
        assert int((tree.subtree_end[: last + 1] > last).sum()) == len(sequence)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_tokens_per_second(name: str, kind: str, benchmark) -> None:
    sequences = SHAPES[name].sequences()
    inputs = [INPUTS[kind](sequence) for sequence in sequences]
    gate(sequences[:64], inputs[:64])
    torch.set_num_threads(1)
    benchmark(PrefixTree.from_sequences, inputs)
    if benchmark.stats is not None:  # absent under --benchmark-disable
        benchmark.extra_info["input_tokens_per_second"] = sum(map(len, sequences)) / benchmark.stats.stats.median


def main(repeats: int = 7) -> None:
    """Print the table: CPU seconds (what one core does even on a shared machine), wall seconds beside."""
    torch.set_num_threads(1)
    print(f"input tokens a second on one core, in millions (goal {GOAL / 1e6:.0f}); medians of {repeats}")
    for name, shape in SHAPES.items():
        sequences = shape.sequences()
        total = sum(map(len, sequences))
        for kind, convert in INPUTS.items():
            inputs = [convert(sequence) for sequence in sequences]
            gate(sequences[:64], inputs[:64])
            wall, cpu = [], []
            for _ in range(repeats):
                begin, begin_cpu = time.perf_counter(), time.process_time()
                PrefixTree.from_sequences(inputs)
                wall.append(time.perf_counter() - begin)
                cpu.append(time.process_time() - begin_cpu)
            rates = [total / median(seconds) / 1e6 for seconds in (cpu, wall)]
            print(f"{name:42s} {total:9,d} tokens  {kind:6s} cpu {rates[0]:5.1f}  wall {rates[1]:5.1f}")


if __name__ == "__main__":
    main()
