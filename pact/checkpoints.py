"""Checkpoints that are whole or do not count, and stopping with one: no room, no finite number, SIGTERM, a dead engine.

What a step computes is the trainer's (`pact.trainer`), whose run it is `pact.train`'s.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from pact.arguments import PactTrainingArguments
from pact.files import flush_folder, folder_bytes, replace_file, replace_folder, write_whole
from pact.groups import Group
from pact.metrics import add_metrics
from pact.reporting import Meter
from pact.samples import load_groups, save_groups
from pact_kernels.terms import PROMPT_BRANCH, RL, SFT, TRACE_BRANCH

logger = logging.get_logger(__name__)

MARK = "whole.json"  # the last file of a checkpoint: without it the checkpoint does not count
STATE = "trainer_state.json"
T = TypeVar("T")


class RunStopped(RuntimeError):
    """Training stopped by itself; the message names the checkpoint to go on from."""

    exit_code = 2


class Terminated(RunStopped):
    """SIGTERM was answered with a checkpoint."""

    exit_code = 128 + signal.SIGTERM


class _Preempted(BaseException):
    """SIGTERM while rollouts are under way; not an Exception, so that no environment takes it for its own failure."""


# -- folders ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """What a whole checkpoint says of itself.

    Args:
        world_size, prompts, accumulation: processes, prompts an optimiser step over all of them, micro-batches a step.
        buffered: optimiser steps whose rollouts it holds.
        only_model: saved without optimiser (``save_only_model``).
        size: bytes of its files.
    """

    world_size: int
    prompts: int
    accumulation: int
    buffered: int
    only_model: bool
    size: int


def read_mark(checkpoint: Path) -> Mark | None:
    """The mark of ``checkpoint``; None when it is not whole."""
    path = checkpoint / MARK
    return Mark(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, whole or not, oldest step first."""
    named = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step(path).isdecimal()]
    return sorted(named, key=lambda path: int(_step(path)))


def _step(checkpoint: Path) -> str:
    return checkpoint.name.rpartition("-")[2]


def last_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``."""
    return next((path for path in reversed(checkpoints(folder)) if read_mark(path)), None)


def last_checkpoint(folder: Path, max_steps: int) -> tuple[Path | None, bool]:
    """The newest whole checkpoint in ``folder`` and whether it is the end of its training.

    ``max_steps`` <= 0: as the checkpoint says.
    """
    path = last_whole(folder)
    if path is None:
        return None, False
    record = json.loads((path / STATE).read_text(encoding="utf-8"))
    return path, record["global_step"] >= (max_steps if max_steps > 0 else record["max_steps"])


def remove(checkpoint: Path) -> None:
    """Delete ``checkpoint``, its mark first: half of one that is being deleted is not whole."""
    (checkpoint / MARK).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Keep the newest ``limit`` (None or 0: all) checkpoints and ``best``, the newest in any case."""
    if not limit or limit < 0:
        return
    there = checkpoints(folder)
    kept = {there[-1], *([Path(best)] if best else [])}
    excess = len(there) - max(limit, len(kept))
    for path in [path for path in there if path not in kept][: max(excess, 0)]:
        remove(path)


def check_space(folder: Path, needed: int) -> None:
    """Raises OSError when fewer than ``needed`` bytes are free in ``folder``."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{_gigabytes(needed)} are needed and {_gigabytes(free)} are free")


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


def save_whole(save: Callable[[str], None], folder: Path, main: bool, wait: Callable[[], None]) -> None:
    """``save`` a model so that ``folder`` holds all of it or what it held before. Every process must call it.

    Raises RuntimeError, naming the folder and the room there is, when it cannot be written.
    """
    part = folder.with_name(folder.name + ".part")
    if main:
        shutil.rmtree(part, ignore_errors=True)
    wait()
    try:
        save(str(part))
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        raise RuntimeError(
            f"{folder} could not be written ({error}), {_gigabytes(shutil.disk_usage(folder.parent).free)} are free: "
            "make room and resume"
        ) from error
    wait()
    if main:
        replace_folder(folder, part)


# -- processes -------------------------------------------------------------------------------------------------------


def agree(error: BaseException | None) -> list[str]:
    """What failed, on all processes alike, in the order of processes; [] when nothing did. All of them must call it."""
    said = gather_object([error if error is None else str(error) or type(error).__name__])
    several = len(said) > 1
    return [f"process {i}: {text}" if several else text for i, text in enumerate(said) if text is not None]


# -- training --------------------------------------------------------------------------------------------------------


class CheckpointedTrainer(Trainer):
    """`transformers.Trainer` whose checkpoints hold all there is to continue from, and which stops with one.

    A subclass keeps the optimiser steps that wait in ``buffer`` and the one under way in ``current``; adds the
    objective's metrics to ``step_sums``; and calls ``act`` around what plays episodes. A checkpoint is whole once all
    processes have written their part: then it is marked, and only then are older ones deleted.
    """

    args: PactTrainingArguments
    model: nn.Module
    how_to_resume = "resume_from_checkpoint"  # said at the end of messages

    def _start_watching(self) -> None:
        """Called once, at the end of the subclass's ``__init__``."""
        self.buffer: deque[list[list[Group]]] = deque()  # optimiser steps whose rollouts exist already
        self.current: list[list[Group]] | None = None  # the optimiser step that is being computed
        self._taken = 0  # micro-batches that a restored buffer has taken from the data
        self._steps = 0  # optimiser steps since the last log
        self.step_sums: dict[str, Tensor] = {}  # the objective's metrics of the current step
        self.sums: dict[str, Tensor] = {}  # and since the last log
        self.meter, self.totals = Meter(), Meter()  # ours since the last log, and over all logs
        self._grad_norm = 0.0
        self._signalled = self._acting = self._stopping = False
        self.add_callback(_Watch(self))

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """`Trainer.train`. True resumes from the newest whole checkpoint in ``output_dir``.

        Raises ValueError for a checkpoint that is not whole or does not fit the settings, RunStopped (Terminated) when
        training had to stop.
        """
        folder = self._folder()
        set_seed(self.args.seed)  # whatever ran before in this process: a warm start, an evaluation
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_whole(folder) or "") or None
            if resume_from_checkpoint is None:
                raise ValueError(f"there is no whole checkpoint in {folder}: train without resume_from_checkpoint")
        if resume_from_checkpoint:
            self._restore(Path(str(resume_from_checkpoint)))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for path in checkpoints(folder):
                if read_mark(path) is None:
                    remove(path)
        if self.args.save_strategy != "no":
            failed = agree(self._no_space(folder))
            if failed:
                raise ValueError(f"no room for a checkpoint in {folder}: {failed[0]}; make room, or save elsewhere")
        try:
            with self._sigterm():
                output = super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)
        finally:
            for callback in self.callback_handler.callbacks:  # what is said next begins a line of its own
                if bar := getattr(callback, "training_bar", None):
                    bar.close()
        if self._stopping or self._signalled:
            raise Terminated(f"stopped by SIGTERM after step {self.state.global_step}; {self.how_to_resume}")
        return output

    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    # -- saving --

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """A whole checkpoint of this step, or RunStopped and no trace of one; older ones go last."""
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        for work in (partial(self._write_checkpoint, folder, model, trial), partial(self._seal, folder)):
            error: Exception | None = None
            try:
                work()
            except Exception as raised:
                error = raised
            alone = error is not None and self._saves_together()  # the others wait in the save: the launcher ends them
            failed = [str(error)] if alone else agree(error)
            if failed:
                if self.args.should_save and read_mark(folder) is None:
                    remove(folder)
                raise self._not_saved(folder, failed[0]) from error

    def _write_checkpoint(self, folder: Path, model: nn.Module, trial: Any) -> None:
        if not any(gather_object([read_mark(folder) is not None])):  # else only the rollouts can be new
            if self.args.should_save:
                remove(folder)
                folder.parent.mkdir(parents=True, exist_ok=True)
            diverged = None if self._finite_weights() else ValueError("the weights are not finite")
            if refused := agree(diverged or self._no_space(folder.parent)):
                raise OSError(refused[0])
            # transformers would delete older checkpoints here, before this one is whole
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
        folder.mkdir(exist_ok=True)  # where only the main process writes the model
        process = self.args.process_index
        replace_file(folder / buffer_name(process), lambda path: save_groups(path, self.buffer))
        tally = {"steps": self._steps, "sums": self.sums, "meter": self.meter.sums, "totals": self.totals.sums}
        replace_file(folder / tally_name(process), lambda path: torch.save(tally, path))

    def _seal(self, folder: Path) -> None:
        if self.args.should_save:
            flush_folder(folder)
            write_whole(folder / MARK, json.dumps(asdict(self._mark(folder))))
            rotate(folder.parent, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _mark(self, folder: Path) -> Mark:
        args = self.args
        prompts = args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
        return Mark(
            world_size=args.world_size,
            prompts=prompts,
            accumulation=args.gradient_accumulation_steps,
            buffered=len(self.buffer),
            only_model=args.save_only_model,
            size=folder_bytes(folder),
        )

    def _no_space(self, folder: Path) -> OSError | None:
        """The error of a disk too full for one more checkpoint, by the size of the last one or of the weights."""
        last = last_whole(folder)
        mark = read_mark(last) if last else None
        size = mark.size if mark else sum(p.numel() * p.element_size() for p in self.model.parameters())
        try:
            check_space(folder, size)
        except OSError as error:
            return error
        return None

    def _not_saved(self, folder: Path, why: str) -> RunStopped:
        last = last_whole(folder.parent)
        free = _gigabytes(shutil.disk_usage(folder.parent).free)
        return RunStopped(
            f"{folder} could not be written: {why} ({free} free). The last whole checkpoint is {last or 'none'}; "
            f"{self.how_to_resume} when there is room"
        )

    def _saves_together(self) -> bool:
        """Whether processes wait for each other in the middle of a save."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled or self.state.best_global_step)

    def _finite_weights(self) -> bool:
        parts = (p.to_local() if hasattr(p, "to_local") else p for p in self.model.parameters())
        return all(bool(torch.isfinite(part).all()) for part in parts)

    # -- resuming --

    def _restore(self, checkpoint: Path) -> None:
        """Take up the rollouts and the metrics of ``checkpoint``; `Trainer.train` takes up the rest."""
        mark, now = read_mark(checkpoint), self._mark(checkpoint)
        if mark is None:
            raise ValueError(f"{checkpoint} is not whole (it has no {MARK}): resume from another checkpoint")
        check_resumable(mark, now, checkpoint)
        self.buffer.clear()
        if mark.world_size == now.world_size:
            self.buffer.extend(load_groups(checkpoint / buffer_name(self.args.process_index)))
        if len(set(gather_object([len(self.buffer)]))) > 1:  # killed while a stop rewrote them: they are played again
            self.buffer.clear()
        self._taken = sum(map(len, self.buffer))
        self.sums, self.meter, self.totals, self._steps = {}, Meter(), Meter(), 0
        for process in range(self.args.process_index, mark.world_size, now.world_size):
            tally = torch.load(checkpoint / tally_name(process), weights_only=True, map_location="cpu")
            add_metrics(self.sums, {name: value.to(self.args.device) for name, value in tally["sums"].items()})
            for meter, name in ((self.meter, "meter"), (self.totals, "totals")):
                meter.merge(Meter.of(tally[name]))
            self._steps = tally["steps"]

    # -- stopping --

    def act(self, play: Callable[[], T]) -> T:
        """What ``play`` returns. When it raises on any process, or SIGTERM comes, all stop with a checkpoint."""
        error: BaseException | None = None
        try:
            self._acting = True
            if self._signalled:
                raise _Preempted
            result = play()
            self._acting = False
        except (Exception, _Preempted) as raised:
            self._acting = False
            error = raised
        failed = agree(None if isinstance(error, _Preempted) else error)
        if failed:
            self._stop(f"playing episodes for step {self.state.global_step + 1} failed: {failed[0]}", error)
        if agree(error):
            kept = self._keep()
            raise Terminated(f"stopped by SIGTERM after step {self.state.global_step}: {kept}; {self.how_to_resume}")
        return result

    def _stop(self, why: str, cause: BaseException | None = None) -> NoReturn:
        raise RunStopped(f"{why}. Nothing was updated: {self._keep()}; {self.how_to_resume}") from cause

    def _keep(self) -> str:
        """Save the state after the last optimiser step, with the rollouts that wait; returns where, in words."""
        if self.current is not None:
            self.buffer.appendleft(self.current)
            self.current, self._steps = None, self._steps - 1
        folder = self._folder()
        last = last_whole(folder)
        instead = f"the last whole checkpoint is {last}" if last else "there is no checkpoint yet"
        if self.state.global_step == 0 and not self.buffer:
            return "nothing was trained yet"
        if agree(None if self._finite_weights() else ValueError("not finite")):
            return f"the weights are not finite, so they were not saved; {instead}"
        if self.is_deepspeed_enabled and self.step_sums:  # its backward has updated already
            return instead
        self._save_checkpoint(self.model_wrapped)
        return f"the state before it is in {folder / f'{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}'}"

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._grad_norm = 0.0 if norm is None else float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        return norm

    def check_step(self) -> None:
        """Raises RunStopped, on all processes, before an update that would spoil the weights; else books the step."""
        sums, args = self.step_sums, self.args
        mine = torch.zeros(8, dtype=torch.float64, device=args.device)
        if sums:
            mine[0], mine[1] = (float(not torch.isfinite(sums["loss"][kind].sum())) for kind in (RL, SFT))
            for place, branch in ((2, PROMPT_BRANCH), (4, TRACE_BRANCH)):
                mine[place], mine[place + 1] = sums["ratio"][RL, branch].sum(), sums["tokens"][RL, branch].sum()
        mine[6] = self.accelerator.scaler is None and not math.isfinite(self._grad_norm)  # a scaler skips such steps
        mine[7] = self._signalled
        every = self.accelerator.reduce(mine, reduction="sum").tolist()
        step = self.state.global_step + 1
        mend = "lower learning_rate or max_grad_norm"
        terms = [term for bad, term in zip(every, ("RL", "SFT")) if bad]
        if terms:
            self._stop(f"the {' and the '.join(terms)} loss of step {step} is not finite: {mend}")
        if every[6]:
            self._stop(f"the gradient norm of step {step} is {self._grad_norm}: {mend}")
        for place, name in ((2, "prompt"), (4, "trace")):
            ratio = every[place] / every[place + 1] if every[place + 1] else 1.0
            if args.max_ratio and not ratio <= args.max_ratio:
                self._stop(
                    f"the mean ratio of the {name} branch is {ratio:.4g} at step {step}, over max_ratio "
                    f"{args.max_ratio:g}: lower learning_rate or rollout_batch_steps, or raise max_ratio"
                )
        self._stopping = bool(every[7])
        add_metrics(self.sums, sums)
        self.step_sums, self.current = {}, None

    @contextmanager
    def _sigterm(self) -> Iterator[None]:
        """SIGTERM ends rollouts at once and training at the next step boundary, with a checkpoint."""

        def note(*_: Any) -> None:
            self._signalled = True
            if self._acting:
                raise _Preempted

        self._signalled = self._acting = self._stopping = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


class _Watch(TrainerCallback):
    """Checks every optimiser step before it is made, and ends training when SIGTERM came."""

    def __init__(self, trainer: CheckpointedTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.check_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._stopping:
            control.should_save = control.should_training_stop = True


def check_resumable(mark: Mark, now: Mark, checkpoint: Path) -> None:
    """Raises ValueError where a run laid out as ``now`` cannot continue what ``mark`` says."""
    if mark.only_model:
        raise ValueError(
            f"{checkpoint} was saved with save_only_model and has no optimiser state: begin a new run with "
            f"--model {checkpoint}"
        )
    layout = (mark.world_size, mark.accumulation, mark.prompts)
    if mark.buffered and layout != (now.world_size, now.accumulation, now.prompts):
        raise ValueError(
            f"{checkpoint} holds rollouts for {mark.buffered} steps of {mark.prompts} prompts on {mark.world_size} "
            f"processes with gradient_accumulation_steps {mark.accumulation}: resume with just these, or from a "
            "checkpoint between two batches of rollouts"
        )
    if mark.world_size != now.world_size and mark.prompts != now.prompts:
        raise ValueError(
            f"{checkpoint} is of a run with {mark.prompts} prompts a step ({mark.world_size} processes), this one has "
            f"{now.prompts} ({now.world_size} processes), so the order of the data would change: set "
            "per_device_train_batch_size and gradient_accumulation_steps so that the product with the processes is "
            f"{mark.prompts}"
        )


def buffer_name(process: int) -> str:
    """File of a checkpoint that holds the rollouts of one process."""
    return f"rollouts_{process}.pt"


def tally_name(process: int) -> str:
    """File of a checkpoint that holds what one process measured since the last log."""
    return f"metrics_{process}.pt"
