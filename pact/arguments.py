"""The settings of a training run and how YAML and command line fill them. Builds no model and starts no run.

Precedence: command line over YAML over defaults. Every setting is a field of one of five dataclasses, so a YAML key, a
flag (``--max_steps`` or ``--max-steps``) and a Python keyword have one name.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, SchedulerType, TrainingArguments

from pact.engines.vllm import VllmOptions
from pact.objective import PactConfig
from pact.rewards import Reward

USAGE = "pact train [CONFIG.yaml] [--resume [RUN]] [--SETTING VALUE ...]"
AUTO = "auto"  # the value of --token_budget that stands for "what fits into memory"
SCRATCH = "toybox"  # the value of --model that stands for "build it from model_config"


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which policy is trained."""

    model: str | None = _help(f"folder of a Hugging Face causal LM, or '{SCRATCH}': a new model of model_config", None)
    model_config: dict | str | None = field(
        default=None, metadata={"help": "scratch model: keys of its transformers config (default: a tiny Qwen3)"}
    )
    copy_gain: float = _help("scratch model: gain of the copying initialisation of its attention; 0: none", 0.5)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _help(
        "dtype of the weights; auto: as the folder stores them", "float32"
    )

    def __post_init__(self) -> None:
        self.model_config = as_dict("model_config", self.model_config)


@dataclass
class LoraArguments:
    """Low-rank adapters (PEFT) in place of full fine-tuning."""

    lora_r: int = _help("rank of LoRA adapters; 0: all weights are trained", 0)
    lora_alpha: float = _help("LoRA: the adapters' output is scaled by lora_alpha / lora_r", 32.0)
    lora_dropout: float = _help("LoRA: dropout of the adapters' inputs while training", 0.0)
    lora_target_modules: str = _help(
        "LoRA: names of the linear layers that get adapters, separated by commas; all-linear: all but the head",
        "all-linear",
    )

    def __post_init__(self) -> None:
        if self.lora_r < 0:
            raise ValueError(f"lora_r is {self.lora_r}, set it to 0 (no adapters) or above")
        if self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha is {self.lora_alpha}, set it above 0")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout is {self.lora_dropout}, set it to 0 or above and below 1")

    def config(self) -> Any:
        """The `peft.LoraConfig`. Raises ValueError where PEFT is not installed."""
        try:
            from peft import LoraConfig
        except ModuleNotFoundError as error:
            raise ValueError("lora_r needs PEFT: pip install 'pact-kernels[lora]', or set lora_r to 0") from error
        names = self.lora_target_modules.split(",")
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]  # any number does
            lora_dropout=self.lora_dropout,
            target_modules=names[0] if names == ["all-linear"] else [name.strip() for name in names],
            task_type="CAUSAL_LM",
        )


@dataclass
class EnvArguments:
    """Where the tasks come from."""

    env: str = _help("environment: toybox, ftrl, ... or FILE.py:NAME of your own", "toybox")
    data: str | None = _help("file with the environment's items (its option path)", None)
    traces: str | None = _help("file with expert traces (its option traces)", None)
    env_options: dict | str | None = field(
        default=None,
        metadata={"help": "further options of the environment, JSON; one of them: --env_options.NAME VALUE"},
    )
    train_split: str | None = _help("split trained on (default: train; test where there is no train split)", None)
    eval_split: str = _help("split evaluated on", "test")

    def __post_init__(self) -> None:
        self.env_options = as_dict("env_options", self.env_options)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `pact.envs.make`."""
        named = {"path": self.data, "traces": self.traces}
        return {k: v for k, v in named.items() if v is not None} | dict(as_dict("env_options", self.env_options))


@dataclass
class PactTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with PACT's own settings; its fields keep their meaning, with these remarks.

    ``per_device_train_batch_size`` counts prompts, ``gradient_accumulation_steps`` x ``per_device_train_batch_size`` x
    processes of them make one optimiser step, ``eval_steps`` are optimiser steps. Raises ValueError for a setting out
    of range. The defaults suit a first try on a small machine; recipes for real runs are in ``configs/``.
    """

    num_rollouts: int = _help("rollouts a prompt; 0: none, the supervised term alone (SFT)", 4)
    rollout_batch_steps: int = _help("optimiser steps on one batch of rollouts; 1 is on-policy", 1)
    generation_batch_size: int = _help("episodes generated together", 256)
    engine: Literal["transformers", "vllm"] = _help(
        "what samples the rollouts: the model itself, or vLLM (docs/vllm.md)", "transformers"
    )
    engine_correction: float = _help(
        "largest importance weight of a token for what engine and trainer disagree on; 0: no weights", 2.0
    )
    max_engine_gap: float = _help(
        "stop when the log-probs of engine and trainer are further apart than this, nats, mean over the sampled tokens "
        "of a batch; 0: never. Engines of other precision differ by hundredths",
        0.5,
    )
    vllm_mode: Literal["server", "colocated"] = _help(
        "vLLM behind HTTP at vllm_url, or in every training process", "server"
    )
    vllm_url: str = _help("address of the vLLM server; several: separated by commas", "http://127.0.0.1:8000")
    vllm_start: bool = _help("start the server ourselves, and stop it at the end", False)
    vllm_devices: str | None = _help("CUDA_VISIBLE_DEVICES of that server (default: the trainer's)", None)
    vllm_sync_folder: str | None = _help(
        "folder for new weights that trainer and servers see; /dev/shm/NAME: memory (default: in the run's folder)",
        None,
    )
    vllm_timeout: float = _help("seconds that one request to vLLM may take", 1800.0)
    vllm_retry_seconds: float = _help("how long to wait for a server that is gone before stopping", 120.0)
    vllm_gpu_memory_utilization: float = _help("share of GPU memory of an engine that we start", 0.4)
    vllm_tensor_parallel_size: int = _help("GPUs of a server that we start", 1)
    vllm_max_model_len: int | None = _help("context of an engine that we start (default: the model's)", None)
    vllm_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _help(
        "dtype of an engine that we start, and of the weights sent", "auto"
    )
    vllm_enforce_eager: bool = _help("an engine that we start captures no graphs", False)
    top_p: float = _help("nucleus of sampled episodes; the temperature of rollouts is that of the objective", 1.0)
    max_turns: int = _help("assistant turns an episode", 10)
    max_turn_tokens: int = _help("sampled tokens a turn", 128)
    max_response_tokens: int = _help("tokens after the prompt, observations included", 4096)
    max_prompt_tokens: int | None = _help("longest prompt (default: what the context leaves for one turn)", None)
    overlong_prompts: Literal["error", "drop"] = _help("what to do with prompts over max_prompt_tokens", "error")
    call_format: Literal["hermes", "json"] = _help(
        "how calls are written: <tool_call> blocks, or JSON in the text", "hermes"
    )
    malformed_calls: Literal["observe", "skip"] = _help("answer a bad call with an error, or drop it", "observe")
    reward: str = _help(
        "reward of the rollouts: env (the environment's own, which evaluations always report), solve_f1, toolrl, "
        "matchtir, answer_f1, or FILE.py:NAME of your function",
        "env",
    )
    match_assignment: Literal["optimal", "greedy", "transport"] = _help(
        "matchtir: how calls find gold calls", "optimal"
    )
    match_unmatched: float = _help("matchtir: reward of a call without a partner", 0.0)
    format_weight: float | None = _help("weight of the format term (default: 1 for toolrl, 0 for the others)", None)
    answer_tags: bool = _help(
        "rewards read the answer between <answer> tags; no_answer_tags: the whole last turn", True
    )
    advantage: Literal["grpo", "dr_grpo", "rloo", "dual_level", "turn_level"] = _help("advantage estimator", "grpo")
    turn_discount: float = _help("gamma of the turn-level returns", 0.9)
    dual_combine: Literal["sum", "mean"] = _help("dual_level: how trajectory and turn parts are combined", "sum")
    memory_gib: float | None = _help(
        "memory that a process may take, GiB, for the estimate and for token_budget auto (default: what is free)", None
    )
    max_ratio: float = _help(
        "stop before an update when the mean ratio of a branch is above this; 0: never. The mean over honest samples "
        "is 1 in expectation, so 100 comes by chance less than once in 100 updates, however long the tails (Markov)",
        100.0,
    )
    latent_trace_steps: int = _help("log the latent-trace terms every this many steps; 0: never", 0)
    eval_tasks: int = _help("test tasks of an evaluation; 0: no evaluation", 0)
    eval_temperature: float = _help("temperature of evaluation episodes; 0 is greedy", 0.0)

    warm_start_steps: int = _help("optimiser steps of supervised warm start on the traces; 0: none", 0)
    warm_start_lr: float = _help("peak learning rate of the warm start", 1e-5)
    warm_start_lr_scheduler_type: str = _help("its schedule", "cosine")
    warm_start_warmup_steps: int = _help("its linear warm-up", 0)
    warm_start_batch_size: int = _help("prompts an optimiser step in the warm start, on each process", 16)
    warm_start_context_share: float = _help(
        "share of warm-start examples that carry the trace in context, so that the model learns to read one", 0.0
    )

    learning_rate: float = _help("peak learning rate", 1e-6)
    lr_scheduler_type: str = _help("schedule of the learning rate", "constant")
    per_device_train_batch_size: int = _help("prompts of one micro-batch on each device", 1)
    gradient_accumulation_steps: int = _help("micro-batches of one optimiser step", 2)
    logging_steps: float = _help("log every this many optimiser steps", 1)
    report_to: None | str | list[str] = field(  # noqa: RUF036 (HfArgumentParser reads the second member)
        default="tensorboard", metadata={"help": "loggers of transformers"}
    )
    dataloader_pin_memory: bool = _help("tasks are no tensors, there is nothing to pin", False)
    ddp_find_unused_parameters: bool | None = _help("every parameter has a gradient in every step", False)
    remove_unused_columns: bool = _help("stays false: tasks are no columns", False)
    logging_nan_inf_filter: bool = _help("stays false: a loss that is not finite is an error", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_rollouts != 0 and self.num_rollouts < 2:
            raise ValueError(
                f"num_rollouts is {self.num_rollouts}, set it to at least 2 (advantages compare the rollouts of a "
                "prompt) or to 0 (no rollouts: SFT)"
            )
        self.reward_options()
        self.vllm_options()
        at_least = {
            "rollout_batch_steps": (1, "each batch of rollouts is trained on at least once"),
            "generation_batch_size": (1, "it counts episodes"),
            "max_turns": (1, "it counts assistant turns"),
            "max_turn_tokens": (1, "it counts tokens"),
            "max_response_tokens": (1, "it counts tokens"),
            "latent_trace_steps": (0, "0 switches it off"),
            "max_ratio": (0, "0 switches it off"),
            "max_engine_gap": (0, "0 switches it off"),
            "eval_tasks": (0, "0 switches evaluation off"),
            "warm_start_steps": (0, "0 switches the warm start off"),
            "warm_start_batch_size": (1, "it counts prompts"),
        }
        for name, (least, reason) in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, set it to at least {least}: {reason}")
        if not 0.0 <= self.warm_start_context_share <= 1.0:
            raise ValueError(f"warm_start_context_share is {self.warm_start_context_share}, set it between 0 and 1")
        if not self.engine_correction >= 0.0:
            raise ValueError(f"engine_correction is {self.engine_correction}, set it to 0 (no weights) or above")
        if self.memory_gib is not None and not 0.0 < self.memory_gib < float("inf"):
            raise ValueError(f"memory_gib is {self.memory_gib}, set it above 0")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}, set it above 0 and at most 1")
        if not 0.0 <= self.eval_temperature < float("inf"):
            raise ValueError(f"eval_temperature is {self.eval_temperature}, set it to 0 (greedy) or above")
        if self.warm_start_lr_scheduler_type not in list(SchedulerType):
            raise ValueError(
                f"unknown warm_start_lr_scheduler_type {self.warm_start_lr_scheduler_type!r}: choose one of "
                f"{', '.join(kind.value for kind in SchedulerType)}"
            )
        if self.resume_from_checkpoint is not None:
            raise ValueError(
                "leave out resume_from_checkpoint: pact train --resume RUN goes on from its last checkpoint"
            )
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor must stay 0: the losses here have no smoothing")
        if self.enable_jit_checkpoint:
            raise ValueError("leave out enable_jit_checkpoint: SIGTERM always ends in a checkpoint, rollouts included")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay false: tasks are objects, not columns")

    def reward_options(self) -> Reward:
        """The reward of the rollouts. Raises ValueError for a setting out of range."""
        return Reward(self.reward, self.match_assignment, self.match_unmatched, self.format_weight, self.answer_tags)

    def says_vllm(self) -> list[str]:
        """The settings of vLLM that are not their defaults."""
        return [f.name for f in fields(self) if f.name.startswith("vllm_") and getattr(self, f.name) != f.default]

    def vllm_options(self) -> VllmOptions:
        """How vLLM is run. Raises ValueError for a setting out of range."""
        return VllmOptions(
            mode=self.vllm_mode,
            urls=tuple(url.strip() for url in self.vllm_url.split(",")),
            start=self.vllm_start,
            devices=self.vllm_devices,
            sync_folder=self.vllm_sync_folder,
            timeout=self.vllm_timeout,
            retry_seconds=self.vllm_retry_seconds,
            gpu_memory_utilization=self.vllm_gpu_memory_utilization,
            tensor_parallel_size=self.vllm_tensor_parallel_size,
            max_model_len=self.vllm_max_model_len,
            dtype=self.vllm_dtype,
            enforce_eager=self.vllm_enforce_eager,
        )


@dataclass(frozen=True)
class RunSettings:
    """All settings of one run, and ``values``: the flat dictionary that rebuilds them (the run's config.yaml).

    ``auto_budget``: token_budget is "auto" and not yet a number; ``pact`` has none so far.
    """

    model: ModelArguments
    lora: LoraArguments
    env: EnvArguments
    pact: PactConfig
    training: PactTrainingArguments
    values: dict[str, Any]
    auto_budget: bool = False


def with_token_budget(settings: RunSettings, tokens: int) -> RunSettings:
    """``settings`` with a number in place of ``token_budget auto``, so that a resumed run takes the same."""
    pact, values = replace(settings.pact, token_budget=tokens), settings.values | {"token_budget": tokens}
    return replace(settings, pact=pact, values=values, auto_budget=False)


def as_dict(name: str, value: dict | str | None) -> dict[str, Any]:
    """``value`` as a dictionary: given as one, as a JSON string or not at all. Raises ValueError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is not JSON ({error}): write it like '{{\"key\": 1}}'") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping, not {value!r}")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The flat mapping in a YAML file. Raises ValueError when it is missing, unreadable or no mapping."""
    if not path.is_file():
        raise ValueError(f"no configuration file {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{path} must hold 'setting: value' lines")
    return values or {}


def read_settings(path: Path, known: set[str], below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a YAML file over those of the file it ``extends`` (a path relative to its own), and so on.

    ``below``: the files that extend this one. Raises ValueError for a key that is not in ``known``, for files that
    extend each other in a circle, and as ``read_yaml``.
    """
    if path.resolve() in below:
        raise ValueError(f"{path} extends itself: take one of the 'extends' lines out")
    values = read_yaml(path)
    parent = values.pop("extends", None)
    for key in values:
        if key not in known:
            raise ValueError(f"unknown setting {key!r} in {path}{nearest(key, known)}")
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ValueError(f"{path}: extends must be the path of one YAML file, not {parent!r}")
    inherited = read_settings(path.parent / parent, known, (*below, path.resolve()))
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(inherited.get(key), dict):
            values[key] = inherited[key] | value  # env_options, model_config: one by one, as flags do
    return inherited | values


def parse_settings(argv: Sequence[str], *files: Path) -> RunSettings:
    """Settings from YAML files (a later one wins) and command-line flags (they win over all files).

    Raises ValueError for an unknown setting, a value of the wrong type or one out of range.
    """
    parser = SettingsParser(
        [
            ModelArguments,
            LoraArguments,
            EnvArguments,
            as_flags(PactConfig, token_budget=str | None),
            PactTrainingArguments,
        ],
        usage=USAGE,
    )
    known = {f.name for kind in parser.dataclass_types for f in fields(kind) if f.init}
    values: dict[str, Any] = {}
    for path in files:
        values |= read_settings(path, known)
    flags, options = split_dotted(argv)
    arguments = [text for key, value in values.items() for text in as_arguments(key, value)]
    namespace, unknown = parser.parse_known_args(arguments + flags)
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}{nearest(unknown[0].lstrip('-').replace('-', '_'), known)}")
    found = vars(namespace)
    for key, value in options.items():
        found["env_options"] = as_dict("env_options", found["env_options"]) | {key: value}
    return _build(parser, found)


class SettingsParser(HfArgumentParser):
    """HfArgumentParser whose complaints are exceptions, and which takes no abbreviated flags."""

    def __init__(self, dataclass_types: Any, **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def as_flags(config: type, **kinds: Any) -> type:
    """``config`` as a dataclass that HfArgumentParser can read: a tuple field becomes a list.

    ``kinds``: types of flags that are not those of their fields.
    """
    hints, flags = get_type_hints(config) | kinds, []
    for item in fields(config):
        hint = hints[item.name]
        if get_origin(hint) is tuple:
            default = list(item.default)  # type: ignore[arg-type]  # every field has a default
            flags.append((item.name, list[get_args(hint)[0]], field(default_factory=default.copy)))  # type: ignore[misc]
        else:
            flags.append((item.name, hint, field(default=item.default)))
    return make_dataclass(config.__name__, flags)


def as_arguments(key: str, value: Any) -> list[str]:
    """One YAML entry as command-line text, so that argparse checks and converts files and flags alike."""
    if value is None:
        return []
    if key == "reasoning_anneal" and value is False:
        value = "off"  # YAML 1.1 reads a bare off as false
    if isinstance(value, dict):
        value = json.dumps(value)
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={value}"]


def split_dotted(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Take ``--env_options.NAME VALUE`` and ``--env_options.NAME=VALUE`` out of ``argv``; values are YAML."""
    flags: list[str] = []
    options: dict[str, Any] = {}
    rest = iter(argv)
    for text in rest:
        if text.startswith(("--env_options.", "--env-options.")):
            name, equals, value = text.partition(".")[2].partition("=")
            text = value if equals else next(rest, "")
            try:
                options[name] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(f"env_options.{name}: {text!r} is not a YAML value: {error}") from error
        else:
            flags.append(text)
    return flags, options


def nearest(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {near[0]!r}?" if near else ": --help lists all settings"


def _token_budget(text: str | None) -> int | None:
    """A number of tokens; None where there is none, or not yet (auto)."""
    try:
        return None if text in (None, AUTO) else int(str(text))
    except ValueError:
        raise ValueError(f"token_budget={text!r} must be a number of tokens, or {AUTO}") from None


def _build(parser: SettingsParser, found: dict[str, Any]) -> RunSettings:
    auto = found["token_budget"] == AUTO
    found["token_budget"] = _token_budget(found["token_budget"])
    defaults = vars(parser.parse_known_args([])[0])
    own = {f.name for f in fields(PactTrainingArguments)} - {f.name for f in fields(TrainingArguments)}
    built: list[Any] = []
    values: dict[str, Any] = {}
    for kind in parser.dataclass_types:
        given = {f.name: found[f.name] for f in fields(kind) if f.init}
        values |= {
            key: value
            for key, value in given.items()
            if key in own or kind is not PactTrainingArguments or value != defaults[key]
        }
        make: Any = PactConfig if kind.__name__ == PactConfig.__name__ else kind
        built.append(make(**given))
    model, lora, env, pact, training = built
    values |= {"model_config": model.model_config, "env_options": env.env_options}
    values = {k: v for k, v in values.items() if v not in (None, {})}
    return RunSettings(model, lora, env, pact, training, values, auto)


__all__ = [
    "EnvArguments",
    "LoraArguments",
    "ModelArguments",
    "PactTrainingArguments",
    "RunSettings",
    "SettingsParser",
    "as_arguments",
    "as_dict",
    "as_flags",
    "nearest",
    "parse_settings",
    "read_settings",
    "read_yaml",
    "split_dotted",
    "with_token_budget",
]
