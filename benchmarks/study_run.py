"""One run of the study in a process of its own: ``pact train``, then the evaluations, then one record in one file.

python benchmarks/study_run.py JOB.json RECORD.json      in the study's work folder; benchmarks/study.py calls it

A ``model`` that is a folder is given relative to the repository.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from measure import machine
from study_plan import Job, pack
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from pact import train
from pact.engines.transformers import TransformersEngine
from pact.envs import Environment, Task, make
from pact.reporting import METRICS_FILE, read_metrics
from pact.rollout import RolloutLimits, Sampling, Trajectory, run_rollouts
from pact.trace import prepare_tokenizer, render_context

REPOSITORY = Path(__file__).resolve().parents[1]
RUNS = Path("runs")  # where `pact train` puts its folders
POINTS = 5  # updates that a point of the training curves is the mean of
# Record's name -> name in metrics.jsonl, of what is kept along the training.
CURVES = {
    "reward": "reward",
    "entropy": "entropy/prompt",
    "entropy_trace": "entropy/trace",
    "logp_rollout": "latent/logp_rollout",
    "logp_rollout_given_trace": "latent/logp_rollout_given_trace",
    "logp_trace": "latent/logp_trace",
    "gap": "latent/gap",
    "clipped_trace": "clip_fraction/trace",
    "mixed": "reward_equal",  # the share of groups with equal rewards; stored as its complement
}


def with_trace(task: Task, tokenizer: PreTrainedTokenizerBase) -> Task:
    """``task`` with its expert trace at the end of the last message, as the trace-conditioned branch has it."""
    assert task.expert is not None
    context = tokenizer.decode(render_context(task.expert, tokenizer))
    *before, last = task.messages
    return replace(task, messages=[*before, {**last, "content": last["content"] + context}])


def episodes(
    engine: TransformersEngine,
    env: Environment,
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
    n: int,
    seed: int,
) -> list[list[Trajectory]]:
    """``n`` episodes a task, sampled as in training; ``settings`` has its limits."""
    limits = RolloutLimits(settings["max_turns"], settings["max_turn_tokens"], settings["max_response_tokens"], None)
    return run_rollouts(env, tasks, engine, tokenizer, n=n, sampling=Sampling(1.0), limits=limits, seed=seed)


def evaluated(model: Path, job: Job) -> dict[str, Any]:
    """What each split of ``job.evaluation`` gives: its mean success, and the successes of every task in order.

    ``hits``: hexadecimal digits, a bit a task (first task highest), or with several rollouts a list of counts.
    """
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(model))
    engine = TransformersEngine(AutoModelForCausalLM.from_pretrained(model), max_batch=128)
    found = {}
    for name, split in job.evaluation.items():
        options = {**job.settings["env_options"], **split.get("env_options", {})}
        env = make(job.settings["env"], **options)
        tasks = list(env.tasks(split["split"])[: split["tasks"]])
        if split.get("trace"):
            tasks = [with_trace(task, tokenizer) for task in tasks]
        n = split.get("rollouts", 1)
        limits = {**job.settings, **split.get("limits", {})}
        played = episodes(engine, env, tasks, tokenizer, limits, n, seed=job.seed)
        success = np.array([[episode.score.metrics["success"] for episode in attempts] for attempts in played])
        flat = [episode for attempts in played for episode in attempts]
        found[name] = {
            "success": float(success.mean()),
            "tasks": len(tasks),
            "rollouts": n,
            "turns": float(np.mean([len(episode.turns) for episode in flat])),
            "calls": float(np.mean([episode.score.metrics["calls"] for episode in flat])),
            "hits": pack(success[:, 0]) if n == 1 else success.sum(axis=1).astype(int).tolist(),
        }
    return found


def curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Validation points, and means over blocks of `POINTS` updates of what training logged."""
    logged = [line for line in lines if line["phase"] == "train"]
    points = {line["step"]: line["eval_success"] for line in logged if "eval_success" in line}
    found: dict[str, Any] = {"step": list(points), "validation": list(points.values())}
    updates = [line for line in logged if "loss" in line]
    for name, source in CURVES.items():
        blocks: dict[int, list[float]] = {}
        for line in updates:
            if line.get(source) is not None:
                value = 1.0 - line[source] if name == "mixed" else line[source]
                blocks.setdefault((line["step"] - 1) // POINTS, []).append(value)
        if blocks:
            means = [[(block + 1) * POINTS, round(float(np.mean(values)), 5)] for block, values in blocks.items()]
            found[name] = means
    return found


def costs(lines: Sequence[Mapping[str, Any]], episodes_a_step: int) -> dict[str, float]:
    """Tokens and seconds of the run: of its warm-start phase too, where an arm has one of its own."""
    updates = [line for line in lines if "loss" in line]
    return {
        "sampled_tokens": sum(line.get("tokens/sampled", 0.0) for line in updates) * episodes_a_step,
        "trained_tokens": sum(line.get("tokens/unique", 0.0) for line in updates),
        "dense_tokens": sum(line.get("tokens/dense", 0.0) for line in updates),
        "seconds_generate": sum(line.get("seconds/generate", 0.0) for line in updates),
        "seconds_train": sum(line.get("seconds/train", 0.0) + line.get("seconds/logprob", 0.0) for line in updates),
        "seconds_validation": sum(line.get("eval_seconds", 0.0) for line in lines),
    }


def weights_hash(model: Path) -> str:
    """Of the weights file: equal bits, equal hash."""
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()[:12]


def run(job: Job) -> dict[str, Any]:
    """Train, evaluate, and tell."""
    begin = time.perf_counter()
    folder = RUNS / job.name
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped: it begins anew
    settings = dict(job.settings)
    if (REPOSITORY / settings["model"]).is_dir():
        settings["model"] = str(REPOSITORY / settings["model"])
    start = None
    if job.start is not None:
        warm = RUNS / json.loads(Path("warm_start.json").read_text())["name"] / "model"
        start = weights_hash(warm)
        settings |= {"model": str(warm), "model_config": {}}
    config = RUNS / f"{job.name}.yaml"
    RUNS.mkdir(exist_ok=True)
    config.write_text(yaml.safe_dump(settings))
    train.run([str(config), "--run_name", job.name])
    lines = read_metrics(folder / METRICS_FILE)
    trained = time.perf_counter() - begin
    prompts = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    record = {
        "key": job.key,
        "name": job.name,
        "stage": job.stage,
        "arm": job.arm,
        "seed": job.seed,
        "values": dict(job.values),
        "start": job.start,
        "start_weights": start,
        "weights": weights_hash(folder / "model"),
        "curve": curves(lines),
        "final": evaluated(folder / "model", job),
        "cost": costs(lines, prompts * settings["num_rollouts"])
        | {"seconds_run": trained, "seconds": time.perf_counter() - begin},
        "machine": machine(),
    }
    if job.start is not None:
        shutil.rmtree(folder)
    return record


def main(argv: Sequence[str]) -> None:
    job_file, record_file = map(Path, argv)
    torch.set_num_threads(1)  # two runs at once on two cores
    record = run(Job(**json.loads(job_file.read_text())))
    part = record_file.with_suffix(".part")
    part.write_text(json.dumps(record))
    part.replace(record_file)


if __name__ == "__main__":
    main(sys.argv[1:])
