"""Opening a session takes the memory of its cache, not of logits over whole prompts or of all prompts at once."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pact.engines import transformers as engine
from pact.rollout import Sampling


def test_prompts_are_computed_in_bounded_forwards(monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 100)
    config = Qwen3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    bodies, heads = [], []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: bodies.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    model.lm_head.register_forward_pre_hook(lambda module, args: heads.append(args[0].shape[:2]))
    lengths = [3, 250, 40, 40, 40, 26, 9, 3, 60, 1]
    prompts = [[(7 * row + place) % 61 for place in range(length)] for row, length in enumerate(lengths)]
    sampler = engine.TransformersEngine(model)
    session = sampler.open(prompts, stop_id=0, sampling=Sampling(), seeds=range(len(prompts)))
    cached = [length - 1 for length in lengths if length > 1]
    assert sum(rows for rows, _ in bodies) == len(cached)
    assert all(rows == 1 or rows * width <= 100 for rows, width in bodies)
    assert [width for _, width in bodies] == sorted((width for _, width in bodies), reverse=True)
    assert all(positions == 1 for _, positions in heads)  # never logits of a whole prompt
    [layer, _] = session.cache.prompt_layers
    assert layer.prompt_keys.shape == (len(prompts), 2, 249, 8)
    bodies.clear()
    session.generate({0: [5] * 500}, {0: 1})
    assert all(positions == 1 for _, positions in heads)
    assert bodies == [(1, 500), (1, 1)]
