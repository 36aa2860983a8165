"""PACT inside TRL's GRPOTrainer: generation, rewards and advantages are TRL's, the loss is PACT's.

Text models only; what of `GRPOConfig` the objective cannot honour is refused by `merged_config`, in one message.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.resources import files
from logging import getLogger
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pact.groups import PROMPT, context_overflow
from pact.messages import Message, check_messages, check_trace
from pact.metrics import add_metrics
from pact.modeling import attach_tree_attention, causal_lm, check_vocabulary, evaluating
from pact.objective import Denominators, Group, PactConfig, PactObjective, Rollout, flatten_metrics
from pact.trace import TokenizedTrace, prepare_tokenizer, render_context, render_prompt, render_trace

try:
    from trl import GRPOConfig, GRPOTrainer
    from trl.chat_template_utils import add_response_schema, qwen3_chat_template
    from trl.trainer.utils import use_adapter
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ImportError("pact.integrations.trl needs TRL: pip install 'pact-kernels[trl]'") from error

logger = getLogger(__name__)
EXPERT = "expert"  # the column of the traces
_LOSS_NORM = {"dapo": "token", "grpo": "sequence", "dr_grpo": "constant"}  # TRL's loss_type -> PactConfig.loss_norm

MicroBatch = list[Group]


class PactGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with the terms of PACT: trace-conditioned rollouts and the annealed supervised term.

    Rollouts are sampled from the prompt alone. Rows of the dataset may have a column ``expert``: the messages of the
    trace after the prompt (assistant turns with ``reasoning_content`` and ``tool_calls``, tool messages), or None;
    rows without it are trained on prompt-only. All rollouts of a prompt take one branch, fixed when they are generated.

    What an optimiser step contains: ``gradient_accumulation_steps`` micro-batches of ``per_device_train_batch_size``
    rollouts a process, as in TRL. A generation batch has ``steps_per_generation`` of them and each is used
    ``num_iterations`` times. Micro-batches keep the order of the prompts (TRL scatters rollouts at random), so that the
    rollouts of a prompt share one prefix tree. A trace is supervised with the first rollout of its prompt: once in each
    pass over the generation batch. Z and Z_sft are those of the generation batch over all processes, times
    ``gradient_accumulation_steps / steps_per_generation``, as TRL's "dapo" counts: exactly those of the optimiser step
    where it takes one whole generation batch, their mean over the steps where a generation batch lasts for several. A
    step that takes several generation batches is the mean of their losses.
    Old log-probs are kept, for the branch taken, where a generation batch outlives an optimiser step.

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class: those of ``GRPOTrainer``. The
            tokenizer gets PACT's training template (`pact.trace.prepare_tokenizer`), the model the tree attention;
            generation then runs as with ``attn_implementation="sdpa"``.
        pact: the settings of PACT. What ``args`` has a name for is read from ``args`` (`merged_config`).
        options: the other arguments of ``GRPOTrainer``: ``peft_config``, ``tools``, ``callbacks`` and so on.

    Attributes:
        pact: the settings in force.

    Raises:
        TypeError: ``pact`` that is no PactConfig.
        ValueError: settings that cannot be honoured, all in one message; a trace that cannot be rendered (the message
            names its row); a tokenizer or a model that PACT cannot train.
    """

    args: GRPOConfig
    model: PreTrainedModel
    pact: PactConfig
    objective: PactObjective
    _signature_columns: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        pact: PactConfig | None = None,
        **options: Any,
    ) -> None:
        args = GRPOConfig() if args is None else args
        if not isinstance(pact, PactConfig | None):
            raise TypeError(f"pact is {type(pact).__name__}: give a pact.objective.PactConfig")
        config = merged_config(args, pact or PactConfig())
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            _check_dataset(dataset, name)
        tokenizer = _tokenizer(model, args) if processing_class is None else processing_class
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"processing_class is a {type(tokenizer).__name__}: PACT trains on text, pass a tokenizer")
        prepare_tokenizer(tokenizer)
        if options.get("tools") or options.get("environment_factory"):
            _add_parser(tokenizer)
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, tokenizer, **options)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version != 2:
            raise ValueError("FSDP version 1 is not supported: set fsdp_version: 2 in the accelerate configuration")
        if self.aux_loss_enabled:
            raise ValueError("PACT has no load-balancing loss of experts: set router_aux_loss_coef=0.0")
        lm = causal_lm(self.model)
        check_vocabulary(lm, tokenizer)
        if config.one_pass:
            attach_tree_attention(self.model)
        self.pact = _within_context(config, lm)
        # One forward a micro-batch on every process, with weight or without: sharded weights need equal counts.
        self.objective = PactObjective(self.pact, forwards=lambda made: 1)
        self.beta = 0.0  # TRL would score every rollout once more; the reference is scored in the branch's own context
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._drawn = (("", 0), 0)  # (mode, optimiser step) of the last batch and how many of that came before it
        self._steps = {"train": 0.0, "eval": 0.0}  # optimiser steps in the sums; evaluation: batches

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the traces with ``remove_unused_columns=True``."""
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns
        if EXPERT not in columns:
            self._signature_columns = [*columns, EXPERT]

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _cuts(self) -> int:
        """Micro-batches in a generation batch; evaluation does not cut it."""
        return (self.args.steps_per_generation or 1) if self.model.training else 1

    # -- generation ---------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollouts as groups. The "samples" that TRL shuffles, splits and keeps are then whole micro-batches."""
        batch = super()._generate_and_score_completions(inputs)
        micro_batches = self._micro_batches(inputs, batch)
        self._attach_logprobs(micro_batches)
        groups = [group for groups in micro_batches for group in groups]
        mine = self.objective.denominators(groups)
        # TRL divides by rollouts that it masks (mask_truncated_completions), too.
        masked = sum(not any(rollout.sampled) for group in groups for rollout in group.rollouts)
        of_masked = {"token": 0.0, "sequence": 1.0, "constant": self.pact.norm_length}[self.pact.loss_norm]
        z_rl, z_sft = self._over_processes(mine.rl + masked * of_masked, mine.sft)
        return {"place": torch.arange(len(micro_batches)), "groups": micro_batches, "z_rl": z_rl, "z_sft": z_sft}

    def _micro_batches(self, inputs: Sequence[dict[str, Any]], batch: dict[str, Tensor]) -> list[MicroBatch]:
        """The samples in their order, cut into micro-batches: one group for each prompt in each of them."""
        generations = self.num_generations if self.model.training else self.num_generations_eval
        first = self.accelerator.process_index * len(inputs)  # TRL's samples lie process after process
        groups: dict[tuple[int, int, tuple[int, ...]], Group] = {}
        rendered: dict[int, tuple[list[int], TokenizedTrace, list[int]] | None] = {}
        traces = overlong = 0
        for i, (prompt_ids, rollout) in enumerate(_samples(batch)):
            prompt, nth = divmod(first + i, generations)
            key = (i * self._cuts // len(inputs), prompt, tuple(prompt_ids))
            if key not in groups:
                if prompt not in rendered:
                    rendered[prompt] = self._render(inputs[i])
                groups[key] = group = _group(prompt_ids, rendered[prompt])
                if nth > 0:
                    group.trace = None  # it counts once: with the first rollout of its prompt, wherever that is
                elif group.trace is not None:
                    traces += 1
                    if _overlong(group, self.pact):
                        overlong += 1
                        group.trace = None
            groups[key].rollouts.append(rollout)
        self._fix_branches([prompt for _, prompt, _ in groups], list(groups.values()))
        traces, overlong = self._over_processes(traces, overlong).tolist()
        if traces:
            self._metrics[self._mode]["trace_overflow"].append(overlong / traces)
        return [[group for (place, _, _), group in groups.items() if place == k] for k in range(self._cuts)]

    def _render(self, row: dict[str, Any]) -> tuple[list[int], TokenizedTrace, list[int]] | None:
        """Ids of the trace as context, the trace as a target and the suffix of the prompt; None without a trace."""
        expert = expert_messages(row.get(EXPERT))
        if expert is None:
            return None
        _check_prompt(row.get("prompt"))
        tokenizer = self._tokenizer
        _, suffix_ids = render_prompt(row["prompt"][-1:], None, tokenizer)
        context_ids = render_context(expert, tokenizer, observations=self.pact.context_observations)
        return context_ids, render_trace(expert, None, tokenizer), suffix_ids

    def _fix_branches(self, prompts: Sequence[int], groups: Sequence[Group]) -> None:
        """One branch for all groups of a prompt, in all micro-batches and on all processes."""
        too_long = [prompt for prompt, group in zip(prompts, groups) if context_overflow(group, self.pact)]
        everywhere = set(gather_object(too_long))
        for prompt, group in zip(prompts, groups):
            if prompt in everywhere:
                group.branch = PROMPT
        stream = random.Random(f"{self.args.seed}/branch/{self._draw()}")
        self.objective.assign_branches(groups, torch.Generator().manual_seed(stream.getrandbits(63)), prompts)

    def _draw(self) -> str:
        """A name for the batch whose branches are drawn: the same in a resumed run, and in every evaluation."""
        now = (self._mode, self.state.global_step)
        self._drawn = (now, self._drawn[1] + 1 if self._drawn[0] == now else 0)
        return f"{self.state.global_step}/{self._drawn[1]}" if self.model.training else f"eval/{self._drawn[1]}"

    def _attach_logprobs(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Fix old and reference log-probs where the objective cannot take them from its own forward."""
        outlives = self.args.gradient_accumulation_steps % (self._cuts * self.num_iterations) != 0
        keeps_old = self.model.training and outlives
        with self.accelerator.autocast(), evaluating(self.model):
            if keeps_old or self.pact.ratio_reference == "behavior":
                for groups in micro_batches:
                    self.objective.attach_logprobs(self.model_wrapped, groups, "old_logp")
            if self.pact.kl_coef > 0:
                with self._reference() as reference:
                    for groups in micro_batches:
                        self.objective.attach_logprobs(reference, groups, "ref_logp")

    @contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        """TRL's reference: a model of its own, or with adapters the base model (the adapter as it was given)."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        adapted = self.accelerator.unwrap_model(self.model)
        with use_adapter(adapted, adapter_name="ref" if "ref" in adapted.peft_config else None):
            yield self.model_wrapped

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **options: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's old log-probs, which only its correction for vLLM still reads; NaN [B, logits_to_keep] elsewhere."""
        if self.use_vllm and self.vllm_importance_sampling_correction:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, **options
            )
        return torch.full((len(input_ids), logits_to_keep), math.nan, device=input_ids.device), None, None

    def _over_processes(self, *numbers: float) -> Tensor:
        """Sums over the processes, float64 on the CPU."""
        mine = torch.tensor(numbers, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(mine, reduction="sum").cpu()

    # -- loss ---------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The micro-batch's share of L, times the number of processes, over which data parallelism averages."""
        (groups,) = inputs["groups"]
        share = 1.0  # of the generation batch that one optimiser step takes
        if self.model.training:
            share = self.current_gradient_accumulation_steps / self._cuts
        denominators = Denominators(share * float(inputs["z_rl"]), share * float(inputs["z_sft"]))
        progress = min(self.state.global_step / max(self.state.max_steps, 1), 1.0)
        # All branches are fixed; a generator of its own leaves TRL's sampling the random numbers it has without PACT.
        batches = self.objective.build(groups, progress, torch.Generator(), denominators)
        (batch,) = batches or self.objective.nothing(1)  # every process takes part in the reduction of gradients
        with self.accelerator.autocast():
            result = self.objective.loss(model, batch)
        if batches:
            add_metrics(self._sums[self._mode], {name: value.detach() for name, value in result.metrics.items()})
        self._steps[self._mode] += 1 / self.current_gradient_accumulation_steps if self.model.training else 1
        return result.loss * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log with the metrics of the objective since the last one, over all processes."""
        mode = self._mode
        if self._steps[mode]:
            sums: dict[str, Tensor] = {}
            mine = {name: value.to("cpu", torch.float64) for name, value in self._sums[mode].items()}
            for theirs in gather_object([mine]):
                add_metrics(sums, theirs)
            flat = flatten_metrics(sums, max(round(self._steps[mode]), 1)) if sums else {}
            for name, value in flat.items():
                self._metrics[mode][name].append(value)
            self._sums[mode], self._steps[mode] = {}, 0.0
        super().log(logs, start_time)


# -- settings ---------------------------------------------------------------------------------------------------------


def merged_config(args: GRPOConfig, config: PactConfig) -> PactConfig:
    """``config`` with all that ``args`` has a name for.

    That is ``temperature``, ``entropy_coef``, ``clip_low`` and ``clip_high`` (``epsilon``, ``epsilon_high``),
    ``clip_dual`` (``delta``), ``kl_coef`` (``beta``) and ``loss_norm`` (``loss_type``: "dapo", "grpo", or "dr_grpo"
    with ``norm_length`` from ``max_completion_length``). So a script's own settings stay in force, and each is in one
    place.

    Raises:
        ValueError: naming every setting of ``args`` that cannot be honoured, and every one of ``config`` that was set
            to something else than ``args`` says.
    """
    wrong = _refused(args, config)
    loss_norm = _LOSS_NORM.get(args.loss_type, config.loss_norm)
    shared: dict[str, tuple[Any, str]] = {
        "temperature": (args.temperature, "temperature"),
        "clip_low": (args.epsilon, "epsilon"),
        "clip_high": (_epsilon_high(args), "epsilon_high"),
        "clip_dual": (args.delta, "delta"),
        "kl_coef": (args.beta, "beta"),
        "entropy_coef": (args.entropy_coef, "entropy_coef"),
        "loss_norm": (loss_norm, "loss_type"),
    }
    if loss_norm == "constant":
        shared["norm_length"] = (float(args.max_completion_length or 0), "max_completion_length")
    default = PactConfig()
    for name, (value, theirs) in shared.items():
        own = getattr(config, name)
        if own not in (value, getattr(default, name)):
            wrong.append(f"PactConfig {name}={own!r} against GRPOConfig {theirs}: leave it out and set {theirs}")
    if wrong:
        raise ValueError("settings that PactGRPOTrainer cannot honour: " + "; ".join(wrong))
    return replace(config, **{name: value for name, (value, _) in shared.items()})


def _epsilon_high(args: GRPOConfig) -> float:
    return float(args.epsilon if args.epsilon_high is None else args.epsilon_high)


def _refused(args: GRPOConfig, config: PactConfig) -> list[str]:
    """What of the settings PACT's loss cannot do, with what to set instead."""
    sampler = args.generation_kwargs if isinstance(args.generation_kwargs, dict) else {}
    rules = [
        (args.loss_type not in _LOSS_NORM, "loss_type", f"set {', '.join(_LOSS_NORM)}"),
        (args.importance_sampling_level != "token", "importance_sampling_level", "set 'token'"),
        (
            args.delta is not None and args.delta < 1 + _epsilon_high(args),
            "delta",
            "set None, or at least 1 + epsilon_high: PACT's dual clip is of negative advantages alone",
        ),
        (args.off_policy_mask_threshold is not None, "off_policy_mask_threshold", "set None"),
        (args.top_entropy_quantile < 1.0, "top_entropy_quantile", "set 1.0"),
        (args.use_adaptive_entropy, "use_adaptive_entropy", "set False and a fixed entropy_coef"),
        (args.entropy_coef != 0 and args.loss_type != "dapo", "entropy_coef", "set 0.0, or loss_type='dapo'"),
        (args.beta != 0 and args.use_bias_correction_kl, "use_bias_correction_kl", "set False, PACT's KL is plain k3"),
        (args.cast_lm_head_to_fp32, "cast_lm_head_to_fp32", "set False, PACT's head computes in float32 anyway"),
        (args.use_liger_kernel, "use_liger_kernel", "set False"),
        (args.torch_compile, "torch_compile", "set False"),
        (args.use_transformers_continuous_batching, "use_transformers_continuous_batching", "set False or use_vllm"),
    ]
    wrong = [f"{name}={getattr(args, name)!r}: {mend}" for refused, name, mend in rules if refused]
    if sampler.get("temperature", args.temperature) != args.temperature:
        wrong.append(f"generation_kwargs temperature={sampler['temperature']!r}: set GRPOConfig temperature instead")
    if config.token_budget is not None:
        wrong.append(f"PactConfig token_budget={config.token_budget}: set per_device_train_batch_size instead")
    return wrong


def _within_context(config: PactConfig, lm: PreTrainedModel) -> PactConfig:
    """``config`` with the model's context length where it sets none; ValueError where it sets a longer one."""
    longest = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if config.context_length is None:
        return replace(config, context_length=longest)
    if longest is not None and config.context_length > longest:
        raise ValueError(f"context_length {config.context_length} is over the model's {longest}: lower it")
    return config


# -- tokenizer --------------------------------------------------------------------------------------------------------


def _tokenizer(model: Any, args: GRPOConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model's folder or repository, loaded as TRL would."""
    options = args.model_init_kwargs if isinstance(model, str) and isinstance(args.model_init_kwargs, dict) else {}
    return AutoTokenizer.from_pretrained(
        model if isinstance(model, str) else model.config._name_or_path,
        revision=options.get("revision"),
        truncation_side="left",
        padding_side="left",
        trust_remote_code=args.trust_remote_code,
    )


@cache
def _shipped_templates() -> set[str]:
    return {path.read_text(encoding="utf-8") for path in (files("pact") / "templates").iterdir()}


def _add_parser(tokenizer: PreTrainedTokenizerBase) -> None:
    """What TRL parses tool calls with. It knows its parsers by the template's text; PACT's templates write Qwen3's."""
    has_own = any(getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema"))
    if has_own or tokenizer.chat_template not in _shipped_templates():
        return
    template, tokenizer.chat_template = tokenizer.chat_template, qwen3_chat_template
    add_response_schema(tokenizer)
    tokenizer.chat_template = template


# -- rows and samples -------------------------------------------------------------------------------------------------


def expert_messages(expert: Sequence[Message] | None) -> list[Message] | None:
    """The messages of a trace as a dataset returns them, without the keys that Arrow filled with null.

    Raises:
        ValueError: a trace that cannot be rendered; null among arguments that are not JSON text, where it may stand for
            an argument that was never given.
    """
    if expert is None:
        return None
    if not isinstance(expert, Sequence) or not all(isinstance(message, dict) for message in expert):
        raise ValueError(f"the trace is {type(expert).__name__} and no list of messages: parse JSON text first")
    messages = [{key: value for key, value in message.items() if value is not None} for message in expert]
    for place, message in enumerate(messages):
        for call in message.get("tool_calls", []):
            arguments = (call.get("function") or call).get("arguments")
            if isinstance(arguments, dict) and _has_null(arguments):
                raise ValueError(
                    f"trace message {place}: an argument of a call is null, as a dataset also fills in where others "
                    "have a value: give the arguments as JSON text (json.dumps)"
                )
    check_trace(messages)
    return messages


def _has_null(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return any(map(_has_null, value.values() if isinstance(value, dict) else value))
    return value is None


def _check_dataset(dataset: Any, name: str) -> None:
    """Check every trace of a dataset that is in memory; those of a stream are checked as they arrive."""
    if isinstance(dataset, dict):
        for split, part in dataset.items():
            _check_dataset(part, f"{name}[{split!r}]")
        return
    columns = getattr(dataset, "column_names", None) or ()
    if columns and EXPERT not in columns:
        logger.warning(f"{name} has no column {EXPERT!r}, only {', '.join(columns)}: there are no traces to train on")
    if not {EXPERT, "prompt"} <= set(columns) or not hasattr(dataset, "__len__"):
        return
    for number, (prompt, expert) in enumerate(zip(dataset["prompt"], dataset[EXPERT])):
        try:
            if expert_messages(expert) is not None:
                _check_prompt(prompt)
        except ValueError as error:
            raise ValueError(f"{name}, row {number}: {error}") from None


def _check_prompt(prompt: Any) -> None:
    """Raises ValueError where a trace has no prompt of messages to follow."""
    if not isinstance(prompt, list):
        raise ValueError(f"the prompt {str(prompt)[:60]!r} has a trace: give it as messages (conversational)")
    checked = check_messages(
        [{key: value for key, value in message.items() if value is not None} for message in prompt], "prompt"
    )
    if checked[-1]["role"] != "user":
        raise ValueError(f"a prompt with a trace ends with a user message, this one with role {checked[-1]['role']!r}")


def _samples(batch: dict[str, Tensor]) -> Iterator[tuple[list[int], Rollout]]:
    """(prompt ids, rollout) of each row of TRL's padded batch."""
    sampled_BT = batch["completion_mask"]
    if "tool_mask" in batch:
        sampled_BT = sampled_BT * batch["tool_mask"]
    correction_BT = batch.get("importance_sampling_ratio")
    if correction_BT is not None:
        correction_BT = correction_BT.expand_as(sampled_BT)
    host: Callable[[Tensor], Tensor] = Tensor.cpu
    prompts, prompt_masks = host(batch["prompt_ids"]), host(batch["prompt_mask"]).bool()
    ids, masks, sampled = host(batch["completion_ids"]), host(batch["completion_mask"]).bool(), host(sampled_BT)
    corrections = None if correction_BT is None else host(correction_BT)
    for i, advantage in enumerate(batch["advantages"].tolist()):
        kept = masks[i]
        yield (
            prompts[i][prompt_masks[i]].tolist(),
            Rollout(
                ids[i][kept].tolist(),
                sampled[i][kept].tolist(),
                [advantage] * int(kept.sum()),
                correction=None if corrections is None else corrections[i][kept].tolist(),
            ),
        )


def _group(prompt_ids: list[int], rendered: tuple[list[int], TokenizedTrace, list[int]] | None) -> Group:
    """The group of a prompt as TRL rendered it, with its trace. ValueError where its end is not what PACT renders."""
    if rendered is None:
        return Group(prompt_ids, [])
    context_ids, trace, suffix_ids = rendered
    head_ids = prompt_ids[: len(prompt_ids) - len(suffix_ids)]
    if prompt_ids[len(head_ids) :] != suffix_ids:
        raise ValueError(
            f"TRL's prompt ends with the ids {prompt_ids[len(head_ids) :]} where PACT's training template has "
            f"{suffix_ids}: leave chat_template_kwargs out, and end the prompt with a user message"
        )
    return Group(head_ids, suffix_ids, context_ids, trace)


def _overlong(group: Group, config: PactConfig) -> bool:
    """Whether prompt and trace do not fit the context."""
    tokens = len(group.head_ids) + len(group.suffix_ids) + (len(group.trace.ids) if group.trace is not None else 0)
    return config.context_length is not None and tokens > config.context_length
