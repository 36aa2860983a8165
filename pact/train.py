"""One run from settings to a saved model: ``pact train``, ``python -m pact.train``.

It owns the run's folder; the steps themselves are the trainer's.

    runs/<name>/  config.yaml  metrics.jsonl  curves.png  report.html  tensorboard/  checkpoint-*/  model/
                  eval_start.jsonl  eval_final.jsonl  warm_start/checkpoint-*/
"""

from __future__ import annotations

import copy
import gc
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from logging import INFO, basicConfig, getLogger
from pathlib import Path
from typing import Any, cast

import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.utils import logging

from pact.arguments import (
    SCRATCH,
    LoraArguments,
    ModelArguments,
    PactTrainingArguments,
    RunSettings,
    as_dict,
    parse_settings,
    with_token_budget,
)
from pact.budget import Fit
from pact.checkpoints import STATE, last_checkpoint, save_whole
from pact.distributed import is_sharded
from pact.envs import Environment, Task, make
from pact.evaluate import EpisodeRecord, load_records, paired_improvement, save_records
from pact.files import write_whole
from pact.memory import NoEstimate, Shadow, Strategy, free_memory
from pact.report import CONFIG_FILE, EVAL_FINAL, EVAL_START, REPORT_FILE, ReportWriter, report_or_warn
from pact.reporting import CURVES_FILE, METRICS_FILE, MetricsWriter, draw_curves, exit_code, peak_memory_bytes
from pact.samples import with_context, with_usable_trace
from pact.scratch import new_model
from pact.trace import prepare_tokenizer
from pact.trainer import PactTrainer
from pact.warm_start import WarmStartTrainer
from pact.workload import usable_tasks, workload

logger = logging.get_logger(__name__)

WARM_START = "warm_start"


@dataclass(frozen=True)
class Run:
    """A run's folder and settings; ``resumed``: the folder was there before."""

    folder: Path
    settings: RunSettings
    resumed: bool


def open_run(argv: Sequence[str]) -> Run:
    """Read ``[CONFIG.yaml] [--resume [RUN]] [--setting value ...]`` and name the run. Writes nothing.

    Raises ValueError for bad settings, a configuration beside ``--resume``, and a run that does not exist (resume) or
    already does (``--run_name``).
    """
    rest = [part for text in argv for part in (text.split("=", 1) if text.startswith("--resume=") else [text])]
    config = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else None
    runs = Path("runs")
    if "--resume" not in rest:
        settings = parse_settings(rest, *([config] if config else []))
        if "output_dir" in settings.values:
            raise ValueError("output_dir is always runs/<name> here: set run_name instead")
        return Run(_new_folder(runs, settings, config), settings, False)
    at = rest.index("--resume")
    name = rest.pop(at + 1) if at + 1 < len(rest) and not rest[at + 1].startswith("-") else None
    rest.pop(at)
    if config is not None:
        raise ValueError(f"--resume continues with the run's own config.yaml: leave out {config}, overrides are fine")
    if name and Path(name).name != name and Path(name).resolve() != (runs / Path(name).name).resolve():
        raise ValueError(f"--resume {name} is not in {runs.absolute()}: change to the folder where the run was begun")
    folder = runs / Path(name).name if name else max(runs.glob(f"*/{CONFIG_FILE}"), key=_age, default=runs / "x").parent
    if not (folder / CONFIG_FILE).is_file():
        known = ", ".join(sorted(path.parent.name for path in runs.glob(f"*/{CONFIG_FILE}"))) or "none"
        raise ValueError(f"no run {name or ''!r} to resume in {runs.absolute()}: there are {known}")
    first = parse_settings([], folder / CONFIG_FILE)
    settings = parse_settings(rest, folder / CONFIG_FILE)  # last: making training arguments sets up the processes
    for field in fields(LoraArguments):
        before, after = getattr(first.lora, field.name), getattr(settings.lora, field.name)
        if before != after:
            raise ValueError(
                f"this run was begun with {field.name} {before}, not {after}: leave it as it was, or begin a new run"
            )
    if (folder / EVAL_START).is_file():
        _same_evaluation(first, settings)
    return Run(folder, settings, True)


def _same_evaluation(first: RunSettings, now: RunSettings) -> None:
    """Raises ValueError when the evaluation at the end would not be that of the start."""
    for name in ("eval_temperature", "top_p", "max_turns", "max_turn_tokens", "max_response_tokens", "call_format"):
        before, after = getattr(first.training, name), getattr(now.training, name)
        if before != after:
            raise ValueError(
                f"the start of this run was evaluated with {name} {before}, not {after}: leave {name} as it was, or "
                "begin a new run"
            )


def _age(path: Path) -> float:
    return path.stat().st_mtime


def _new_folder(runs: Path, settings: RunSettings, config: Path | None) -> Path:
    name = settings.training.run_name
    if name is None:
        stem = config.stem if config else settings.env.env.rpartition(":")[2].lower()
        names = [f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"]
        while (runs / names[0]).exists():
            names[0] += "+"
    else:
        names = [Path(name).name]
        if not _unused(runs / names[0]):
            raise ValueError(f"run {names[0]} exists: choose another run_name, or continue it with --resume {names[0]}")
    PartialState()
    broadcast_object_list(names)
    return runs / names[0]


def _unused(folder: Path) -> bool:
    """Whether a run can begin in ``folder``: one that was killed before it had its config.yaml has not begun."""
    return not folder.exists() or all(path.name == f"{CONFIG_FILE}.part" for path in folder.iterdir())


def load_tasks(env: Environment, settings: RunSettings) -> tuple[Sequence[Task], Sequence[Task] | None]:
    """Training tasks, and evaluation tasks or None when there is no evaluation."""
    count, split = settings.training.eval_tasks, settings.env.train_split
    test = list(env.tasks(settings.env.eval_split)[:count]) if count else None
    if test is not None and len(test) < count:
        logger.warning(f"eval_tasks is {count} and the split {settings.env.eval_split} has only {len(test)} tasks")
    if split is not None:
        return env.tasks(split), test
    try:
        return env.tasks("train"), test
    except ValueError:  # no such split
        logger.warning("the environment has no train split: training on its test items, claim no score from this run")
        return env.tasks("test"), test


def load_tokenizer(arguments: ModelArguments, env: Environment) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or the environment's for a new model.

    Raises ValueError when no model is named, a folder does not exist or a scratch model has no tokenizer to start from.
    """
    source = arguments.model or (SCRATCH if arguments.model_config else None)
    if source is None:
        raise ValueError(f"no model: give --model FOLDER, or --model {SCRATCH} for a new one")
    if source == SCRATCH:
        if not hasattr(env, "tokenizer"):
            raise ValueError("a new model takes the environment's tokenizer and this one has none: give --model FOLDER")
        return prepare_tokenizer(env.tokenizer())
    if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise ValueError(f"no model folder {source}: give a folder saved by save_pretrained, or a hub name")
    if (Path(source) / "adapter_config.json").is_file():
        raise ValueError(
            f"{source} holds LoRA adapters alone: give the folder of a whole model, their base or the two merged "
            "(PEFT's merge_and_unload, then save_pretrained)"
        )
    if arguments.model_config:
        raise ValueError("model_config is for new models: leave it out, or set model to " + SCRATCH)
    return prepare_tokenizer(AutoTokenizer.from_pretrained(source))


def outline(settings: RunSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """What `load_model` would return, without reading its weights: for `pact.memory.Shadow`."""
    arguments, seed = settings.model, settings.training.seed
    if arguments.model in (None, SCRATCH):
        return _new_model(arguments, tokenizer, seed, copy_gain=0.0)
    config = AutoConfig.from_pretrained(arguments.model)
    dtype = config.dtype or "float32" if arguments.dtype == "auto" else arguments.dtype
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return with_adapters(model, settings.lora, seed, None) if settings.lora.lora_r else model


def _new_model(
    arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, seed: int, copy_gain: float
) -> PreTrainedModel:
    config = as_dict("model_config", arguments.model_config)
    dtype = "float32" if arguments.dtype == "auto" else arguments.dtype
    return new_model(config, tokenizer, seed, dtype, copy_gain)


def load_model(
    arguments: ModelArguments,
    env: Environment,
    seed: int,
    weights: Path | None = None,
    lora: LoraArguments | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer; ``weights`` replaces the model's own folder (a warm-started or trained copy of it).

    With ``lora`` the model is the folder's with adapters, and ``weights`` are those of the adapters.

    Raises ValueError as `load_tokenizer`, and for adapters on a new model.
    """
    tokenizer = load_tokenizer(arguments, env)
    adapted = lora is not None and lora.lora_r > 0
    source = arguments.model or SCRATCH
    if source == SCRATCH and adapted:
        raise ValueError("lora_r is for models that have learned: set it to 0, or give --model FOLDER")
    if source == SCRATCH and weights is None:
        return _new_model(arguments, tokenizer, seed, arguments.copy_gain), tokenizer
    folder = source if adapted else weights or source
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=arguments.dtype)
    if lora is not None and adapted:
        model = with_adapters(model, lora, seed, weights)
    return model, tokenizer


def with_adapters(model: PreTrainedModel, lora: LoraArguments, seed: int, weights: Path | None) -> PreTrainedModel:
    """``model`` frozen, with LoRA adapters: new ones, which leave its outputs as they are, or those in ``weights``.

    Raises ValueError for settings that fit no layer of the model.
    """
    config = lora.config()
    from peft import PeftModel, get_peft_model

    if weights is not None:
        return cast(PreTrainedModel, PeftModel.from_pretrained(model, str(weights), is_trainable=True))
    set_seed(seed)  # the same adapters in a resumed run
    return cast(PreTrainedModel, get_peft_model(model, config))


def fitted(state: Run, env: Environment, tasks: Sequence[Task]) -> Run:
    """The run with a number for ``token_budget auto``, after its memory has been estimated and printed.

    Raises ValueError where weights and optimiser states alone do not fit, or where no token budget does.
    """
    settings, args = state.settings, state.settings.training
    tokenizer = load_tokenizer(settings.model, env)
    free = min(gather_object([free_memory(args.device, args.memory_gib)]))
    shadow = Shadow(lambda: outline(settings, tokenizer), settings.pact, args)
    config = with_context(settings.pact, shadow.model)
    tasks = usable_tasks(tasks, tokenizer, config, args, plays=args.num_rollouts > 0)
    fit = Fit(shadow, args, config, Strategy.of(args), free)
    try:
        fit.check_fixed()
        if settings.auto_budget:
            settings = with_token_budget(settings, fit.token_budget(tasks, tokenizer))
            config = replace(config, token_budget=settings.pact.token_budget)
        plan = fit.plan(workload(tasks, tokenizer, config, args))
    except NoEstimate as error:
        if settings.auto_budget:
            raise ValueError(f"token_budget auto: {error}; set a number of tokens") from None
        logger.warning(str(error))
        return state
    if PartialState().is_main_process:
        auto = f"token_budget: {settings.pact.token_budget}\n" * state.settings.auto_budget
        print(auto + plan.lines(), flush=True)
        for warning in plan.warnings():
            logger.warning(warning)
    return replace(state, settings=settings)


def run(argv: Sequence[str]) -> None:
    """Everything ``pact train`` does. Raises ValueError or RuntimeError for what the user can mend."""
    half_way = _run(argv)
    if half_way is not None:
        gc.collect()  # the model of the warm start
        _run(["--resume", half_way.name])


def _run(argv: Sequence[str]) -> Path | None:
    """`run`, or its first half: then the folder to resume in."""
    logging.disable_progress_bar()  # those of loading and saving weights; the trainer's own stays
    basicConfig(format="%(message)s")
    getLogger("pact").setLevel(INFO)
    state = open_run(argv)
    settings, args = state.settings, state.settings.training
    args.output_dir = str(state.folder)
    if args.engine != "vllm" and args.says_vllm():
        logger.warning(
            f"{', '.join(args.says_vllm())}: not read with engine {args.engine}; set engine vllm to use vLLM"
        )
    env = make(settings.env.env, **settings.env.options())
    train_tasks, test_tasks = load_tasks(env, settings)
    checkpoint, finished = _resume_point(state.folder, args.max_steps)
    warm, warm_finished = _resume_point(state.folder / WARM_START, args.warm_start_steps)
    if finished and test_tasks and not (state.folder / EVAL_START).is_file():
        raise ValueError(
            "this run is finished and its start was not evaluated: there is no gain to tell, set eval_tasks 0"
        )
    if not finished:
        state = fitted(state, env, train_tasks)
        settings = state.settings
    weights = checkpoint if finished else warm if warm_finished else None
    model, tokenizer = load_model(settings.model, env, args.seed, weights, settings.lora)
    config = with_context(settings.pact, model)
    warm_tasks = with_usable_trace(train_tasks, tokenizer, config) if args.warm_start_steps else []
    _log_to(state.folder, "train")
    metrics = MetricsWriter(state.folder, "train")
    callbacks: list[TrainerCallback] = [metrics, ReportWriter(state.folder, test_tasks)]
    trainer = PactTrainer(model, args, env, tokenizer, config, train_tasks, test_tasks, callbacks)
    trainer.how_to_resume = _how_to_resume(state)
    warming = bool(args.warm_start_steps) and not (warm_finished or finished)
    if warming:
        _check_warm_start(trainer)
    if trainer.is_world_process_zero() and not state.resumed:
        state.folder.mkdir(parents=True, exist_ok=True)
        write_whole(state.folder / CONFIG_FILE, yaml.safe_dump(settings.values, sort_keys=False))
        print(f"run folder: {state.folder}", flush=True)
    if warming:
        warm_start(state, model, env, tokenizer, warm_tasks, warm)
        if is_sharded(trainer.accelerator):
            return state.folder  # the model is sharded for that optimiser: the next one takes it from the checkpoint
    before = _evaluation(trainer, state.folder / EVAL_START, metrics)
    if finished and checkpoint:
        trainer.state = TrainerState.load_from_json(str(checkpoint / STATE))  # evaluated as the end of training
    else:
        if trainer.is_world_process_zero():
            (state.folder / EVAL_FINAL).unlink(missing_ok=True)  # of a run that goes on beyond its end
        trainer.accelerator.wait_for_everyone()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    after = _evaluation(trainer, state.folder / EVAL_FINAL, metrics)
    main, wait = trainer.is_world_process_zero(), trainer.accelerator.wait_for_everyone
    save_whole(trainer.save_model, state.folder / "model", main, wait)
    if trainer.is_world_process_zero():
        draw_curves(state.folder / METRICS_FILE, state.folder / CURVES_FILE)
        report_or_warn(state.folder, test_tasks or [])
        _summarise(state, trainer, before, after)
    return None


def _check_warm_start(trainer: PactTrainer) -> None:
    """Raises ValueError where training could not go on with the weights of the warm start."""
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "DeepSpeed keeps a model for one optimiser: warm-start in a run of its own (--num_rollouts 0), then train "
            "with --model runs/NAME/model --warm_start_steps 0"
        )
    if is_sharded(trainer.accelerator) and trainer.args.save_strategy == "no":
        raise ValueError(
            "where weights are sharded, training takes those of the warm start from its checkpoint: set save_strategy "
            "to steps"
        )


def warm_start(
    state: Run,
    model: PreTrainedModel,
    env: Environment,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    checkpoint: Path | None,
) -> None:
    """The supervised phase on ``model`` itself; training starts from its last checkpoint in ``<run>/warm_start``."""
    args: PactTrainingArguments = copy.copy(state.settings.training)
    args.output_dir = str(state.folder / WARM_START)
    args.max_steps, args.learning_rate = args.warm_start_steps, args.warm_start_lr
    args.lr_scheduler_type, args.warmup_steps = args.warm_start_lr_scheduler_type, args.warm_start_warmup_steps
    args.lr_scheduler_kwargs = None
    args.per_device_train_batch_size, args.gradient_accumulation_steps = args.warm_start_batch_size, 1
    args.rollout_batch_steps, args.latent_trace_steps, args.eval_tasks = 1, 0, 0
    args.eval_strategy, args.eval_on_start, args.load_best_model_at_end = "no", False, False
    _log_to(state.folder, WARM_START)
    callbacks: list[Any] = [MetricsWriter(state.folder, WARM_START)]
    trainer = WarmStartTrainer(model, args, env, tokenizer, state.settings.pact, tasks, callbacks=callbacks)
    trainer.how_to_resume = _how_to_resume(state)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _resume_point(folder: Path, max_steps: int) -> tuple[Path | None, bool]:
    """`last_checkpoint` as the main process sees it."""
    found: list[Any] = [last_checkpoint(folder, max_steps)]
    broadcast_object_list(found)
    return found[0]


def _log_to(folder: Path, phase: str) -> None:
    """Where transformers' TensorBoard callback writes; it reads this variable when a trainer is made."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard" / phase)


def _how_to_resume(state: Run) -> str:
    return f"continue with: pact train --resume {state.folder.name}"


def _evaluation(trainer: PactTrainer, path: Path, metrics: MetricsWriter) -> list[EpisodeRecord] | None:
    """Evaluation, kept in ``path`` so that a resumed run does not repeat it; None without evaluation tasks.

    Raises ValueError when the run was evaluated on other tasks before.
    """
    if not trainer.eval_dataset:
        return None
    if path.is_file():
        records = load_records(path)
        if [record.id for record in records] != [task.id for task in cast(Sequence[Task], trainer.eval_dataset)]:
            raise ValueError(f"{path} holds {len(records)} other tasks: resume with the eval_tasks the run began with")
        return records
    if trainer.records_step != trainer.state.global_step:
        if trainer.is_world_process_zero():
            metrics.forget_evaluation(trainer.state.global_step)
        trainer.evaluate()
    if trainer.is_world_process_zero():
        save_records(trainer.records, path)
    return trainer.records


def _summarise(
    state: Run, trainer: PactTrainer, before: list[EpisodeRecord] | None, after: list[EpisodeRecord] | None
) -> None:
    """The closing lines: where the model is, what it cost and, last, what training gained on the same episodes."""
    peak, rates = peak_memory_bytes(trainer.args.device), trainer.totals.means()
    spent = [f"peak memory {peak / 2**30:.2f} GiB"] if peak else []
    for name, what in (("train", "tokens trained on"), ("generate", "tokens sampled")):
        if f"tokens_per_second/{name}" in rates:
            spent.append(f"{rates[f'tokens_per_second/{name}']:,.0f} {what} a second")
    print(f"model: {state.folder / 'model'}")
    print(f"report: {state.folder / REPORT_FILE}")
    print(f"{', '.join(spent)} (each process)")
    if before is not None and after is not None:
        mean, bound, count = paired_improvement(before, after)
        start = "warm start" if state.settings.training.warm_start_steps else "start"
        print(f"improvement over {start}: {mean:.4f} on {count} episodes, 95% lower bound: {bound:.4f}")


def main(argv: Sequence[str] | None = None) -> int:
    """`run`, with the exit codes and one-line errors of ``pact.reporting.exit_code``."""
    arguments = sys.argv[1:] if argv is None else argv
    return exit_code(lambda: run(arguments), "continue from the last checkpoint with: pact train --resume")


if __name__ == "__main__":
    sys.exit(main())
