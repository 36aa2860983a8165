"""A trainer that stops with a checkpoint, whatever ends the run, and goes on from one as if nothing had.

What a step computes is `pact.trainer`'s, the folders are `pact.checkpoints`'.
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
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from pact.arguments import PactTrainingArguments
from pact.checkpoints import (
    MARK,
    Mark,
    check_resumable,
    checkpoints,
    gigabytes,
    last_whole,
    read_mark,
    remove,
    rotate,
    shortage,
)
from pact.files import flush_folder, folder_bytes, replace_file, write_whole
from pact.groups import Group
from pact.metrics import add_metrics
from pact.reporting import Meter
from pact.samples import load_groups, save_groups
from pact_kernels.terms import PROMPT_BRANCH, RL, SFT, TRACE_BRANCH

T = TypeVar("T")


class RunStopped(RuntimeError):
    """Training stopped by itself; the message names the checkpoint to go on from."""

    exit_code = 2


class Terminated(RunStopped):
    """SIGTERM was answered with a checkpoint."""

    exit_code = 128 + signal.SIGTERM


class _NotSaved(Exception):
    """A checkpoint could not be written; nothing of it is left."""


class _Preempted(BaseException):
    """SIGTERM while rollouts are under way; not an Exception, so that no environment takes it for its own failure."""


def agree(error: BaseException | None) -> list[str]:
    """What failed, on all processes alike, in the order of processes; [] when nothing did. All of them must call it."""
    said = gather_object([error if error is None else str(error) or type(error).__name__])
    several = len(said) > 1
    return [f"process {i}: {text}" if several else text for i, text in enumerate(said) if text is not None]


class CheckpointedTrainer(Trainer):
    """`transformers.Trainer` whose checkpoints hold all there is to continue from, and which stops with one.

    A subclass keeps the optimiser steps that wait in ``buffer`` and the one under way in ``current``; adds the
    objective's metrics to ``step_sums``; and calls ``act`` around what plays episodes. A checkpoint is whole once all
    processes have written their part: then it is marked, and only then are older ones deleted.
    """

    args: PactTrainingArguments
    model: nn.Module
    how_to_resume = "continue with: train(resume_from_checkpoint=True)"  # said at the end of messages

    def _start_watching(self) -> None:
        """Called once, when the subclass is being made."""
        self._reset()
        self.add_callback(_Watch(self))

    def _reset(self) -> None:
        """Training as it begins."""
        self.buffer: deque[list[list[Group]]] = deque()  # optimiser steps whose rollouts exist already
        self.current: list[list[Group]] | None = None  # the optimiser step that is being computed
        self._taken = 0  # micro-batches that a restored buffer has taken from the data
        self._steps = 0  # optimiser steps since the last log
        self.step_sums: dict[str, Tensor] = {}  # the objective's metrics of the current step
        self.sums: dict[str, Tensor] = {}  # and since the last log
        self.meter, self.totals = Meter(), Meter()  # ours since the last log, and over all logs
        self._grad_norm = 0.0
        self._meter_before: dict[str, tuple[float, float]] = {}  # the meter's sums before the current step
        self._signalled = self._acting = self._stopping = self._evaluating = False

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """`Trainer.train`. True resumes from the newest whole checkpoint in ``output_dir``.

        Raises ValueError for a checkpoint that is not whole or does not fit the settings, RunStopped (Terminated) when
        training had to stop.
        """
        folder = self._folder()
        set_seed(self.args.seed)  # whatever ran before in this process: a warm start, an evaluation
        self._reset()
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
                raise ValueError(f"no room for a checkpoint in {folder}: {failed[0]}")
        try:
            with self._sigterm():
                output = super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)
        except RunStopped:
            raise
        except Exception as error:  # of several processes the others wait in a collective: the launcher ends them
            if self.current is None or self.args.world_size > 1:
                raise
            self._stop(f"step {self.state.global_step + 1} failed: {error}", error)
        finally:
            self.is_in_train = False
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
        """A whole checkpoint of this step, or RunStopped and no trace of one."""
        try:
            self._save_whole(model, trial)
        except _NotSaved as error:
            raise RunStopped(f"{error}; {self.how_to_resume}") from error.__cause__

    def _save_whole(self, model: nn.Module, trial: Any = None) -> Path:
        """Write a checkpoint of this step, mark it and let older ones go; returns its folder."""
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
                last, free = last_whole(folder.parent), shutil.disk_usage(folder.parent).free
                raise _NotSaved(
                    f"{folder} could not be written ({gigabytes(free)} are free): {failed[0].rstrip('.')}. "
                    f"The last whole checkpoint is {last or 'none'}"
                ) from error
        return folder

    def _write_checkpoint(self, folder: Path, model: nn.Module, trial: Any) -> None:
        if not any(gather_object([read_mark(folder) is not None])):  # else only the rollouts can be new
            if self.args.should_save:
                remove(folder)
                folder.parent.mkdir(parents=True, exist_ok=True)
            diverged = None if self._finite_weights() else ValueError("the weights are not finite, lower learning_rate")
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
            rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _mark(self, folder: Path) -> Mark:
        args = self.args
        prompts = args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
        return Mark(
            world_size=args.world_size,
            prompts=prompts,
            accumulation=args.gradient_accumulation_steps,
            buffered=len(self.buffer),
            only_model=args.save_only_model,
            evaluate=self._evaluating,
            size=folder_bytes(folder),
        )

    def _no_space(self, folder: Path) -> OSError | None:
        """The error of a disk too full for one more checkpoint, by the size of the last one or of the weights."""
        last = last_whole(folder)
        mark = read_mark(last) if last else None
        size = mark.size if mark else sum(p.numel() * p.element_size() for p in self.model.parameters())
        short = shortage(folder, size)
        return OSError(f"{short}, make room") if short else None

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
        self.args.eval_on_start = mark.evaluate  # otherwise it was made before the checkpoint
        if mark.world_size == now.world_size:
            self.buffer.extend(load_groups(checkpoint / buffer_name(self.args.process_index)))
        if len(set(gather_object([len(self.buffer)]))) > 1:  # killed while a stop rewrote them: they are played again
            self.buffer.clear()
        self._taken = sum(map(len, self.buffer))
        for process in range(self.args.process_index, mark.world_size, now.world_size):
            tally = torch.load(checkpoint / tally_name(process), weights_only=True, map_location="cpu")
            add_metrics(self.sums, {name: value.to(self.args.device) for name, value in tally["sums"].items()})
            for meter, name in ((self.meter, "meter"), (self.totals, "totals")):
                meter.merge(Meter.of(tally[name]))
            self._steps = tally["steps"]

    # -- stopping --

    def take_step(self) -> list[list[Group]]:
        """The first optimiser step of the buffer; a stop before its update puts it back."""
        self.current, self._meter_before = self.buffer.popleft(), dict(self.meter.sums)
        self._steps += 1
        return self.current

    def act(self, play: Callable[[], T], evaluation: bool = False) -> T:
        """What ``play`` returns. When it raises on any process, or SIGTERM comes, all stop with a checkpoint.

        An ``evaluation`` that is cut off is run again on resuming. Outside training, ``play`` is all that happens.
        """
        if not self.is_in_train:
            return play()
        self._evaluating = evaluation
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
        step = self.state.global_step
        if failed:
            what = f"the evaluation after step {step}" if evaluation else f"playing episodes for step {step + 1}"
            self._stop(f"{what} failed: {failed[0]}", error)
        if agree(error):
            raise Terminated(f"stopped by SIGTERM after step {step}. {self._keep()}; {self.how_to_resume}")
        self._evaluating = False
        return result

    def _stop(self, why: str, cause: BaseException | None = None) -> NoReturn:
        raise RunStopped(f"{why.rstrip('.')}. {self._keep()}; {self.how_to_resume}") from cause

    def _keep(self) -> str:
        """Save the state after the last optimiser step, with the rollouts that wait; returns where, in words."""
        if self.current is not None:
            self.buffer.appendleft(self.current)
            self.meter = Meter.of(self._meter_before)
            self.current, self._steps = None, self._steps - 1
        last = last_whole(self._folder())
        instead = f"The last whole checkpoint is {last}" if last else "There is no checkpoint yet"
        if self.state.global_step == 0 and not self.buffer:
            return "Nothing was trained yet"
        if agree(None if self._finite_weights() else ValueError("not finite")):
            return f"The weights are not finite and were not saved. {instead}"
        if self.is_deepspeed_enabled and self.step_sums:  # its backward has updated already
            return instead
        try:
            return f"The state before that is in {self._save_whole(self.model_wrapped)}"
        except _NotSaved as error:
            return str(error)

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


def buffer_name(process: int) -> str:
    """File of a checkpoint that holds the rollouts of one process."""
    return f"rollouts_{process}.pt"


def tally_name(process: int) -> str:
    """File of a checkpoint that holds what one process measured since the last log."""
    return f"metrics_{process}.pt"
