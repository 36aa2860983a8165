"""The LM-head losses against log_softmax on kept logits: forward and backward, time and peak memory, side by side.

    python benchmarks/linear_logprob.py [--rows 2048 --hidden 512 --vocab 8192 --entropy]

`naive`: logits, log_softmax, gather, one backward. `linear_logprob`: logits a chunk at a time, recomputed in the
backward (4 matmuls a row to naive's 3). `fused`: linear_cotrain_loss, gradients formed in the forward (3 matmuls).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from measure import MiB, interleaved, peak_memory, ratio
from torch import Tensor

from pact_kernels import TokenTerms, linear_cotrain_loss, linear_logprob
from pact_kernels.terms import RL


class Problem:
    """Random operands, and policy-gradient terms whose ratio is 1: the loss of every way is the same."""

    entropy_coef = 0.01

    def __init__(self, rows: int, hidden: int, vocab: int, entropy: bool) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(rows, hidden).requires_grad_()
        self.weight = (torch.randn(vocab, hidden) / hidden**0.5).requires_grad_()
        self.target = torch.randint(0, vocab, (rows,))
        self.gain = torch.randn(rows)  # weight x advantage
        self.entropy = entropy
        kind = torch.full((rows,), RL)
        self.terms = TokenTerms(self.target, None, self.gain * rows, torch.full((rows,), 1 / rows), kind)

    def naive(self) -> None:
        logp_NV = torch.log_softmax(self.hidden @ self.weight.T, dim=-1)
        entropy = -(logp_NV.exp() * logp_NV).sum(-1) if self.entropy else None
        self._backward(logp_NV.gather(1, self.target[:, None])[:, 0], entropy)

    def linear_logprob(self) -> None:
        out = linear_logprob(self.hidden, self.weight, self.target, entropy=self.entropy)
        self._backward(out.logp, out.entropy)

    def fused(self) -> None:
        coefficient = self.entropy_coef if self.entropy else 0.0
        linear_cotrain_loss(self.hidden, self.weight, self.terms, entropy_coef=coefficient).loss.backward()

    def _backward(self, logp: Tensor, entropy: Tensor | None) -> None:
        loss = -(torch.exp(logp - logp.detach()) * self.gain).sum()
        if entropy is not None:
            loss = loss - self.entropy_coef * entropy.mean()
        loss.backward()

    def fresh(self, way: Callable[[], None]) -> None:
        """Run ``way`` with no gradients from before."""
        self.hidden.grad = self.weight.grad = None
        way()


def gate(problem: Problem, ways: dict[str, Callable[[], None]]) -> None:
    """All ways give the gradients of the naive one."""
    gradients = {}
    for name, way in ways.items():
        problem.fresh(way)
        gradients[name] = (problem.hidden.grad, problem.weight.grad)
    for name, (d_hidden, d_weight) in gradients.items():
        torch.testing.assert_close(d_hidden, gradients["naive"][0], rtol=1e-3, atol=1e-5, msg=name)
        torch.testing.assert_close(d_weight, gradients["naive"][1], rtol=1e-3, atol=1e-5, msg=name)


def main() -> None:
    """Print one line a way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--entropy", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    problem = Problem(arguments.rows, arguments.hidden, arguments.vocab, arguments.entropy)
    ways = {"naive": problem.naive, "linear_logprob": problem.linear_logprob, "fused": problem.fused}
    gate(problem, ways)
    runs = {name: partial(problem.fresh, way) for name, way in ways.items()}
    seconds = interleaved(runs, arguments.repeats)
    for name, run in runs.items():
        peak = peak_memory(run) / MiB
        speedup = ratio(seconds, "naive", name)
        milliseconds = 1e3 * median(seconds[name])
        print(f"{name:15s} median {milliseconds:7.0f} ms  naive / this {speedup:4.2f}  peak {peak:5.0f} MiB")


if __name__ == "__main__":
    main()
