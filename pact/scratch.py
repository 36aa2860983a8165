"""New small models for the embedded tasks. Large models come from their own folders."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

# What a new model is where its settings name no other value: 4 layers, about one million parameters. With so small a
# width the usual initializer_range of 0.02 starts far too low; 1 / sqrt(hidden_size) keeps activations of order one.
SCRATCH_CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.088,
    "tie_word_embeddings": True,
}


def new_model(
    config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int, dtype: str | torch.dtype, copy_gain: float
) -> PreTrainedModel:
    """A causal LM with random weights, the same for the same arguments.

    ``config``: keys of its transformers config, over SCRATCH_CONFIG and the tokenizer's size and special tokens.
    ``copy_gain``: see ``copying_attention``; 0 leaves the model's own initialisation. Raises ValueError for a model
    that this initialisation does not fit.
    """
    values = {"vocab_size": len(tokenizer)} | SCRATCH_CONFIG | config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values.setdefault(name, getattr(tokenizer, name))
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values), dtype=dtype)
    if copy_gain:
        copying_attention(model, copy_gain)
    return model


@torch.no_grad()
def copying_attention(model: PreTrainedModel, gain: float) -> None:
    """Start every head as a copier: output projection = ``gain`` x transpose of its orthonormal value projection.

    Mimetic initialisation (Trockman and Kolter, arXiv 2305.09828): with tied embeddings a head then raises the logits
    of the tokens it attends to, which trained models do and small random ones are slow to find.
    """
    attentions: list[Any] = [getattr(layer, "self_attn", None) for layer in getattr(model.get_decoder(), "layers", [])]
    if not attentions or not all(hasattr(one, "v_proj") and hasattr(one, "o_proj") for one in attentions):
        raise ValueError("copy_gain needs attention with v_proj and o_proj (Llama, Qwen3): set copy_gain to 0")
    for attention in attentions:
        value_KH, output_HQ = attention.v_proj.weight, attention.o_proj.weight  # K, Q: all key, query heads' widths
        torch.nn.init.orthogonal_(value_KH)
        of_head = value_KH.view(-1, attention.head_dim, value_KH.shape[1])
        shared = output_HQ.shape[1] // value_KH.shape[0]  # query heads that read one value head
        output_HQ.copy_(gain * of_head.repeat_interleave(shared, dim=0).flatten(0, 1).T)
