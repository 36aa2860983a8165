"""kill -9 and resume: a run killed at any moment must end as the run that was not killed, bit for bit.

`make kill`: twenty runs at random moments and one at each delicate moment; `--only NAME ...`: those moments alone. Each
run is a fork of this process, which has imported everything and trained nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer

from pact import checkpoints, cli, recovery, reporting, train
from pact.envs.toybox_text import build_tokenizer
from pact.reporting import MetricsWriter, read_metrics

CONFIG = {
    "env": "toybox",
    "env_options": {"train": 16, "test": 4, "hops": [1, 1], "sources": 2, "distractors": 0},
    "model": "toybox",
    "model_config": {
        "model_type": "qwen3",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 2048,
    },
    "anchor_q": 0.5,
    "kl_coef": 0.01,
    "max_steps": 7,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_rollouts": 2,
    "rollout_batch_steps": 2,
    "max_turns": 2,
    "max_turn_tokens": 6,
    "warm_start_steps": 4,
    "warm_start_batch_size": 2,
    "warm_start_lr": "1e-2",
    "learning_rate": "1e-3",
    "lr_scheduler_type": "linear",
    "eval_tasks": 4,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "eval_temperature": 1.0,
    "logging_steps": 2,
    "save_steps": 3,
    "save_total_limit": 1,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}
RUN = Path("runs/cut")
BEGIN = ["train", "config.yaml", "--run_name", RUN.name]
RESUME = ["train", "--resume", RUN.name]

# -- moments -----------------------------------------------------------------------------------------------------------


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, when: Callable[..., bool] = lambda *_, **__: True, act: Callable = die) -> None:
    """``act`` with the arguments of ``owner.name`` before it runs, where ``when`` says so."""
    call = getattr(owner, name)

    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            act(*args, **kwargs)
        return call(*args, **kwargs)

    setattr(owner, name, wrapped)


def in_checkpoint(step: int, phase: str = RUN.name) -> Callable[..., bool]:
    return lambda *args: any(Path(str(a)).match(f"{phase}/checkpoint-{step}") for a in args)


def half_a_line(writer: MetricsWriter, step: int, logs: Any) -> None:
    with writer.path.open("a") as file:
        file.write('{"phase": "train", "step": 4, "lo')
    die()


def half_removed(checkpoint: Path) -> None:
    (checkpoint / checkpoints.MARK).unlink()
    next(checkpoint.glob("*.safetensors")).unlink()
    die()


def rewriting(name: str) -> Callable[[], None]:
    """Killed when the new content stands beside the file and the file is not replaced yet."""
    return lambda: before(Path, "replace", lambda part, target: Path(target).name == name)


# What happens in the first process and, where there is a second function, in the one that resumes.
MOMENTS: dict[str, Sequence[Callable[[], None]]] = {
    "config.yaml is being written": [rewriting(train.CONFIG_FILE)],
    "warm-start checkpoint without its mark": [
        lambda: before(recovery, "flush_folder", in_checkpoint(3, train.WARM_START))
    ],
    "last warm-start checkpoint being saved": [
        lambda: before(Trainer, "_save_rng_state", in_checkpoint(4, train.WARM_START))
    ],
    "first evaluation logged, not saved": [lambda: before(train, "save_records")],
    "between model and optimiser": [lambda: before(Trainer, "_save_optimizer_and_scheduler", in_checkpoint(6))],
    "between state and rollouts": [
        lambda: before(recovery, "save_groups", lambda path, steps: in_checkpoint(6)(path.parent))
    ],
    "before the mark": [lambda: before(recovery, "flush_folder", in_checkpoint(6))],
    "between mark and rotation": [lambda: before(recovery, "rotate", in_checkpoint(6))],
    "the old checkpoint half removed": [
        lambda: before(checkpoints, "remove", lambda path: checkpoints.read_mark(path) is not None, half_removed)
    ],
    "a line of metrics.jsonl half written, then its repair": [
        lambda: before(
            MetricsWriter, "write", lambda writer, step, logs: (writer.phase, step) == ("train", 4), half_a_line
        ),
        rewriting("metrics.jsonl"),
    ],
    "evaluation during training": [
        lambda: before(train.PactTrainer, "play", lambda trainer, tasks: trainer.state.global_step == 4)
    ],
    "final evaluation logged, not saved": [
        lambda: before(train, "save_records", lambda records, path: path.name == train.EVAL_FINAL)
    ],
    "final model being written": [
        lambda: before(PreTrainedModel, "save_pretrained", lambda _, path, **__: Path(path).name == "model.part")
    ],
    "final model not saved": [lambda: before(train, "save_whole")],
    "after the end, then the final model being replaced": [
        lambda: before(train, "_summarise"),
        lambda: before(Path, "rename", lambda _, target: Path(target).name == "model"),
    ],
}

# -- runs --------------------------------------------------------------------------------------------------------------


def launch(folder: Path, arguments: Sequence[str], sabotage: Callable[[], None] | None = None) -> int:
    """Start ``pact`` in ``folder``, a process group of its own; returns its process id."""
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)  # here too: the child may be killed before it gets to it
        return pid
    os.setpgid(0, 0)
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    train.draw_curves = reporting.draw_curves = lambda *_: None  # half of the time, and drawn anew by any process
    try:
        if sabotage:
            sabotage()
        code = cli.main(arguments)
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(pid: int, seconds: float) -> bool:
    """kill -9 of the group after ``seconds``; False when it had ended by itself before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    os.killpg(pid, signal.SIGKILL)
    return wait(pid) == -signal.SIGKILL


def command(folder: Path) -> list[str]:
    return RESUME if (folder / RUN / train.CONFIG_FILE).exists() else BEGIN


def finish(folder: Path) -> None:
    code = wait(launch(folder, command(folder)))
    if code:
        raise SystemExit(f"{folder}: exit code {code}\n{(folder / 'log.txt').read_text()[-3000:]}")


def new_folder(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def stage(folder: Path) -> str:
    """What the run was doing, from what it left."""
    run = folder / RUN
    if not (run / train.CONFIG_FILE).exists():
        return "before config.yaml"
    if (run / "model").exists() or (run / "model.part").exists():
        return "final model"
    if (run / train.EVAL_FINAL).exists():
        return "after the final evaluation"
    half = [p for p in run.rglob("checkpoint-*") if not (p / checkpoints.MARK).exists()]
    if half:
        return f"saving {half[0].relative_to(run)}"
    lines = read_metrics(run / "metrics.jsonl")
    if (run / train.EVAL_START).exists():
        return f"training after step {max(line['step'] for line in lines if line['phase'] == 'train')}"
    warm = [line["step"] for line in lines if line["phase"] == "warm_start"]
    return f"warm start or first evaluation, after step {max(warm, default=0)}"


# -- comparison --------------------------------------------------------------------------------------------------------


def outcome(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves, without the time it took."""
    run = folder / RUN
    last = checkpoints.checkpoints(run)[-1]  # one before it stays when the kill comes before its removal, at the end
    state = json.loads((last / checkpoints.STATE).read_text())
    state["log_history"] = [timeless(line) for line in state["log_history"]]
    loaded = {name: torch.load(last / f"{name}.pt", weights_only=True) for name in ("optimizer", "scheduler")}
    return {
        "model": load_file(run / "model" / "model.safetensors"),
        "checkpoint": load_file(last / "model.safetensors"),
        "warm start": (run / train.WARM_START / "checkpoint-4" / "model.safetensors").read_bytes(),
        "random states": torch.load(last / "rng_state.pth", weights_only=False),
        "trainer state": state,
        "metrics.jsonl": [timeless(line) for line in read_metrics(run / "metrics.jsonl")],
        **{name: (run / name).read_bytes() for name in (train.EVAL_START, train.EVAL_FINAL)},
        **loaded,
    }


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    timing = ("seconds", "per_second", "runtime")
    return {key: value for key, value in line.items() if not any(word in key for word in timing)}


def differences(first: Any, second: Any, at: str = "") -> list[str]:
    """Where two structures are not equal bit for bit."""
    if isinstance(first, torch.Tensor):
        same = first.dtype == second.dtype and torch.equal(first, second)
        return [] if same else [at]
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [f"{at} {sorted(map(str, first.keys() ^ second.keys()))}"]
        return [text for key in first for text in differences(first[key], second[key], f"{at}/{key}")]
    if isinstance(first, list | tuple):
        if len(first) != len(second):
            return [f"{at} has {len(first)} and {len(second)} entries"]
        return [text for i, pair in enumerate(zip(first, second)) for text in differences(*pair, f"{at}[{i}]")]
    same = (first == second).all() if hasattr(first, "all") else first == second
    return [] if same else [f"{at}: {str(first)[:80]} against {str(second)[:80]}"]


def leftovers(folder: Path) -> list[str]:
    """Half-written things that a finished run still has."""
    return [str(path.relative_to(folder)) for path in (folder / RUN).rglob("*") if path.suffix in (".part", ".old")]


# -- the matrix --------------------------------------------------------------------------------------------------------


def at_moment(root: Path, name: str) -> dict[str, Any]:
    folder = new_folder(root, name.replace(" ", "-").replace("/", "-"))
    kills = []
    for sabotage in MOMENTS[name]:
        if wait(launch(folder, command(folder), sabotage)) == -signal.SIGKILL:
            kills.append(stage(folder))
    if not kills:
        raise SystemExit(f"{name}: the run was not killed\n{(folder / 'log.txt').read_text()[-3000:]}")
    finish(folder)
    return {"moment": name, "killed": kills} | {"folder": folder}


def at_random(root: Path, number: int, draw: random.Random, seconds: float) -> dict[str, Any]:
    folder = new_folder(root, f"random-{number}")
    kills: list[str] = []
    times: list[float] = []
    while not kills or (len(kills) < 3 and draw.random() < 0.4):
        times.append(round(draw.uniform(0.0, seconds), 3))
        if kill_after(launch(folder, command(folder)), times[-1]):
            kills.append(stage(folder))
        else:  # it had ended: another run, and sooner
            shutil.rmtree(folder)
            folder, seconds, kills, times = new_folder(root, f"random-{number}"), times[-1], [], []
    finish(folder)
    return {"moment": "random", "seconds": times, "killed": kills} | {"folder": folder}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="runs killed at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(MOMENTS), help="these moments, and no random ones")
    parser.add_argument("--output", type=Path, help="where the record goes")
    options = parser.parse_args(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no threads before a fork
    torch.set_num_threads(1)
    build_tokenizer()  # two seconds, once for all runs
    failed, records = 0, []
    with tempfile.TemporaryDirectory() as temporary:
        root, draw = Path(temporary), random.Random(options.seed)
        whole = new_folder(root, "whole")
        start = time.monotonic()
        finish(whole)
        seconds = time.monotonic() - start
        expected = outcome(whole)
        print(f"not killed: {seconds:.1f} s", flush=True)
        trials: list[Callable[[], dict[str, Any]]] = [
            functools.partial(at_moment, root, name) for name in (options.only or MOMENTS)
        ]
        if options.only is None:
            trials += [functools.partial(at_random, root, i, draw, seconds) for i in range(options.kills)]
        for trial in trials:
            record = trial()
            folder = record.pop("folder")
            record["differences"] = differences(expected, outcome(folder)) + leftovers(folder)
            failed += bool(record["differences"])
            records.append(record)
            print(json.dumps(record), flush=True)
            shutil.rmtree(folder)
    if options.output:
        about = {
            "command": "make kill",
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, CPU, 1 thread",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "uninterrupted_seconds": round(seconds, 1),
            "runs": len(records),
            "kills": sum(len(record["killed"]) for record in records),
            "different": failed,
            "records": records,
        }  # fmt: skip
        options.output.write_text(json.dumps(about, indent=1) + "\n")
    print(f"{len(records)} killed runs, {failed} differ from the run that was not killed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
