"""PACT inside verl 0.9: the loss of its actor, the rows that carry the expert trace, log-probs without logits.

Tensors and token ids only; what subclasses verl is `pact.integrations.verl_plugin`, verl itself is imported where used.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pact.groups import Denominators, Group, PactConfig, branch_weights, supervised_components, term_weights
from pact.modeling import Head, inside_head
from pact.schedules import check_progress, linear, reasoning_weights
from pact.trace import Component
from pact_kernels import CoTrainResult, TokenTerms, cotrain_loss, linear_logprob
from pact_kernels.terms import PROMPT_BRANCH, RL, SFT, TRACE_BRANCH

# Columns of a row, one value a response token, beside verl's own. A batch without them is plain RL.
WEIGHT = "pact_weight"  # float: share of the row's branch on sampled tokens; annealed weight on supervised ones
SUPERVISED = "pact_supervised"  # 1: a token of the expert trace that counts in Z_sft
TRACE_CONTEXT = "pact_trace"  # 1: the row was scored with the trace in context
COLUMNS = (WEIGHT, SUPERVISED, TRACE_CONTEXT)
Z_RL, Z_SFT = "pact_z_rl", "pact_z_sft"  # denominators of the optimiser step over all processes, numbers of the batch

_KL_TYPES = ("k3", "low_var_kl")
_AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


@dataclass(frozen=True)
class ActorLoss:
    """What of verl's ``ActorConfig`` the loss reads.

    Args:
        clip_low, clip_high: ``clip_ratio_low``, ``clip_ratio_high``; each defaults to ``clip_ratio``.
        clip_dual: ``clip_ratio_c``: how far up the ratio of a token with negative advantage may go.
        kl_coef: ``kl_loss_coef`` with ``use_kl_loss``, else 0.
        entropy_coef: ``entropy_coeff``.
        aggregation: ``loss_agg_mode``, in verl's words.
        scale: ``loss_scale_factor``, tokens a sequence counts for under "seq-mean-token-sum-norm".
        backend: of `pact_kernels.cotrain_loss`.

    Raises:
        ValueError: an aggregation that does not exist, or that lacks its scale.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    aggregation: str = "token-mean"
    scale: float | None = None
    backend: str = "auto"
    clip_dual: float | None = None

    def __post_init__(self) -> None:
        if self.aggregation not in _AGGREGATIONS:
            raise ValueError(f"loss_agg_mode={self.aggregation!r} is not one of {', '.join(_AGGREGATIONS)}")
        if self.aggregation == "seq-mean-token-sum-norm" and not self.scale:
            raise ValueError(
                "loss_agg_mode=seq-mean-token-sum-norm needs actor.loss_scale_factor: without it the divisor is the "
                "widest response of each micro-batch, and the loss depends on how the batch was cut"
            )

    @classmethod
    def of(cls, config: Any, aggregation: str | None = None) -> ActorLoss:
        """The settings of a verl ``ActorConfig``; ValueError for a KL estimate other than k3."""
        use_kl = config.get("use_kl_loss", False)
        if use_kl and config.kl_loss_type not in _KL_TYPES:
            raise ValueError(f"kl_loss_type={config.kl_loss_type!r}: PACT's KL is k3, set it to low_var_kl or k3")
        clip = config.clip_ratio
        return cls(
            clip_low=clip if config.clip_ratio_low is None else config.clip_ratio_low,
            clip_high=clip if config.clip_ratio_high is None else config.clip_ratio_high,
            clip_dual=config.get("clip_ratio_c", 3.0),  # verl's own default
            kl_coef=config.kl_loss_coef if use_kl else 0.0,
            entropy_coef=config.entropy_coeff,
            aggregation=aggregation or config.loss_agg_mode,
            scale=config.get("loss_scale_factor", None),
        )


# ---- the loss ---------------------------------------------------------------------------------------------------


def count_denominators(columns: Mapping[str, Tensor], settings: ActorLoss) -> Denominators:
    """Z and Z_sft of padded rows [B, T]; add those of all micro-batches and processes of the optimiser step.

    Z counts each rollout once, whatever its branch: sampled tokens ("token-mean"), sequences (x ``scale`` in "-norm"),
    and is 1 in "token-sum". Z_sft counts the trace tokens that are supervised before annealing.
    """
    mask_BT, share_BT = _mask(columns), _column(columns, WEIGHT, 1.0)
    if settings.aggregation == "token-mean":
        rl = float((mask_BT * share_BT).double().sum())
    else:
        tokens_B = mask_BT.sum(1)
        rl = float(((mask_BT * share_BT).double().sum(1) / tokens_B.clamp(min=1)).sum())
        rl *= (settings.scale or 1.0) if settings.aggregation == "seq-mean-token-sum-norm" else 1.0
    return Denominators(rl, float(_column(columns, SUPERVISED, 0.0).sum()))


def padded_loss(
    log_prob: Tensor,
    columns: Mapping[str, Tensor],
    denominators: Denominators,
    settings: ActorLoss,
    entropy: Tensor | None = None,
) -> CoTrainResult:
    """PACT's loss of padded rows, as a share of the whole optimiser step's (DESIGN section 1).

    Args:
        log_prob: [B, T] float32 or float64, log-probs of the response tokens in each row's own context.
        columns: [B, T] each: ``response_mask`` (1 = sampled), ``old_log_probs``, ``advantages``; ``ref_log_prob`` where
            ``settings.kl_coef`` > 0; ``rollout_is_weights``, verl's correction for the rollout engine, or absent; and
            PACT's own `COLUMNS`, absent for plain RL.
        denominators: of the optimiser step (`count_denominators`, added up).
        settings: see `ActorLoss`.
        entropy: [B, T] like log_prob; needed where ``settings.entropy_coef`` is not 0.

    Returns:
        The loss, to be added up over micro-batches and processes, and metrics (sums).

    Raises:
        ValueError: rows that have tokens but no denominator, trace-conditioned rows with the correction of another
            context, missing columns.
    """
    mask_BT = _mask(columns)
    supervised_BT = (_column(columns, SUPERVISED, 0.0) > 0) & ~mask_BT
    weight_BT = _column(columns, WEIGHT, 1.0).to(log_prob.dtype)
    chosen_BT = mask_BT | (supervised_BT & (weight_BT > 0))
    for name, what_BT, z in (("rl", mask_BT, denominators.rl), ("sft", supervised_BT, denominators.sft)):
        if settings.aggregation != "token-sum" and z <= 0 and bool(what_BT.any()):
            raise ValueError(f"denominators.{name}={z} but there are {name} tokens: sum it over the whole step")
    rl_weight_BT = weight_BT / _rl_divisor(mask_BT, denominators.rl, settings)
    trace_BT = _column(columns, TRACE_CONTEXT, 0.0) > 0
    advantage_BT = columns["advantages"].to(log_prob.dtype)
    if columns.get("rollout_is_weights") is not None:
        if bool((trace_BT & mask_BT).any()):
            raise ValueError(
                "rollout_is_weights compare old log-probs with the sampler's, but trace-conditioned rows have another "
                "context than the sampler had: leave algorithm.rollout_correction.rollout_is unset, or take anchor_q=1"
            )
        advantage_BT = advantage_BT * columns["rollout_is_weights"].to(log_prob.dtype)
    ref = columns.get("ref_log_prob")
    if settings.kl_coef > 0 and ref is None:
        raise ValueError("use_kl_loss needs ref_log_prob: let verl compute the reference (actor.use_kl_loss=True)")
    kind_BT = torch.where(mask_BT, RL, SFT)
    terms = TokenTerms(
        target=torch.zeros_like(kind_BT[chosen_BT]),  # the log-probs are known
        old_logp=columns["old_log_probs"].to(log_prob.dtype)[chosen_BT],
        advantage=advantage_BT[chosen_BT],
        weight=torch.where(mask_BT, rl_weight_BT, weight_BT / max(denominators.sft, 1.0))[chosen_BT],
        kind=kind_BT[chosen_BT],
        ref_logp=None if ref is None else ref.to(log_prob.dtype)[chosen_BT],
        branch=torch.where(trace_BT, TRACE_BRANCH, PROMPT_BRANCH)[chosen_BT],
    )
    return cotrain_loss(
        log_prob[chosen_BT],
        terms,
        entropy=None if entropy is None else entropy.to(log_prob.dtype)[chosen_BT],
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        clip_dual=settings.clip_dual,
        kl_coef=settings.kl_coef,
        entropy_coef=settings.entropy_coef,
        backend=settings.backend,
    )


def _rl_divisor(mask_BT: Tensor, z: float, settings: ActorLoss) -> Tensor | float:
    """What the weight of a sampled token is divided by."""
    if settings.aggregation == "token-sum":
        return 1.0
    if settings.aggregation == "seq-mean-token-mean":
        return mask_BT.sum(1, keepdim=True).clamp(min=1) * max(z, 1e-30)
    return max(z, 1e-30)


def _mask(columns: Mapping[str, Tensor]) -> Tensor:
    return columns["response_mask"].bool()


def _column(columns: Mapping[str, Tensor], name: str, absent: float) -> Tensor:
    value = columns.get(name)
    return torch.full_like(columns["response_mask"], absent, dtype=torch.float32) if value is None else value


# ---- in verl's signatures ---------------------------------------------------------------------------------------


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The RL term as one of verl's policy losses (`register`): PACT's clip, with ``clip_ratio_c`` as its dual clip.

    verl hands a policy loss neither supervised rows nor branch weights, and adds KL and entropy itself: this is all
    that ``anchor_mode="sample"`` with ``sft_coef=0`` needs. The whole of PACT is `actor_loss`.
    """
    info = config.global_batch_info
    scale = info.get("loss_scale_factor") or response_mask.shape[-1]  # verl's own default
    options = ActorLoss.of(config)
    settings = ActorLoss(
        options.clip_low,
        options.clip_high,
        clip_dual=options.clip_dual,
        aggregation=loss_agg_mode,
        scale=scale,
    )
    columns = {"response_mask": response_mask, "old_log_probs": old_log_prob, "advantages": advantages}
    if rollout_is_weights is not None:
        columns["rollout_is_weights"] = rollout_is_weights
    total = info.get("batch_num_tokens" if loss_agg_mode == "token-mean" else "global_batch_size")
    if total is None:
        if info.get("dp_size", 1) > 1:
            raise ValueError("global_batch_info lacks the size of the global batch, which dp_size > 1 needs")
        z = count_denominators(columns, settings)
    else:
        z = Denominators(float(total) * (scale if loss_agg_mode == "seq-mean-token-sum-norm" else 1.0))
    result = padded_loss(log_prob, columns, z, settings)
    tokens = response_mask.sum().clamp(min=1)
    moved = ((old_log_prob - log_prob.detach()) * response_mask).sum() / tokens
    clipped = result.metrics["clipped"].sum() / tokens
    limit = math.inf if options.clip_dual is None else options.clip_dual
    bad = (advantages < 0) & ((log_prob.detach() - old_log_prob).exp() > limit)
    dual = (bad * response_mask).sum() / tokens
    return result.loss * info.get("dp_size", 1), {
        "actor/pg_clipfrac": (clipped - dual).item(),
        "actor/pg_clipfrac_lower": dual.item(),  # verl's name for the dual clip
        "actor/ppo_kl": moved.item(),
    }


def actor_loss(
    config: Any, model_output: Mapping[str, Tensor], data: Any, dp_group: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """PACT's whole loss where verl's engines call ``verl.workers.utils.losses.ppo_loss``; same signature.

    Args:
        config: verl's ``ActorConfig`` (clip, KL, entropy, aggregation).
        model_output: ``log_probs`` and perhaps ``entropy`` of a micro-batch, every position of every row.
        data: the micro-batch, with `COLUMNS`, `Z_RL` and `Z_SFT`; `pact.integrations.verl_plugin.PactTrainingWorker`
            counts the last two, once for each optimiser step.

    Raises:
        RuntimeError: no denominators.
        ValueError: see `padded_loss`.
    """
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.padding import no_padding_2_padding

    if Z_RL not in data:
        raise RuntimeError(
            f"the batch has no {Z_RL}: train with the trainer pact_sync, whose worker counts them "
            "(trainer.v1.trainer_mode=pact_sync)"
        )
    settings = ActorLoss.of(config)
    log_prob = no_padding_2_padding(model_output["log_probs"], data)
    entropy = model_output.get("entropy")
    if entropy is not None:
        entropy = no_padding_2_padding(entropy, data)
    columns = padded_columns(data)
    denominators = Denominators(data[Z_RL], data[Z_SFT])
    result = padded_loss(log_prob, columns, denominators, settings, entropy)
    dp_size = data["dp_size"]
    sums = _metrics(result, denominators)
    # Every value is a share of the step's, so micro-batches add; verl takes the mean over processes.
    metrics = {name: Metric(AggregationType.SUM, value * dp_size) for name, value in sums.items()}
    return result.loss * dp_size, metrics


def padded_columns(data: Any) -> dict[str, Tensor]:
    """The [B, T] columns that the loss reads, from a verl batch whose columns are nested or padded.

    A row whose PACT columns are not as long as its response is one that verl copied to fill a batch: it weighs nothing.
    """
    names = ("response_mask", "old_log_probs", "advantages", "ref_log_prob", "rollout_is_weights", *COLUMNS)
    present = {name: data[name] for name in names if name in data}
    mask = present["response_mask"]
    if not mask.is_nested:
        return present
    length_B = mask.offsets().diff()
    shape = (length_B.numel(), int(length_B.max()))
    columns = {}
    for name, value in present.items():
        if not value.is_nested:  # rows of one length are stacked, not nested
            value = torch.nested.as_nested_tensor(list(value), layout=torch.jagged)
        own_B = value.offsets().diff()
        rows = [row if n == m else row.new_zeros(n) for row, n, m in zip(value.unbind(), length_B, own_B)]
        columns[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)[:, : shape[1]]
    return columns


def _metrics(result: CoTrainResult, z: Denominators) -> dict[str, float]:
    """Scalars of one micro-batch, each a share of the optimiser step's."""
    sums = {name: value.sum(2) for name, value in result.metrics.items()}  # [kind, branch]
    rl, sft = max(float(z.rl), 1.0), max(float(z.sft), 1.0)
    return {
        "pact/rl_loss": sums["loss"][RL].sum().item(),
        "pact/rl_loss_trace": sums["loss"][RL, TRACE_BRANCH].item(),
        "pact/sft_loss": sums["loss"][SFT].sum().item(),
        "pact/kl": sums["kl"][RL].sum().item() / rl,
        "pact/clipped": sums["clipped"][RL].sum().item() / rl,
        "pact/sft_nll": -sums["logp"][SFT].sum().item() / sft,
        "pact/trace_share": sums["tokens"][RL, TRACE_BRANCH].item() / rl,
    }


def register(name: str = "pact") -> None:
    """Register `policy_loss` with verl: ``actor_rollout_ref.actor.policy_loss.loss_mode=pact``."""
    importlib.import_module("verl.trainer.ppo.core_algos").register_policy_loss(name)(policy_loss)


# ---- rows -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One sequence of verl's batch: ``prompt_ids`` then ``response_ids``; lists over the response below.

    ``mask``: 1 on sampled tokens; all 0 on an expert row, whose tokens verl's RL machinery thus leaves out.
    ``columns``: `COLUMNS`.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    mask: list[int]
    columns: dict[str, list[float]] = field(default_factory=dict)


def rollout_rows(group: Group, config: PactConfig, draw: float) -> list[Row]:
    """The rows of a prompt's rollouts under each branch that is computed, prompt-only ones last.

    ``draw`` in [0, 1) decides where the branch is left to chance: the same for all rollouts of a prompt.
    """
    rows = []
    shares = branch_weights(group, config, draw)
    for rollout in group.rollouts:
        for branch in sorted(shares, reverse=True):  # "trace" before "prompt": verl takes a session's last row as final
            trace = branch == "trace"
            prompt = [*group.head_ids, *((group.context_ids or []) if trace else []), *group.suffix_ids]
            columns = {
                WEIGHT: [shares[branch] if sampled else 0.0 for sampled in rollout.sampled],
                SUPERVISED: [0.0] * len(rollout.ids),
                TRACE_CONTEXT: [float(trace)] * len(rollout.ids),
            }
            rows.append(Row(prompt, list(rollout.ids), [int(bool(sampled)) for sampled in rollout.sampled], columns))
    return rows


def expert_row(group: Group, config: PactConfig, progress: float) -> Row | None:
    """The trace as a row of the supervised term, with the annealed weights of ``progress``; None without a trace.

    The weight holds ``sft_coef`` and the annealing (`pact.schedules`); the loss divides it by Z_sft.

    Raises ValueError for settings that verl's batch cannot carry.
    """
    check_progress(progress)
    check_config(config)
    trace = group.trace
    if trace is None or config.sft_coef == 0 or len(trace.ids) < 2:  # one token: as long as a row verl fills up with
        return None
    component = np.asarray(trace.component)
    weight = reasoning_weights(
        np.where(component == Component.REASONING, trace.segment, -1), progress, config.reasoning_anneal
    )
    weight[component == Component.TOOL_CALL] = linear(*config.tool_call_weight, progress)
    weight[component == Component.ANSWER] = config.answer_weight
    weight *= term_weights(config, progress)[1]
    supervised = np.isin(component, supervised_components(config)).astype(float)
    n = len(trace.ids)
    columns = {WEIGHT: weight.tolist(), SUPERVISED: supervised.tolist(), TRACE_CONTEXT: [0.0] * n}
    return Row([*group.head_ids, *group.suffix_ids], list(trace.ids), [0] * n, columns)


def check_config(config: PactConfig) -> None:
    """Refuse settings of the objective that verl's batch cannot carry; the message names what to set instead."""
    if config.sft_token_weight != "none":
        raise ValueError(f"sft_token_weight={config.sft_token_weight!r} is not available under verl: use none")
    if config.sft_schedule != "constant":
        raise ValueError(f"sft_schedule={config.sft_schedule!r} is not available under verl: use constant")
    if config.ratio_reference != "trace":
        raise ValueError(
            "ratio_reference='behavior' is verl's own algorithm.rollout_correction.bypass_mode=True, which takes the "
            "sampler's log-probs as old ones: set that, and leave ratio_reference at trace"
        )


# ---- log-probs without logits -----------------------------------------------------------------------------------


def head_log_probs(
    model: nn.Module, hidden: Tensor, labels: Tensor, temperature: float = 1.0, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Log-probs of ``labels`` [...] and entropies under the LM head of ``model``, from hidden states [..., H].

    float32 (float64 for float64 inputs), whatever the dtype of the hidden states. Runs within the head's forward, where
    FSDP2 has its weight whole, and heeds a head's bias, scale and softcap.
    """

    def of_head(rows: Tensor, head: Head) -> Tensor:
        options = head.options(temperature)
        out = linear_logprob(rows, head.weight, labels.reshape(-1), entropy=True, backend=backend, **options)
        assert out.entropy is not None
        return torch.stack([out.logp, out.entropy])

    logp, entropy = inside_head(model, hidden.reshape(-1, hidden.shape[-1]), of_head)
    return logp.view(labels.shape), entropy.view(labels.shape)


def patch_fused_head(backend: str = "auto") -> Callable[[], None]:
    """Put `head_log_probs` in the place of verl's fused torch head for text models; call before models are built.

    verl takes that way with ``actor_rollout_ref.model.use_fused_kernels=True`` and
    ``actor_rollout_ref.model.fused_kernel_options.impl_backend=torch``; logits are then never formed.

    Returns:
        A function that lets models built later have verl's own again.
    """
    module: Any = importlib.import_module("verl.models.transformers.dense_common")
    before = module.forward_with_torch_backend

    def forward_with_pact_head(
        self: nn.Module,
        input_ids: Tensor,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        temperature: float = 1.0,
        return_dict: bool | None = True,
        **inputs: Any,
    ) -> Any:
        hidden = module.forward_base_model(self, input_ids=input_ids, **inputs)[0]
        if shift_labels is None:
            shift_labels = torch.roll(input_ids if labels is None else labels, shifts=-1, dims=-1)
        log_probs, entropy = head_log_probs(self, hidden, shift_labels, temperature, backend)
        return module.CausalLMOutputForPPO(log_probs=log_probs, entropy=entropy)

    module.forward_with_torch_backend = forward_with_pact_head  # verl imports it anew for each model

    def undo() -> None:
        module.forward_with_torch_backend = before

    return undo


def group_of(head_ids: Sequence[int], suffix_ids: Sequence[int], prompt_ids: Sequence[int], **options: Any) -> Group:
    """A group whose prompt is the one the rollout engine was given; ValueError where the two renderings differ."""
    if [*head_ids, *suffix_ids] != list(prompt_ids):
        raise ValueError(
            f"verl rendered a prompt of {len(prompt_ids)} tokens that PACT's training template renders as "
            f"{len(head_ids) + len(suffix_ids)} others: pass the same template and tools "
            "(actor_rollout_ref.model.custom_chat_template, multi_turn.tool_config_path)"
        )
    return Group(list(head_ids), list(suffix_ids), **options)
