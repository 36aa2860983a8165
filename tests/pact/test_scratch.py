"""New small models: settings, reproducibility and the copying initialisation."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pact.envs.toybox import Toybox
from pact.scratch import copying_attention, new_model


@pytest.fixture(scope="module")
def tokenizer():
    return Toybox().tokenizer()


def test_same_seed_same_model_and_the_tokenizers_ids(tokenizer):
    config = {"hidden_size": 64, "num_hidden_layers": 1}
    one, two, other = (new_model(config, tokenizer, seed, "float32", 0.5) for seed in (3, 3, 4))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.config.vocab_size == len(tokenizer)
    assert one.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_head_copies_what_it_reads(tokenizer, kv_heads):
    """output(value(x)) over all heads is gain x query heads a value head x a projection of x."""
    config = {"hidden_size": 128, "num_hidden_layers": 2, "num_key_value_heads": kv_heads}
    attention = new_model(config, tokenizer, 0, "float32", 0.5).model.layers[1].self_attn
    shared = 4 // kv_heads
    value = attention.v_proj.weight.view(kv_heads, 32, 128).repeat_interleave(shared, dim=0).flatten(0, 1)
    copied = (attention.o_proj.weight @ value).detach()
    assert torch.allclose(copied, copied.T, atol=1e-5)
    eigenvalues = torch.linalg.eigvalsh(copied)
    assert torch.allclose(eigenvalues[-32 * kv_heads :], torch.full((32 * kv_heads,), 0.5 * shared), atol=1e-4)
    assert torch.allclose(eigenvalues[: -32 * kv_heads], torch.zeros(128 - 32 * kv_heads), atol=1e-4)


def test_no_gain_leaves_the_models_own_initialisation(tokenizer):
    attention = new_model({"num_hidden_layers": 1}, tokenizer, 0, "float32", 0.0).model.layers[0].self_attn
    assert not torch.allclose(attention.o_proj.weight, 0.5 * attention.v_proj.weight.T)


def test_a_model_without_such_projections_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    with pytest.raises(ValueError, match="set copy_gain to 0"):
        copying_attention(model, 0.5)
