"""How the gradients of the terms lie to each other, how likely rollouts are under the trace: at the study's warm start.
It trains nothing.

python benchmarks/study_gradients.py [--prompts 96] [--rollouts 24] [--model runs/study/runs/WARM/model]

Rollouts of the same prompts give one gradient a term. The prompts are split in two halves: the cosine of a term between
the halves says how much of it is noise; the cosine between two terms, over other halves and divided by the root of both
of those, estimates what it would be without noise (Spearman's correction for attenuation).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import machine
from study import CONFIG
from study_plan import Study
from study_run import RUNS, episodes, weights_hash
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pact.engines.transformers import TransformersEngine
from pact.envs import make
from pact.modeling import attach_tree_attention
from pact.objective import Group, PactConfig, PactObjective
from pact.rollout import Trajectory
from pact.samples import Estimator, rl_group
from pact.trace import prepare_tokenizer

AT_ONCE = 4  # groups a backward
PROGRESS = 0.0
PLAIN = PactConfig(anchor_q=1.0, sft_coef=0.0, kl_coef=0.0, entropy_coef=0.0)
TRACE = replace(PLAIN, anchor_q=0.0)
BEHAVIOR = replace(TRACE, ratio_reference="behavior")
TRUE = "prompt-only, outcome"  # the policy gradient of success itself
TERMS: dict[str, tuple[str | None, PactConfig]] = {  # advantage (None: no rollouts) and objective
    TRUE: ("grpo", PLAIN),
    "prompt-only, turn-level": ("turn_level", PLAIN),
    "trace-conditioned, outcome": ("grpo", TRACE),
    "trace-conditioned, turn-level": ("turn_level", TRACE),
    "against behavior, clip 0.2, turn-level": ("turn_level", BEHAVIOR),
    "against behavior, clip_high 4, outcome": ("grpo", replace(BEHAVIOR, clip_high=4.0)),
    "against behavior, clip_high 4, turn-level": ("turn_level", replace(BEHAVIOR, clip_high=4.0)),
    "the same with clip_dual 3": ("turn_level", replace(BEHAVIOR, clip_high=4.0, clip_dual=3.0)),
    "component-aware SFT": (None, replace(PLAIN, sft_coef=1.0)),
}


def gradient(model: torch.nn.Module, groups: Sequence[Group], config: PactConfig) -> Tensor:
    """Of the whole objective over ``groups``, flat."""
    objective = PactObjective(config)
    denominators = objective.denominators(groups)
    model.zero_grad()
    for start in range(0, len(groups), AT_ONCE):
        some = groups[start : start + AT_ONCE]
        if config.ratio_reference == "behavior":
            objective.attach_logprobs(model, some, field="old_logp")
        for batch in objective.build(some, PROGRESS, denominators=denominators):
            objective.loss(model, batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


def compare(halves: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    """Of every term: norm, cosine between its halves, cosine with the true gradient without noise, and the first-order
    gain in it (the projection on it, of which the true gradient's own is 1)."""
    one, other = halves[TRUE]
    own = {name: cosine(*pair) for name, pair in halves.items()}
    found = {}
    for name, (a, b) in halves.items():
        across = (cosine(a, other) + cosine(b, one)) / 2
        reliable = own[name] > 0 and own[TRUE] > 0
        found[name] = {
            "norm": float((a.norm() + b.norm()) / 2),
            "halves": own[name],
            "cosine": across / (own[name] * own[TRUE]) ** 0.5 if reliable else float("nan"),
            "gain": float(torch.dot(a, other) + torch.dot(b, one)) / 2 / float(torch.dot(one, other)),
        }
    return found


def kind(episode: Trajectory) -> str:
    """How a rollout ended, and whether a call failed on the way."""
    if not episode.score.metrics["success"]:
        return "wrong"
    failed = any(one["role"] == "tool" and one["content"].startswith("error:") for one in episode.messages)
    return "right after a failed call" if failed else "right, no call failed"


def likelihoods(
    model: torch.nn.Module, groups: Sequence[Group], played: Sequence[Sequence[Trajectory]]
) -> dict[str, dict[str, float]]:
    """Of every `kind` of rollout of groups with a trace: its share, log pi(y|x), log pi(y|x, trace), nats a rollout."""
    objective = PactObjective(PLAIN)
    found: dict[str, list[tuple[float, float]]] = {}
    for start in range(0, len(groups), AT_ONCE):
        some = groups[start : start + AT_ONCE]
        objective.attach_logprobs(model, some, branches=("prompt", "trace"))
        for group, attempts in zip(some, played[start : start + AT_ONCE], strict=True):
            for rollout, episode in zip(group.rollouts, attempts, strict=True):
                logp = rollout.old_logp
                if "trace" in logp:
                    found.setdefault(kind(episode), []).append((sum(logp["prompt"]), sum(logp["trace"])))
    total = sum(map(len, found.values()))
    means = {name: torch.tensor(pairs, dtype=torch.float64).mean(0).tolist() for name, pairs in found.items()}
    return {
        name: {"share": len(found[name]) / total, "prompt": alone, "trace": given}
        for name, (alone, given) in sorted(means.items())
    }


def measure(model_path: Path, study: Study, prompts: int, rollouts: int, seed: int = 0) -> dict[str, Any]:
    settings = study.warm_start().settings
    env = make(settings["env"], **settings["env_options"])
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(model_path))
    model = AutoModelForCausalLM.from_pretrained(model_path)
    attach_tree_attention(model)
    tasks = list(env.tasks("train")[-prompts:])
    played = episodes(TransformersEngine(model, max_batch=256), env, tasks, tokenizer, settings, rollouts, seed)
    halves = {}
    for name, (advantage, config) in TERMS.items():
        pair = []
        for half in (0, 1):
            groups = []
            for task, attempts in list(zip(tasks, played, strict=True))[half::2]:
                group = rl_group(task, attempts, tokenizer, Estimator(advantage or "grpo"), config)
                groups.append(replace(group, rollouts=[]) if advantage is None else group)
            pair.append(gradient(model, groups, config))
        halves[name] = (pair[0], pair[1])
        print(f"{name}: norm {pair[0].norm():.4f}, cosine of halves {cosine(*pair):.3f}", flush=True)
    groups = [
        rl_group(task, attempts, tokenizer, Estimator("grpo"), PLAIN)
        for task, attempts in zip(tasks, played, strict=True)
    ]
    wins = [episode.score.metrics["success"] for attempts in played for episode in attempts]
    return {
        "weights": weights_hash(model_path),
        "prompts": prompts,
        "rollouts": rollouts,
        "success": sum(wins) / len(wins),
        "terms": compare(halves),
        "likelihoods": likelihoods(model, groups, played),
        "machine": machine(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--rollouts", type=int, default=24)
    parser.add_argument("--model", type=Path, default=None, help="default: the warm start of the study")
    parser.add_argument("--output", type=Path, default=None, help="default: results/study/gradients.json")
    options = parser.parse_args(argv)
    study = Study.load(CONFIG)
    torch.manual_seed(0)
    model = options.model or study.work / RUNS / study.warm_start().name / "model"
    if not model.is_dir():
        parser.error(f"no model folder {model}: run benchmarks/study.py first, or give --model")
    found = measure(model, study, options.prompts, options.rollouts)
    output = options.output or study.records / "gradients.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=2) + "\n")
    for name, term in found["terms"].items():
        print(f"{name:48} " + "  ".join(f"{key} {value:+.3f}" for key, value in term.items()))


if __name__ == "__main__":
    main()
