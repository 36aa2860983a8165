"""Prefix trees through transformers models: tree attention by AttentionInterface, hidden states, LM heads.

Patches no model and computes no loss. A model that a tree would get wrong is refused here, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from pact_kernels import PrefixTree, tree_attention

ATTENTION = "pact_tree"

# Keyword arguments that attention functions receive and that change nothing in a tree pass.
_HARMLESS = {"is_causal", "position_ids", "position_embeddings", "use_cache", "cache_position"}
_LOGIT_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "output_multiplier": 1, "logits_scaling": -1}


class _TreePass:
    """One forward of a tree by a backend of ``tree_attention``, and how many attention layers have seen it.

    No dataclass: FSDP copies dataclasses among the arguments of a layer, and each layer would count on its own copy.
    """

    def __init__(self, tree: PrefixTree, backend: str) -> None:
        self.tree, self.backend, self.n_calls = tree, backend, 0


# Set while a tree's forward runs. Recomputation under activation checkpointing comes later, in backward: it finds the
# pass in the layer's keyword arguments, not here.
_current: ContextVar[_TreePass | None] = ContextVar("pact_tree_pass", default=None)


class _Traced:
    """The same for torch.compile, which cannot trace context variables and takes a thread-local for a constant."""

    tree_pass: _TreePass | None = None


_traced = _Traced()


def _running() -> _TreePass | None:
    return _traced.tree_pass if torch.compiler.is_compiling() else _current.get()


@dataclass(frozen=True)
class Head:
    """An LM head: ``logits = scale * softcap tanh(u / softcap)``, ``u = hidden weight^T + bias``; no cap if None."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def options(self, temperature: float = 1.0) -> dict[str, Any]:
        """Keyword arguments of ``linear_logprob`` and ``linear_cotrain_loss`` beside hidden and weight."""
        return {"bias": self.bias, "softcap": self.softcap, "temperature": temperature / self.scale}


def attach_tree_attention(model: nn.Module) -> None:
    """Let ``model`` take prefix trees, permanently; calling it again does nothing.

    Calls without a tree (generation, evaluation) run exactly as with ``attn_implementation="sdpa"`` afterwards.

    Args:
        model: a transformers causal LM, or a PEFT model around one.

    Raises:
        TypeError: not such a model.
        ValueError: its attention cannot take a tree; the message says why.
    """
    lm = causal_lm(model)
    if lm.config._attn_implementation == ATTENTION:
        return
    reason = _refusal(lm)
    if reason:
        raise ValueError(
            f"{type(lm).__name__} cannot take prefix trees: {reason}. A loop of your own can compute each sequence by "
            "itself, with PactConfig(one_pass=False): the same loss for more tokens"
        )
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _mask)
    lm.set_attn_implementation(ATTENTION)


def compile_layers(model: nn.Module, backend: str = "inductor", mode: str | None = None) -> None:
    """Compile every decoder layer in place, with dynamic shapes: all layers share one graph, for trees of any size.

    Layers, not the model: what wraps it (FSDP2, DDP) stays outside of the graphs, and the LM head and the loss are
    fused operators already. State dicts do not change.

    Raises:
        ValueError: a mode that captures CUDA graphs, which are one a shape; a model without marked layers.
    """
    if mode in ("reduce-overhead", "max-autotune"):
        raise ValueError(
            f"torch_compile_mode {mode} captures a CUDA graph for each shape, and no two trees are alike: take default "
            "or max-autotune-no-cudagraphs"
        )
    layers = [module for module in causal_lm(model).modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(causal_lm(model)).__name__} does not mark its layers: set torch_compile to false")
    # Checkpointing lies inside of the graphs; a layer that is recomputed has been counted (``_TreePass.n_calls``).
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    for layer in layers:
        layer.compile(backend=backend, mode=mode, dynamic=True)


def tree_hidden(model: nn.Module, tree: PrefixTree, backend: str = "auto") -> Tensor:
    """Last hidden states (after the final norm) of every token of ``tree``, [L, H], differentiable.

    ``backend`` is that of ``tree_attention``, which raises where it cannot run.

    Raises:
        RuntimeError: ``attach_tree_attention(model)`` has not been called, or a layer bypasses the tree attention.
        ValueError: a path longer than the model's positions, or attention arguments a tree cannot honour.
    """
    lm = causal_lm(model)
    if lm.config._attn_implementation != ATTENTION:
        raise RuntimeError(
            "tree_hidden needs attach_tree_attention(model) first: stock attention would be silently wrong"
        )
    config = lm.config.get_text_config(decoder=True)
    segments = tree.segments
    _check_length(config, int((segments.depth + segments.end - segments.start).max()))
    tree_pass = _TreePass(tree, backend)
    token, before = _current.set(tree_pass), _traced.tree_pass
    _traced.tree_pass = tree_pass
    try:
        output = _decoder(lm)(
            input_ids=tree.input_ids[None], position_ids=tree.position_ids[None], use_cache=False, pact_tree=tree_pass
        )
    finally:
        _current.reset(token)
        _traced.tree_pass = before
    if tree_pass.n_calls != config.num_hidden_layers:
        raise RuntimeError(
            f"{type(lm).__name__} sent {tree_pass.n_calls} of its {config.num_hidden_layers} layers through the tree "
            "attention; layers that mix tokens in another way cannot take prefix trees"
        )
    return output.last_hidden_state[0]


def dense_hidden(model: nn.Module, sequences: Sequence[Sequence[int] | Tensor]) -> list[Tensor]:
    """Last hidden states of each sequence on its own, a list of [len, H]: one right-padded batch, ordinary attention.

    The explicit way without a tree. Padding needs no mask: under causal attention it lies after every real token. With
    RoPE that depends on the row's length (dynamic, longrope) there is no batch: each sequence is a row of its own.
    """
    lm = causal_lm(model)
    device = lm.device
    rows = [torch.as_tensor(sequence, dtype=torch.int64, device=device) for sequence in sequences]
    config = lm.config.get_text_config(decoder=True)
    _check_length(config, max(row.numel() for row in rows))
    if len(rows) > 1 and _rope_refusal(getattr(config, "rope_parameters", None) or {}):
        return [hidden for row in rows for hidden in dense_hidden(model, [row])]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    hidden_BTH = _decoder(lm)(input_ids=input_ids, use_cache=False).last_hidden_state
    return [hidden_TH[: row.numel()] for hidden_TH, row in zip(hidden_BTH, rows)]


def lm_head(model: nn.Module) -> Head:
    """What ``linear_logprob`` needs of the model's head: weight [V, H], bias, softcap and scale of the logits.

    Raises:
        TypeError: a head that is no plain linear layer (adapters on it, quantised weights).
        ValueError: a head that both scales and caps its logits.
    """
    lm = causal_lm(model)
    head = _linear_head(lm)
    config = lm.config.get_text_config(decoder=True)
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = 1.0
    for name, power in _LOGIT_SCALES.items():
        scale *= (getattr(config, name, None) or 1.0) ** power
    if softcap is not None and scale != 1.0:
        raise ValueError(
            f"the LM head of {type(lm).__name__} scales and caps its logits; only one of them is supported"
        )
    return Head(head.weight, head.bias, softcap, scale)


def vocabulary_size(model: nn.Module) -> int:
    """Rows of the LM head, also where its weight is sharded. Raises TypeError as ``lm_head``."""
    return _linear_head(causal_lm(model)).out_features


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError when the tokenizer has ids that the model has no embedding for, TypeError when its head is no
    plain linear layer."""
    vocabulary_size(model)
    embedding = model.get_input_embeddings()
    rows = cast(nn.Embedding, getattr(embedding, "base_layer", embedding)).num_embeddings  # it may have adapters
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {rows} embeddings: take the tokenizer that "
            "belongs to the model, or call model.resize_token_embeddings"
        )


def _linear_head(lm: PreTrainedModel) -> nn.Linear:
    head = lm.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise TypeError(
            f"the LM head of {type(lm).__name__} is a {type(head).__module__}.{type(head).__name__}, not a plain "
            "linear layer; leave it out of the adapter or quantisation"
        )
    return head


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers causal LM in ``model``: itself, or the base of a PEFT model (its adapters stay active).

    Raises:
        TypeError: anything else, such as a DistributedDataParallel wrapper, whose hooks would be bypassed.
        ValueError: PEFT prompt learning, which changes the sequences themselves.
    """
    if hasattr(model, "get_base_model") and hasattr(model, "active_peft_config"):
        if model.active_peft_config.is_prompt_learning:  # type: ignore[union-attr]
            raise ValueError(
                "PEFT prompt learning adds tokens of its own and cannot take prefix trees; use LoRA or the like"
            )
        model = model.get_base_model()  # type: ignore[operator]
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise TypeError(
            f"expected a transformers causal LM or a PEFT model around one, got {type(model).__name__}; "
            "under a wrapper (DDP, DeepSpeed) call this within the wrapper's forward, as inside_forward does"
        )
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers or PEFT model inside the wrappers of DDP, DeepSpeed and torch.compile."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def inside_forward(model: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
    """``compute()``, run within the forward of ``model``, where DDP, FSDP2 and DeepSpeed have their hooks.

    A model without such hooks is not called at all. Backward must start from the tensor returned here.
    """
    inner = unwrapped(model)
    if model is inner and not isinstance(model, FSDPModule):
        return compute()
    with _forward_replaced(inner, compute):
        return model()


def inside_head(model: nn.Module, hidden: Tensor, compute: Callable[[Tensor, Head], Tensor]) -> Tensor:
    """``compute(hidden, head)``, run within the forward of the LM head: its weight is whole there even if sharded."""
    module = causal_lm(model).get_output_embeddings()
    with _forward_replaced(module, lambda rows: compute(rows, lm_head(model))):
        return module(hidden)


@contextmanager
def _forward_replaced(module: nn.Module, compute: Callable[..., Tensor]) -> Iterator[None]:
    """``compute`` in the place of ``module.forward`` for the next call; within that call the old one is back."""
    own = module.__dict__.get("forward")

    def put_back() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = own

    def once(*args: Any, **kwargs: Any) -> Tensor:
        put_back()
        return compute(*args, **kwargs)

    module.forward = once
    try:
        yield
    finally:
        put_back()


def compute_device(model: nn.Module) -> torch.device:
    """Where ``model`` computes; its parameters may be kept elsewhere (FSDP2 with CPU offload)."""
    parameter = next(unwrapped(model).parameters())
    if isinstance(parameter, DTensor):
        kind = parameter.device_mesh.device_type
        return torch.device(kind, 0 if kind == "cpu" else torch.accelerator.current_device_index())
    return parameter.device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode (no dropout), and back in its own after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _decoder(lm: PreTrainedModel) -> nn.Module:
    decoder = lm.get_decoder()
    if decoder is lm:
        raise TypeError(f"{type(lm).__name__} has no inner model without the head")
    return decoder


def _check_length(config: Any, longest: int) -> None:
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"a sequence has {longest} tokens but the model's max_position_embeddings is {limit}; shorten it"
        )


def _refusal(lm: PreTrainedModel) -> str | None:
    """Why a tree would be wrong for this model, or None. What a config does not show is caught when the tree runs."""
    config = lm.config.get_text_config(decoder=True)
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        return "cross-attention has no place in the tree"
    if not lm._can_set_attn_implementation():
        return "its attention is not routed through transformers' AttentionInterface"
    other_layers = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if other_layers:
        return f"it has layers of type {', '.join(other_layers)}; only full_attention sees whole paths"
    recurrent = {type(m).__name__ for m in _decoder(lm).modules() if isinstance(m, (nn.Conv1d, nn.RNNBase))}
    if recurrent:
        return f"it mixes neighbouring tokens by {', '.join(sorted(recurrent))} (linear attention or state space)"
    if _window_in_force(config, getattr(config, "sliding_window", None)):
        return (
            f"its attention slides over {config.sliding_window} tokens; load it with sliding_window=None to lift that"
        )
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps attention logits (attn_logit_softcapping)"
    if any(name.rpartition(".")[2] == "sinks" for name, _ in lm.named_parameters()):
        return "it has attention sinks"
    dropout = max(getattr(config, name, None) or 0.0 for name in ("attention_dropout", "attn_pdrop"))
    if dropout > 0:
        return f"it drops out attention ({dropout}) in training; load it with attention_dropout=0"
    return _rope_refusal(getattr(config, "rope_parameters", None) or {})


def _window_in_force(config: Any, window: int | None) -> bool:
    """Whether some path that fits the model would be cut by the window."""
    if window is None or not getattr(config, "use_sliding_window", True):
        return False
    return window < getattr(config, "max_position_embeddings", float("inf"))


def _rope_refusal(rope: dict) -> str | None:
    """RoPE whose frequencies depend on the longest position of the row would differ between tree and sequence."""
    for parameters in (rope, *rope.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") in ("dynamic", "longrope"):
            return f"its RoPE is {parameters['rope_type']}: it depends on the length of the row; use yarn or default"
    return None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Mask of our attention: none for a tree (no [L, L] tensor), that of sdpa otherwise."""
    return None if _running() is not None else sdpa_mask(*args, **kwargs)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    pact_tree: _TreePass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of the model: query [1, Hq, L, D], key and value [1, Hkv, L, D] -> [1, L, Hq, D]."""
    tree_pass = _running()
    if pact_tree is None:
        if tree_pass is not None:
            raise RuntimeError(
                f"{type(module).__name__} does not pass keyword arguments on, so the tree cannot reach it"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if tree_pass is not None:
        tree_pass.n_calls += 1
    scale = kwargs.pop("scaling", None)
    _check_arguments(module, attention_mask, kwargs)
    q_LHD, k_LHD, v_LHD = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return tree_attention(q_LHD, k_LHD, v_LHD, pact_tree.tree, scale=scale, backend=pact_tree.backend)[None], None


def _check_arguments(module: nn.Module, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Refuse whatever the model asks of its attention beyond causal softmax."""
    arguments = {name: value for name, value in kwargs.items() if value is not None and name not in _HARMLESS}
    if attention_mask is not None:
        arguments["attention_mask"] = attention_mask
    if not arguments.get("dropout", 1.0):
        del arguments["dropout"]
    if "sliding_window" in arguments and not _window_in_force(module.config, arguments["sliding_window"]):
        del arguments["sliding_window"]
    if arguments.get("output_attentions") is False:
        del arguments["output_attentions"]
    if kwargs.get("is_causal") is False:
        arguments["is_causal"] = False
    if arguments:
        raise ValueError(
            f"{type(module).__name__} asks its attention for {', '.join(arguments)}; a prefix tree cannot do that"
        )
