"""What a run will take, before it: ``pact plan``. It loads no weights and starts no run.

Tokens are those of a sample of the tasks (`pact.workload`), bytes those of one process (`pact.memory`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from logging import INFO, basicConfig, getLogger
from pathlib import Path

from transformers.utils import logging

from pact.arguments import RunSettings, parse_settings
from pact.budget import PARTS, Fit, Plan, gib, room_in
from pact.envs import make
from pact.memory import RESERVE, Shadow, Strategy, autocast_dtype, checkpoints, count, free_memory
from pact.modeling import causal_lm, vocabulary_size
from pact.reporting import exit_code
from pact.samples import with_context
from pact.train import load_tasks, load_tokenizer, outline
from pact.workload import SAMPLE, StepTokens, workload

USAGE = "pact plan [CONFIG.yaml] [--processes N] [--sample N] [--SETTING VALUE ...]"


def run(argv: Sequence[str]) -> None:
    """Print the plan of the settings in ``argv``. Raises ValueError for what the user can mend."""
    logging.disable_progress_bar()
    basicConfig(format="%(message)s")
    getLogger("pact").setLevel(INFO)
    parser = argparse.ArgumentParser(USAGE, allow_abbrev=False, add_help=False)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--sample", type=int, default=SAMPLE)
    own, rest = parser.parse_known_args(argv)
    if own.sample < 1:
        raise ValueError(f"sample is {own.sample}, set it to at least 1: it counts tasks")
    config = [Path(rest.pop(0))] if rest and not rest[0].startswith("-") else []
    settings = parse_settings(rest, *config)
    args = settings.training
    env = make(settings.env.env, **settings.env.options())
    tasks, _ = load_tasks(env, settings)
    tokenizer = load_tokenizer(settings.model, env)
    shadow = Shadow(lambda: outline(settings, tokenizer), settings.pact, args)
    objective = with_context(settings.pact, shadow.model)
    free = free_memory(args.device, args.memory_gib)
    names = ("single",) if own.processes == 1 else ("ddp", "fsdp2", "zero3")
    fits = [Fit(shadow, args, objective, Strategy(name, own.processes), free) for name in names]
    if settings.auto_budget:
        objective = replace(objective, token_budget=fits[0].token_budget(tasks, tokenizer))
    work = workload(tasks, tokenizer, objective, args, own.sample)
    plans = [fit.plan(work) for fit in fits]
    print("\n".join([*model_lines(shadow, settings), *token_lines(plans[0], shadow), *memory_lines(plans)]))
    print("\n".join(activation_lines(shadow, settings, work.largest_tree)))
    for name, plan in zip(names, plans):
        for warning in plan.warnings():
            print(f"warning ({name}): {warning}")


def model_lines(shadow: Shadow, settings: RunSettings) -> list[str]:
    """Model and precision."""
    total, trained, dtype = count(shadow.parameters), count(shadow.trainable), autocast_dtype(settings.training)
    weights = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in shadow.parameters}))
    return [
        f"model      {causal_lm(shadow.model).config.model_type}, {total / 1e6:,.1f} million parameters, "
        f"{trained / 1e6:,.1f} of them trained; weights {weights}, "
        + ("no autocast" if dtype is None else f"autocast {str(dtype).removeprefix('torch.')}")
    ]


def token_lines(plan: Plan, shadow: Shadow) -> list[str]:
    """Tokens of tasks and steps, and matmul flops of an update."""
    work = plan.workload
    budget = "none" if work.budget is None else f"{work.budget:,}"
    lines = [
        f"tasks      {work.tasks:,}, {work.sampled:,} of them looked at: prompt up to {work.prompt:,} tokens, trace "
        f"up to {work.trace:,} ({work.context:,} as text in the prompt)",
        f"           {work.overlong} prompts leave no room for a turn, {work.unread} traces do not fit into the prompt "
        "of typical rollouts",
        f"sequences  up to {work.longest:,} tokens; token_budget {budget}",
        "",
        f"{'a step of one process':22} {'unique':>12} {'dense':>12} {'trees':>8} {'largest':>10} {'update':>12} "
        f"{'sampling':>12}",
    ]
    names = {"rollouts like traces": work.typical, "rollouts at the limit": work.limit, "warm start": work.warm}
    for name, step in names.items():
        if step is not None:
            update, sampling = flops(shadow, step)
            lines.append(
                f"{name:22} {step.unique:12,.0f} {step.dense:12,.0f} {step.trees:8,.1f} {step.largest:10,} "
                f"{update / 1e12:6,.3g} Tflop {sampling / 1e12:6,.3g} Tflop"
            )
    return lines


def flops(shadow: Shadow, step: StepTokens) -> tuple[float, float]:
    """(forward and backward of one step, sampling its rollouts): matmuls, the second without attention.

    Layers as followed on the model itself; attention 14 a visible pair and channel (7 matmuls), head 6 a row and
    weight.
    """
    low, high = 256, 512
    per_token = (shadow.step(high).flops - shadow.step(low).flops) / (high - low)
    config = causal_lm(shadow.model).config.get_text_config(decoder=True)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pair = 14 * config.num_hidden_layers * config.num_attention_heads * dim
    head = config.hidden_size * vocabulary_size(shadow.model)
    update = per_token * step.unique + pair * step.pairs + 6 * head * step.rows
    return update, 2 * (count(list(shadow.layers.parameters())) + head) * step.sampled


def memory_lines(plans: Sequence[Plan]) -> list[str]:
    """One column a strategy, GiB a process."""
    needs, processes = [plan.estimate for plan in plans], plans[0].strategy.processes
    rows = {name: [getattr(need, part) for need in needs] for part, name in PARTS.items()}
    rows[f"activations ({needs[0].tokens:,} tokens)"] = [need.activations for need in needs]
    rows["= training"] = [need.training for need in needs]
    rows["KV cache, whole weights"] = [need.rollouts for need in needs]
    rows["= sampling"] = [need.sampling for need in needs]
    head = "".join(f"{plan.strategy.name:>10}" for plan in plans)
    title = "GiB of the one process" if processes == 1 else f"GiB of each of {processes} processes"
    lines = ["", f"{title:36}{head}"]
    lines += [f"{name:36}" + "".join(f"{gib(value):>10}" for value in row) for name, row in rows.items()]
    free = plans[0].free
    return [*lines, f"free: {gib(free)} GiB, of which {gib(room_in(free))} are used ({RESERVE:.0%} is kept in reserve)"]


def activation_lines(shadow: Shadow, settings: RunSettings, tokens: int) -> list[str]:
    """Activations as a straight line in the tokens of a tree, with and without gradient checkpointing."""
    lines, on = [""], checkpoints(settings.training)
    low, high = max(3, tokens // 2), max(4, tokens)
    for checkpointing in (False, True) if causal_lm(shadow.model).supports_gradient_checkpointing else (False,):
        at_low, at_high = (shadow.step(n, checkpointing=checkpointing).peak - shadow.gradients for n in (low, high))
        slope = (at_high - at_low) / (high - low)
        what = "with gradient checkpointing" if checkpointing else "without checkpointing"
        constant, chosen = gib(int(at_high - slope * high)), " (as set)" * (checkpointing == on)
        lines.append(f"activations {what}: {constant} GiB + {slope / 1024:,.1f} KiB a token{chosen}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """`run`, with the exit codes and one-line errors of ``pact.reporting.exit_code``."""
    arguments = sys.argv[1:] if argv is None else argv
    return exit_code(lambda: run(arguments), "nothing was begun")


if __name__ == "__main__":
    sys.exit(main())
