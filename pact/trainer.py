"""The thin loop: generate -> reward -> build -> loss. Everything else is transformers.Trainer and accelerate.

Not here: settings (`pact.arguments`), the loss (`pact.objective`), sampling (`pact.rollout`), runs and their folders
(`pact.train`).
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import TorchDynamoPlugin, gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from pact.arguments import PactTrainingArguments
from pact.correction import correct
from pact.distributed import (
    Snapshot,
    assign,
    backward_options,
    balance,
    check_strategy,
    is_sharded,
    most,
    policy_weights,
    reduction,
    set_precision,
    whole_weights,
)
from pact.engines.transformers import TransformersEngine
from pact.engines.vllm import VllmEngine, make_engine
from pact.envs import Environment, Task
from pact.evaluate import EpisodeRecord, evaluate, summarize
from pact.groups import PROMPT, term_weights
from pact.metrics import add_metrics
from pact.modeling import attach_tree_attention, causal_lm, check_vocabulary, compile_layers, evaluating
from pact.objective import Denominators, Group, PactConfig, PactObjective, flatten_metrics
from pact.recovery import CheckpointedTrainer
from pact.reporting import Meter, RewardPrinter, RewardProgress, meter_episodes
from pact.rollout import CallRules, Generator, RolloutLimits, Sampling, Trajectory, run_rollouts
from pact.samples import (
    Estimator,
    rl_group,
    sft_group,
    with_context,
    with_reward,
)
from pact.trace import prepare_tokenizer
from pact.workload import usable_tasks

logger = logging.get_logger(__name__)

MicroBatch = list[Group]


class PactTrainer(CheckpointedTrainer):
    """`transformers.Trainer` that trains on groups of rollouts and traces instead of batches of rows.

    One optimiser step takes ``per_device_train_batch_size`` x ``gradient_accumulation_steps`` prompts a process. Their
    rollouts are generated before the step (``rollout_batch_steps`` steps at a time), from the prompt alone, and scored
    by ``args.reward``. With ``num_rollouts`` 0 nothing is generated: the traces are all that is trained on. All random
    draws are functions of (seed, step, process), so a resumed run repeats what an uninterrupted one does.

    Args:
        model: a causal LM of transformers; its attention is switched to the tree attention.
        args: settings of the run.
        env: where episodes are played.
        processing_class: the tokenizer; `pact.trace.prepare_tokenizer` is applied to it.
        config: settings of the objective; ``context_length=None`` takes the model's.
        train_dataset, eval_dataset: tasks; default: the environment's "train" split, and the first ``eval_tasks`` of
            "test".

    Raises:
        ValueError: a model the tree cannot run on, a tokenizer whose template loses tools or reasoning, more token ids
            than embeddings, a prompt longer than the context, no task, a task without what the reward compares with,
            fewer tasks than processes, a distributed strategy that is not in force or not supported.
    """

    phase = "train"
    args: PactTrainingArguments
    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase
    config: PactConfig
    objective: PactObjective

    def __init__(
        self,
        model: PreTrainedModel,
        args: PactTrainingArguments,
        env: Environment,
        processing_class: PreTrainedTokenizerBase,
        config: PactConfig | None = None,
        train_dataset: Sequence[Task] | None = None,
        eval_dataset: Sequence[Task] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        tokenizer = prepare_tokenizer(processing_class)
        check_vocabulary(model, tokenizer)
        attach_tree_attention(model)
        self.env = env
        self.scoring = args.reward_options()
        self.config = self._configure(with_context(config or PactConfig(), model))
        self.objective = PactObjective(self.config)
        self.limits = RolloutLimits(
            args.max_turns, args.max_turn_tokens, args.max_response_tokens, self.config.context_length
        )
        self.rules = CallRules(args.call_format, args.malformed_calls)
        tasks = list(env.tasks("train") if train_dataset is None else train_dataset)
        if eval_dataset is None and args.eval_tasks:
            eval_dataset = env.tasks("test")[: args.eval_tasks]
        if not eval_dataset and args.eval_strategy != "no":
            raise ValueError(f"eval_strategy {args.eval_strategy} has no tasks to evaluate: set eval_tasks")
        super().__init__(
            model=model,
            args=args,
            data_collator=list,  # type: ignore[arg-type]  # a batch is a list of tasks
            train_dataset=usable_tasks(tasks, tokenizer, self.config, args, self._plays(args)),
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(RewardPrinter if args.disable_tqdm else RewardProgress)
        self._start_watching()
        if args.torch_compile:
            compile_layers(model, cast(str, args.torch_compile_backend), args.torch_compile_mode)
        check_strategy(self.accelerator)
        set_precision(self.accelerator)
        if is_sharded(self.accelerator):
            self.objective.forwards = partial(most, self.accelerator)
        if len(self._tasks()) < args.world_size:
            raise ValueError(
                f"{args.world_size} processes and {len(self._tasks())} training tasks: start at most as many processes "
                "as there are tasks, or give more tasks"
            )
        self.engine = self._make_engine()
        self._sent = -1  # optimiser step whose weights an engine of its own has
        self.reference: Snapshot | None = None  # the trainable weights as they were when training began
        self._tokens = 0  # unique tokens of the last micro-batch
        self.records: list[EpisodeRecord] = []  # of the last evaluation, at optimiser step records_step
        self.records_step = -1

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Without accelerate's own torch.compile: it would wrap the model, whose layers are compiled in place."""
        return {**super()._build_accelerator_args(**kwargs), "dynamo_plugin": TorchDynamoPlugin(backend="no")}

    def _configure(self, config: PactConfig) -> PactConfig:
        return config

    def _plays(self, args: PactTrainingArguments) -> bool:
        """Whether training generates rollouts."""
        return args.num_rollouts > 0

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """`Trainer.train`, with the model as it is now as the KL reference: resume on the weights the run began with.

        The rollouts that the checkpoint kept are trained on first.
        """
        self.reference = None
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self._sent = -1  # the best weights of the run may have taken the place of the last

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._keep_reference()
        super()._load_from_checkpoint(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.create_scheduler`; by then the model is sharded, and DeepSpeed has not loaded a checkpoint yet."""
        self._keep_reference()
        return super().create_scheduler(*args, **kwargs)

    def _keep_reference(self) -> None:
        if self.reference is None and self.config.kl_coef > 0 and self._plays(self.args):
            self.reference = Snapshot(self.model)

    def _tasks(self) -> list[Task]:
        return cast(list[Task], self.train_dataset)

    # -- acting ------------------------------------------------------------------------------------------------------

    def stream(self, purpose: str) -> random.Random:
        """The random stream of one purpose at this step and phase, the same on all processes: each takes from it what
        belongs to the places of its tasks in the whole step. Resuming needs no stored state."""
        return random.Random(f"{self.args.seed}/{self.phase}/{purpose}/{self.state.global_step}/0")

    def places(self, count: int) -> list[int]:
        """Places, in the batch of all processes, of this one's next ``count`` tasks: micro-batches alternate."""
        args = self.args
        size, rank, world = args.per_device_train_batch_size, args.process_index, args.world_size
        return [(i // size * world + rank) * size + i % size for i in range(count)]

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Task]], num_batches: int, device: torch.device
    ) -> tuple[list[MicroBatch], Any]:
        """The micro-batches of the next optimiser step, as groups, and the step's denominators over all processes."""
        for _ in islice(epoch_iterator, self._taken):
            pass
        self._taken = 0
        if not self.buffer:
            steps = min(self.args.rollout_batch_steps, self.state.max_steps - self.state.global_step)
            batches = list(islice(epoch_iterator, num_batches * steps))
            if not batches:
                return [], None
            groups = iter(self.make_groups([task for batch in batches for task in batch]))
            micro = [list(islice(groups, len(batch))) for batch in batches]
            dealt = [self.deal(micro[i : i + num_batches]) for i in range(0, len(micro), num_batches)]
            self.attach_logprobs([group for step in dealt for batch in step for group in batch])
            self.buffer.extend(dealt)
        step = self.take_step()
        mine = self.objective.denominators([group for batch in step for group in batch])
        every = self.accelerator.reduce(
            torch.tensor([mine.rl, mine.sft], dtype=torch.float64, device=self.args.device), reduction="sum"
        )
        return step, Denominators(*every.tolist())

    def deal(self, step: list[MicroBatch]) -> list[MicroBatch]:
        """One optimiser step's micro-batches, balanced by tokens over processes and then over micro-batches."""
        if self.args.world_size == 1:
            return step
        groups = [group for batch in step for group in batch]
        groups = balance(self.accelerator, groups, list(map(self.objective.tokens_of, groups)))
        shares = assign(list(map(self.objective.tokens_of, groups)), len(step))
        return [[groups[i] for i in share] for share in shares]

    def make_groups(self, tasks: list[Task]) -> list[Group]:
        """Play ``num_rollouts`` episodes of every task and turn them, with the traces, into groups to train on."""
        if not self._plays(self.args):
            return [self._example(task, reads=False) for task in tasks]
        start = time.perf_counter()
        episodes = self.act(lambda: self.generate(tasks))
        seconds = time.perf_counter() - start
        episodes, groups = self.act(lambda: self.score(tasks, episodes))
        meter_episodes(self.meter, episodes)
        sampled = sum(sum(episode.sampled) for attempts in episodes for episode in attempts)
        self.meter.add("tokens_per_second/generate", sampled, seconds)
        self.meter.add("seconds/generate", seconds, self.args.rollout_batch_steps)
        self._warn_of_no_signal(groups)
        for task, group in zip(tasks, groups, strict=True):
            self.meter.add("trace_overflow", float(task.expert is not None and group.trace is None))
        generator = torch.Generator().manual_seed(self.stream("branch").getrandbits(63))
        self.objective.assign_branches(groups, generator, self.places(len(tasks)))
        return groups

    def score(self, tasks: list[Task], episodes: list[list[Trajectory]]) -> tuple[list[list[Trajectory]], list[Group]]:
        """The episodes with the rewards that are trained on, and their groups."""
        args, tokenizer = self.args, self.processing_class
        estimator = Estimator(args.advantage, args.turn_discount, args.dual_combine)
        episodes = [
            with_reward(task, attempts, self.scoring, tokenizer, self.rules.form)
            for task, attempts in zip(tasks, episodes, strict=True)
        ]
        pairs = zip(tasks, episodes, strict=True)
        groups = [rl_group(task, attempts, tokenizer, estimator, self.config) for task, attempts in pairs]
        if not isinstance(self.engine, TransformersEngine):
            for group, attempts in zip(groups, episodes, strict=True):
                for rollout, episode in zip(group.rollouts, attempts, strict=True):
                    rollout.engine_logp = episode.logp
        return episodes, groups

    def _example(self, task: Task, reads: bool) -> Group:
        """The trace as a target and no rollouts; also shown in the prompt when the policy ``reads`` it and it fits."""
        group = sft_group(task, self.processing_class, self.config, trace_in_context=True) if reads else None
        self.meter.add("trace_in_context", float(group is not None))
        group = group or sft_group(task, self.processing_class, self.config, trace_in_context=False)
        assert group is not None, "_usable kept only traces that fit"
        return group

    def _make_engine(self) -> Generator | VllmEngine:
        args = self.args
        if args.engine == "transformers" or not self._plays(args):
            return TransformersEngine(self.model, max_batch=args.generation_batch_size)
        return make_engine(
            args.vllm_options(),
            causal_lm(self.model).config,
            self.processing_class,
            Path(str(args.output_dir)),
            max_batch=args.generation_batch_size,
            sampling=Sampling(self.config.temperature, args.top_p),
        )

    @contextlib.contextmanager
    def _sampling(self) -> Iterator[None]:
        """The engine ready to sample from the policy: the model with its weights whole, or weights of the engine's own
        brought up to this step. Every process enters it at once."""
        if isinstance(self.engine, TransformersEngine):
            whole = whole_weights(self.accelerator, self.model)
            # Sampling feeds a token a row to a growing cache: eager, so that it asks for no graphs of its own.
            with torch.compiler.set_stance("force_eager"), self.accelerator.autocast(), whole:
                yield
            return
        if self._sent != self.state.global_step:
            cast(VllmEngine, self.engine).update(policy_weights(self.model), self.state.global_step)
            self._sent = self.state.global_step
        yield

    def generate(self, tasks: list[Task]) -> list[list[Trajectory]]:
        """Episodes of ``tasks``, ``num_rollouts`` each, sampled from the prompt alone."""
        with self._sampling():
            return run_rollouts(
                self.env,
                tasks,
                self.engine,
                self.processing_class,
                n=self.args.num_rollouts,
                sampling=Sampling(temperature=self.config.temperature, top_p=self.args.top_p),
                limits=self.limits,
                rules=self.rules,
                seed=self.stream("rollout").getrandbits(63),
                places=self.places(len(tasks)),
            )

    def _warn_of_no_signal(self, groups: list[Group]) -> None:
        if all(abs(value) < 1e-9 for group in groups for rollout in group.rollouts for value in rollout.advantage):
            logger.warning_once(
                "all rollouts of every prompt in a batch have equal rewards: advantages are 0 and the RL term learns "
                "nothing from it. Warm-start longer, raise num_rollouts or the temperature, or take easier tasks"
            )

    def attach_logprobs(self, groups: list[Group]) -> None:
        """Fix old and reference log-probs where the objective cannot take them from its own forward."""
        if not self._plays(self.args) or not (groups or is_sharded(self.accelerator)):
            return
        start = time.perf_counter()
        # DDP's forward is work of all processes (it broadcasts buffers), and they have not equally many here.
        model = self.model_wrapped if is_sharded(self.accelerator) else self.model
        with self.accelerator.autocast(), evaluating(self.model):
            if self.args.rollout_batch_steps > 1 or self.config.ratio_reference == "behavior":
                self.objective.attach_logprobs(model, groups, field="old_logp")
            if self.reference is not None:
                with self.reference.restored(self.model):
                    self.objective.attach_logprobs(model, groups, field="ref_logp")
            if not isinstance(self.engine, TransformersEngine):
                self._correct(model, groups)
            if self._probing():
                latent = self.objective.latent_trace(model, groups)
                rollouts = latent.pop("latent/rollouts", 0.0)
                for name, value in latent.items():
                    self.meter.add(name, value * rollouts, rollouts)
        self.meter.add("seconds/logprob", time.perf_counter() - start, self.args.rollout_batch_steps)

    def _correct(self, model: nn.Module, groups: list[Group]) -> None:
        """Weigh tokens by how much the engine that sampled them and the trainer disagree, and log by how much."""
        alone = [
            Group(group.head_ids, group.suffix_ids, rollouts=[replace(one, old_logp=None) for one in group.rollouts])
            for group in groups
        ]
        self.objective.attach_logprobs(model, alone, field="old_logp")
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        ours = [(rollout.old_logp or {})[PROMPT] for group in alone for rollout in group.rollouts]
        sums = correct(rollouts, ours, self.args.engine_correction)
        tokens, largest = sums.pop("tokens"), sums.pop("engine_gap_max")
        gap, bound = sums["engine_gap"] / max(tokens, 1.0), self.args.max_engine_gap
        if bound and not gap <= bound:
            raise RuntimeError(
                f"the log-probs of engine and trainer are {gap:.3g} nats a token apart, over max_engine_gap {bound:g}: "
                "the engine does not hold the weights that are trained; serve the same model (layers, vocabulary, rope)"
            )
        self.meter.add("engine/gap_max", largest)
        for name, value in sums.items():
            self.meter.add(name.replace("_", "/", 1), value, tokens)

    def _probing(self) -> bool:
        """Whether this step also computes what only diagnostics need."""
        every = self.args.latent_trace_steps
        return every > 0 and self.state.global_step % every == 0

    # -- learning ----------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: MicroBatch, num_items_in_batch: Any = None) -> Tensor:  # type: ignore[override]
        """Backward of every tree of one micro-batch; returns its part of L, times the process count.

        The denominators are global: the losses of all trees, accumulation steps and processes add up to L, with no
        division by accumulation. Data parallelism averages gradients over processes, which the factor undoes.
        """
        start = time.perf_counter()
        model.train()
        progress = self.state.global_step / self.state.max_steps
        for name, value in zip(("rl", "sft"), term_weights(self.config, progress)):
            self.meter.add(f"weight/{name}", value)
        options: Any = {"denominators": num_items_in_batch, "monitor": self._probing()}
        batches = self.objective.build(inputs, progress, **options) if inputs else []
        idle = self.objective.idle(len(batches))
        if not batches and not idle and self.args.world_size > 1:
            idle = self.objective.nothing(1)  # every process takes part in the reduction of gradients
        loss = torch.zeros((), device=self.args.device)
        for i, batch in enumerate(batches + idle):
            with reduction(self.accelerator, model, last=i == len(batches + idle) - 1):
                with self.accelerator.autocast():
                    result = self.objective.loss(model, batch)
                self.accelerator.backward(result.loss * self.args.world_size, **backward_options(self.accelerator))
            if i < len(batches):
                loss += result.loss.detach() * self.args.world_size
                add_metrics(self.step_sums, result.metrics)
        self._tokens = sum(batch.plan.unique_tokens for batch in batches)
        seconds = time.perf_counter() - start
        self.meter.add("seconds/train", seconds, 1 / max(self.current_gradient_accumulation_steps, 1))
        self.meter.add("tokens_per_second/train", self._tokens, seconds)
        return loss

    def compute_loss(self, model: nn.Module, inputs: MicroBatch, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """L of these groups as a whole optimiser step, with gradient. `training_step` goes tree by tree instead."""
        progress = self.state.global_step / max(self.state.max_steps, 1)
        return sum(
            (self.objective.loss(self.model, batch).loss for batch in self.objective.build(inputs, progress)),
            torch.zeros((), device=self.args.device),
        )

    def floating_point_ops(self, inputs: Any) -> int:
        """6 flops a parameter and unique token: forward and backward of the last micro-batch, attention left out."""
        return 6 * self.model.num_parameters() * self._tokens

    # -- reporting ---------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the objective and the rollouts measured since the last log, over all processes."""
        if "loss" in logs:
            sums: dict[str, Tensor] = {}
            meter = Meter()
            mine = {name: value.detach().to("cpu", torch.float64) for name, value in self.sums.items()}
            for their_sums, their_meter in gather_object([(mine, self.meter)]):
                add_metrics(sums, their_sums)
                meter.merge(their_meter)
            self.totals.merge(meter)
            flat = flatten_metrics(sums, self._steps) if sums else {}
            logs |= flat | meter.means()
            if flat:  # transformers' own sum does not outlive a checkpoint between two logs
                logs["loss"] = sum(flat[f"loss/{term}"] for term in ("rl_prompt", "rl_trace", "sft"))
            self.sums, self.meter, self._steps = {}, Meter(), 0
        super().log(logs, start_time)

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: Sequence[Task] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """One episode of each evaluation task at ``eval_temperature``; logs and returns the means of all metrics."""
        start = time.perf_counter()
        records = self.play(cast(Sequence[Task], self.eval_dataset if eval_dataset is None else eval_dataset))
        metrics = {f"{metric_key_prefix}_{name}": value.mean for name, value in summarize(records).items()}
        metrics[f"{metric_key_prefix}_turns"] = sum(record.turns for record in records) / len(records)
        metrics[f"{metric_key_prefix}_seconds"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def play(self, tasks: Sequence[Task]) -> list[EpisodeRecord]:
        """One episode of each task, shared out over the processes; records in the order of ``tasks``."""
        mine = tasks[self.args.process_index :: self.args.world_size]
        sampling = Sampling(self.args.eval_temperature, self.args.top_p)
        options: Any = {"limits": self.limits, "sampling": sampling, "rules": self.rules}

        def played() -> list[EpisodeRecord]:
            with self._sampling():
                return evaluate(self.engine, self.env, self.processing_class, mine, **options) if mine else []

        records = self.act(played, evaluation=True)
        by_id = {record.id: record for record in gather_object(records)}
        self.records, self.records_step = [by_id[task.id] for task in tasks], self.state.global_step
        return self.records
