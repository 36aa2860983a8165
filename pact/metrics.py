"""Summed metrics of the objective -> flat names for a log line. Adds nothing to the sums and writes no file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pact.trace import Component
from pact_kernels.terms import PROMPT_BRANCH, RL, SFT, TRACE_BRANCH

_BRANCHES = {"prompt": PROMPT_BRANCH, "trace": TRACE_BRANCH}
_SUPERVISED = {"reasoning": Component.REASONING, "tool_call": Component.TOOL_CALL, "answer": Component.ANSWER}


def add_metrics(total: dict[str, Tensor], part: Mapping[str, Tensor]) -> None:
    """Add the sums of one tree to `total` in place."""
    for name, value in part.items():
        total[name] = total[name] + value if name in total else value


def flatten_metrics(metrics: Mapping[str, Tensor], steps: int = 1) -> dict[str, float]:
    """Flat numbers from the added `CoTrainResult.metrics` of every tree, process and accumulation step.

    `steps`: how many optimiser steps were added up. Loss terms are means over steps and add up to the whole loss
    (``sft_coef`` included); ``tokens/*`` and ``context_overflow`` are counts a step; ``ratio``, ``kl``, ``entropy`` and
    ``logp`` are means a token (nats), ``clip_fraction`` and ``anchor/prompt_share`` shares. A mean over no token, or of
    what was not computed (KL without a reference, entropy), is left out; the three loss terms are always there.
    """
    sums = {name: value.detach().to("cpu", torch.float64) for name, value in metrics.items()}
    tokens = sums["tokens"]
    flat = {
        "loss/rl_prompt": float(sums["loss"][RL, PROMPT_BRANCH].sum()) / steps,
        "loss/rl_trace": float(sums["loss"][RL, TRACE_BRANCH].sum()) / steps,
        "loss/sft": float(sums["loss"][SFT].sum()) / steps,
    }

    def mean(name: str, source: str, where: tuple[int, ...]) -> None:
        count = float(sums.get(f"{source}_tokens", tokens)[where].sum())
        if count and source in sums:
            flat[name] = float(sums[source][where].sum()) / count

    for branch, b in _BRANCHES.items():
        flat[f"tokens/rl_{branch}"] = float(tokens[RL, b].sum()) / steps
        mean(f"clip_fraction/{branch}", "clipped", (RL, b))
        for source in ("ratio", "kl", "logp", "entropy"):
            mean(f"{source}/{branch}", source, (RL, b))
        for part, component in _SUPERVISED.items():
            mean(f"entropy/{branch}_{part}", "entropy", (RL, b, component))
    for part, component in _SUPERVISED.items():
        flat[f"tokens/sft_{part}"] = float(tokens[SFT, PROMPT_BRANCH, component].sum()) / steps
        mean(f"logp/sft_{part}", "logp", (SFT, PROMPT_BRANCH, component))
    return flat | _flatten_counts(sums, steps)


def _flatten_counts(sums: Mapping[str, Tensor], steps: int) -> dict[str, float]:
    """The scalars that `PactObjective.loss` adds beside the per-token sums."""
    counts = {name: float(value) for name, value in sums.items() if value.dim() == 0}
    flat = {
        "tokens/unique": counts["unique_tokens"] / steps,
        "tokens/dense": counts["dense_tokens"] / steps,
        "tokens/unique_dense_ratio": counts["unique_tokens"] / counts["dense_tokens"],
        "context_overflow": counts["context_overflow"] / steps,
    }
    if counts["rl_groups"]:
        flat["anchor/prompt_share"] = counts["prompt_share"] / counts["rl_groups"]
    return flat
