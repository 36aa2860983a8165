"""Stopping and going on: whole checkpoints, full disks, numbers out of range, dead engines, SIGTERM, kill -9."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trainer_setup import largest_difference, make_trainer, weights

from pact import checkpoints, cli, recovery, train
from pact.checkpoints import MARK, Mark, check_resumable, last_whole, read_mark, rotate
from pact.files import replace_folder, write_whole
from pact.objective import PactConfig
from pact.recovery import RunStopped, Terminated
from pact.reporting import MetricsWriter, read_metrics
from pact_kernels.terms import SFT

TESTS = Path(__file__).parents[1]
SETTINGS = {
    "max_steps": 5,
    "gradient_accumulation_steps": 2,
    "rollout_batch_steps": 2,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "eval_tasks": 2,
    "save_strategy": "steps",
    "save_steps": 100,  # and at the end
}


def trainer_in(folder, **settings):
    folder.mkdir(exist_ok=True)
    trainer = make_trainer(
        folder,
        config=PactConfig(anchor_q=0.5, kl_coef=0.1),
        callbacks=[MetricsWriter(folder, "train")],
        **{**SETTINGS, **settings},
    )
    trainer.how_to_resume = "continue with: the checkpoint"
    return trainer


def lines_of(folder):
    return [{key: value for key, value in line.items() if "second" not in key} for line in read_metrics(folder / MET)]


MET = "metrics.jsonl"


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr("pact.reporting.draw_curves", lambda *_: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing stopped: its weights, its Adam states and what it logged."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_in(folder)
    trainer.train()
    return weights(trainer), trainer.optimizer.state_dict()["state"], lines_of(folder)


def stopped(trainer, kind=RunStopped):
    with pytest.raises(kind) as caught:
        trainer.train()
    return str(caught.value)


def goes_on_as(whole, folder, **settings):
    """The resumed run ends with the same weights and optimiser states, and with the same schedules on the way."""
    trainer = trainer_in(folder, **settings)
    trainer.train(resume_from_checkpoint=True)
    expected, states, lines = whole
    assert largest_difference(expected, weights(trainer)) == 0.0
    for number, state in trainer.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, states[number][name]) for name, value in state.items())
    assert lines_of(folder) == lines
    assert {"learning_rate", "weight/sft", "loss/sft", "kl/prompt"} <= lines[0].keys()


def at_call(number, act, call):
    """``call``, with ``act`` before its ``number``-th time."""
    count = iter(range(1, 1000))

    def wrapped(*args, **kwargs):
        if next(count) == number:
            act()
        return call(*args, **kwargs)

    return wrapped


def fail():
    raise ConnectionError("the server is gone")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


# -- stops -------------------------------------------------------------------------------------------------------------


def test_a_dead_engine_leaves_a_checkpoint_to_go_on_from(tmp_path, whole):
    trainer = trainer_in(tmp_path)
    trainer.engine.open = at_call(2, fail, trainer.engine.open)
    with pytest.raises(RunStopped) as caught:
        trainer.train()
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert str(caught.value) == (
        "playing episodes for step 3 failed: the server is gone. The state before that is in "
        f"{tmp_path}/checkpoint-2; continue with: the checkpoint"
    )
    goes_on_as(whole, tmp_path)


def test_an_engine_dead_from_the_start_leaves_nothing(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.engine.open = at_call(1, fail, trainer.engine.open)
    assert "Nothing was trained yet" in stopped(trainer)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("save_steps", [100, 2])
def test_a_loss_that_is_not_finite_updates_nothing_and_keeps_the_rollouts(tmp_path, whole, save_steps):
    """At step 3, the first on its rollouts; with save_steps 2 the step before has a checkpoint already."""
    trainer = trainer_in(tmp_path, save_steps=save_steps)
    compute = trainer.objective.loss

    def spoiled(model, batch):
        result = compute(model, batch)
        if trainer.state.global_step < 2:
            return result
        loss = result.metrics["loss"].clone()
        loss[SFT] = torch.nan
        return replace(result, loss=result.loss * torch.nan, metrics={**result.metrics, "loss": loss})

    trainer.objective.loss = spoiled
    message = stopped(trainer)
    assert message.startswith(
        "the SFT loss of step 3 is not finite: lower learning_rate or max_grad_norm. The state before"
    )
    assert f"{tmp_path}/checkpoint-2; continue with" in message
    assert read_mark(tmp_path / "checkpoint-2").buffered == 2
    resumed = trainer_in(tmp_path, save_steps=save_steps)
    opened, played = resumed.engine.open, []
    resumed.engine.open = lambda *args, **options: played.append(resumed.state.global_step) or opened(*args, **options)
    resumed.train(resume_from_checkpoint=True)
    assert played[0] == 4  # the evaluation: the rollouts of steps 3 and 4 were kept
    assert largest_difference(whole[0], weights(resumed)) == 0.0


def test_a_step_that_fails_leaves_a_checkpoint(tmp_path, whole):
    trainer = trainer_in(tmp_path)
    trainer.objective.build = at_call(6, fail, trainer.objective.build)  # the second micro-batch of step 3
    assert stopped(trainer).startswith("step 3 failed: the server is gone. The state before that is in ")
    goes_on_as(whole, tmp_path)


def test_an_evaluation_that_fails_is_made_again(tmp_path, whole):
    trainer = trainer_in(tmp_path)
    trainer.engine.open = at_call(3, fail, trainer.engine.open)
    assert stopped(trainer).startswith("the evaluation after step 4 failed: the server is gone. The state before that")
    goes_on_as(whole, tmp_path)


def test_a_gradient_that_is_not_finite(tmp_path, whole):
    trainer = trainer_in(tmp_path)
    parameter = next(trainer.model.parameters())
    parameter.register_hook(lambda grad: grad * torch.inf if trainer.state.global_step == 3 else grad)
    assert re.match(r"the gradient norm of step 4 is (nan|inf): lower learning_rate", stopped(trainer))
    assert last_whole(tmp_path).name == "checkpoint-3"
    goes_on_as(whole, tmp_path)


@pytest.mark.parametrize(
    ("at", "says"),
    [
        (
            2,
            r"checkpoint-2 could not be written \(.* free\): the weights are not finite.*\. The last whole chec",
        ),
        (4, r"the evaluation after step 4 failed.*The weights are not finite and were not saved. The last whole chec"),
    ],
)
def test_weights_that_are_not_finite_are_not_saved(tmp_path, whole, at, says):
    """The last whole checkpoint is named and stays, also with save_total_limit 1."""
    trainer = trainer_in(tmp_path, save_steps=1, save_total_limit=1)
    step = trainer.create_optimizer

    def spoiling():
        optimizer = step()
        optimizer.step = at_call(at, lambda: next(trainer.model.parameters()).data.fill_(torch.nan), optimizer.step)
        return optimizer

    trainer.create_optimizer = spoiling
    message = stopped(trainer)
    assert re.search(says, message)
    assert f"{tmp_path}/checkpoint-{at - 1};" in message
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{at - 1}"]
    goes_on_as(whole, tmp_path)


def test_an_exploding_ratio(tmp_path, whole):
    trainer = trainer_in(tmp_path, max_ratio=0.5)
    message = stopped(trainer)
    assert re.match(r"the mean ratio of the \w+ branch is (1|0\.9\d*|1\.0\d*) at step 1, over max_ratio 0.5: ", message)
    assert read_mark(tmp_path / "checkpoint-0").buffered == 2
    goes_on_as(whole, tmp_path, max_ratio=0.0)


@pytest.mark.parametrize(("during", "step"), [("rollouts", 2), ("evaluation", 4), ("backward", 3)])
def test_sigterm_leaves_a_checkpoint(tmp_path, whole, during, step):
    """In rollouts and evaluations at once, else at the end of the step."""
    trainer, handler = trainer_in(tmp_path), signal.getsignal(signal.SIGTERM)
    if during == "rollouts":
        trainer.engine.open = at_call(2, terminate, trainer.engine.open)
    elif during == "evaluation":
        trainer.engine.open = at_call(3, terminate, trainer.engine.open)
    else:
        trainer.objective.build = at_call(5, terminate, trainer.objective.build)  # the first micro-batch of step 3
    message = stopped(trainer, Terminated)
    assert message.startswith(f"stopped by SIGTERM after step {step}")
    assert last_whole(tmp_path).name == f"checkpoint-{step}"
    assert signal.getsignal(signal.SIGTERM) is handler
    goes_on_as(whole, tmp_path)


def test_what_the_command_says(tmp_path, monkeypatch, capsys):
    """One line that names what died and how to go on; 143 after SIGTERM; then the run ends as it should."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)
    options = ["train=8", "test=2", "hops=[1, 1]", "sources=2", "distractors=0"]
    tiny = '{"model_type": "qwen3", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}'
    flags = "--max_steps 2 --num_rollouts 2 --max_turns 1 --max_turn_tokens 4 --use_cpu --report_to none"
    command = ["train", "--run_name", "cut", "--model", "toybox", "--model_config", tiny, *flags.split()]
    command += [f"--env_options.{option}" for option in options]

    def with_second_batch(act):
        monkeypatch.setattr(train.PactTrainer, "generate", at_call(2, act, generate))

    generate = train.PactTrainer.generate
    with_second_batch(fail)
    assert cli.main(command) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "pact: error: playing episodes for step 2 failed: the server is gone. The state before that is "
        "in runs/cut/checkpoint-1; continue with: pact train --resume cut"
    )
    monkeypatch.setattr(train.PactTrainer, "generate", at_call(1, terminate, generate))
    assert cli.main(["train", "--resume"]) == 143
    assert "stopped by SIGTERM after step 1" in capsys.readouterr().err
    monkeypatch.setattr(train.PactTrainer, "generate", generate)
    assert cli.main(["train", "--resume"]) == 0
    assert (tmp_path / "runs/cut/model/model.safetensors").is_file()


# -- no room -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["quota", "tmpfs"])
def small_disk(request, tmp_path):
    """A folder, and a function that leaves too little room in it for one more checkpoint (True) or makes room again."""
    if request.param == "quota":
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        yield (
            tmp_path,
            lambda full: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if full else limits[0], limits[1])),
        )
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root; the quota case covers the same")
    filler = tmp_path / "filler"

    def fill(full):
        filler.unlink(missing_ok=True)
        if full:
            free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
            filler.write_bytes(bytes(free - 60_000))

    yield tmp_path, fill
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_costs_no_whole_checkpoint(small_disk, whole, monkeypatch):
    """Half of the second checkpoint is written when there is no more room: it goes, the first stays and is named."""
    folder, fill = small_disk
    trainer = trainer_in(folder, save_steps=2, save_total_limit=1)
    monkeypatch.setattr(trainer, "_no_space", lambda folder: None)  # the check before would not let it begin
    trainer.engine.open = at_call(2, lambda: fill(True), trainer.engine.open)
    message = stopped(trainer)
    fill(False)
    assert re.search(rf"^{folder}/checkpoint-4 could not be written \(\S+ GiB are free\): ", message)
    assert message.endswith(f". The last whole checkpoint is {folder}/checkpoint-2; continue with: the checkpoint")
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    goes_on_as(whole, folder)


def test_why_a_run_stops_is_said_although_its_checkpoint_cannot_be_written(tmp_path, monkeypatch):
    trainer = trainer_in(tmp_path)
    trainer.engine.open = at_call(2, fail, trainer.engine.open)
    monkeypatch.setattr(recovery, "save_groups", at_call(1, fail, recovery.save_groups))
    assert re.fullmatch(
        rf"playing episodes for step 3 failed: the server is gone\. {tmp_path}/checkpoint-2 could not be written "
        r"\(\S+ GiB are free\): the server is gone\. The last whole checkpoint is none; continue with: the checkpoint",
        stopped(trainer),
    )
    assert not list(tmp_path.glob("checkpoint-*"))


def test_room_is_checked_before_the_run_and_before_a_save(tmp_path, monkeypatch):
    usage = checkpoints.shutil.disk_usage
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    with pytest.raises(ValueError, match=r"no room for a checkpoint in .*GiB are needed and 9.31e-07 GiB are free"):
        trainer_in(tmp_path).train()
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", usage)
    trainer = trainer_in(tmp_path, save_steps=2)
    size = []

    def almost_full(path):
        size.append(read_mark(tmp_path / "checkpoint-2").size)
        return usage(path)._replace(free=size[0] - 1)

    trainer.engine.open = at_call(
        2, lambda: monkeypatch.setattr(checkpoints.shutil, "disk_usage", almost_full), trainer.engine.open
    )
    assert re.search(
        r"checkpoint-4 could not be written .*: \S+ GiB are needed and \S+ GiB are free, make", stopped(trainer)
    )
    assert size[0] == sum(path.stat().st_size for path in (tmp_path / "checkpoint-2").iterdir() if path.name != MARK)


def test_a_final_model_that_cannot_be_written_leaves_the_old_one(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()

    def save(folder):
        Path(folder).mkdir()
        raise OSError(28, "No space left on device")

    with pytest.raises(RuntimeError, match=r"model could not be written \(.*No space left.*GiB are free: make room"):
        checkpoints.save_whole(save, tmp_path / "model", True, lambda: None)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


# -- folders -----------------------------------------------------------------------------------------------------------

MARKED = Mark(world_size=2, prompts=8, accumulation=2, buffered=0, only_model=False, evaluate=False, size=1)


def make(folder, step, whole=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    if whole:
        write_whole(path / MARK, json.dumps(vars(MARKED)))
    return path


def test_only_whole_checkpoints_count_and_the_newest_stays(tmp_path):
    assert last_whole(tmp_path) is None
    make(tmp_path, 9)
    make(tmp_path, 10)
    make(tmp_path, 11, whole=False)
    (tmp_path / "checkpoint-best").mkdir()  # somebody's own
    assert last_whole(tmp_path).name == "checkpoint-10"
    (tmp_path / "checkpoint-11").rmdir()
    rotate(tmp_path / "checkpoint-10", None, None)
    rotate(tmp_path / "checkpoint-9", 2, None)
    assert len(list(tmp_path.iterdir())) == 3
    make(tmp_path, 12)
    rotate(tmp_path / "checkpoint-12", 1, str(tmp_path / "checkpoint-9"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-9", "checkpoint-best"]


def test_a_checkpoint_that_is_not_whole_is_refused_and_removed(tmp_path):
    half = make(tmp_path, 2, whole=False)
    with pytest.raises(ValueError, match=r"checkpoint-2 is not whole \(it has no whole.json\)"):
        trainer_in(tmp_path).train(resume_from_checkpoint=str(half))
    with pytest.raises(ValueError, match="there is no whole checkpoint in"):
        trainer_in(tmp_path).train(resume_from_checkpoint=True)
    trainer_in(tmp_path, max_steps=1).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ({}, {"world_size": 1, "accumulation": 4}, None),
        ({"buffered": 1}, {}, None),
        ({"buffered": 1}, {"world_size": 1, "accumulation": 4}, "holds rollouts for 1 steps of 8 prompts on 2 proc"),
        ({"buffered": 1}, {"prompts": 16}, "resume with just these, or from a checkpoint between two"),
        ({}, {"world_size": 1, "prompts": 4}, r"8 prompts a step \(2 processes\), this one has 4 .* processes is 8"),
        ({"only_model": True}, {}, "no optimiser state: begin a new run with --model"),
    ],
)
def test_what_a_checkpoint_can_be_resumed_with(then, now, message):
    mark, here = replace(MARKED, **then), replace(MARKED, **now)
    if message is None:
        check_resumable(mark, here, Path("checkpoint-3"))
    else:
        with pytest.raises(ValueError, match=message):
            check_resumable(mark, here, Path("checkpoint-3"))


def test_a_folder_is_replaced_whole(tmp_path):
    for name in ("model", "model.part", "model.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "model", tmp_path / "model.part")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "model.part"]
    assert (tmp_path / "model" / "model.part").exists()


def test_half_a_line_is_cut_before_the_next(tmp_path):
    (tmp_path / MET).write_text('{"phase": "train", "step": 1}\n{"phase": "tr')
    MetricsWriter(tmp_path, "train").write(2, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path / MET)] == [1, 2]


# -- kill -9 and several processes -------------------------------------------------------------------------------------


def test_killed_runs_end_like_the_one_that_was_not():
    """Three of the moments of `make kill`, in processes of their own."""
    moments = [
        "between model and optimiser",
        "between mark and rotation",
        "a line of metrics.jsonl half written, then its repair",
    ]
    command = [sys.executable, "-P", str(TESTS / "kill_matrix.py"), "--only", *moments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "3 killed runs, 0 differ" in done.stdout


def test_processes_stop_together(tmp_path):
    """The engine of the second of two dies: both say so at once and leave one whole checkpoint, which resumes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    said = [(tmp_path / f"said-{process}").read_text() for process in range(2)]
    assert said[0] == said[1]
    assert said[0].startswith("playing episodes for step 2 failed: process 1: the server is gone. The state before")
    mark = read_mark(tmp_path / "checkpoint-4")
    assert (mark.world_size, mark.prompts) == (2, 8)
    assert (tmp_path / "checkpoint-4" / "rollouts_1.pt").exists()
    alone = trainer_in(tmp_path, max_steps=5, gradient_accumulation_steps=4)
    alone.train(resume_from_checkpoint=True)
    assert alone.state.global_step == 5
    with pytest.raises(ValueError, match="8 prompts a step"):
        trainer_in(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def _one_of_two_processes(folder):
    trainer = trainer_in(folder, max_steps=4)
    if trainer.args.process_index == 1:
        trainer.engine.open = at_call(2, fail, trainer.engine.open)
    (folder / f"said-{trainer.args.process_index}").write_text(stopped(trainer))
    trainer = trainer_in(folder, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


if __name__ == "__main__":
    _one_of_two_processes(Path(sys.argv[1]))
