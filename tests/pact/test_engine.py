"""The transformers engine against full-sequence forwards and against transformers' own generate."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pact.engines import prompt_cache, transformers
from pact.engines.transformers import TransformersEngine, sample_tokens
from pact.modeling import attach_tree_attention
from pact.rollout import GREEDY, Sampling

VOCAB, STOP = 61, 7


def make_model(architecture="qwen3"):
    """Two layers with weights large enough that distributions are peaked and contexts matter."""
    kind, settings = {"qwen3": (Qwen3ForCausalLM, Qwen3Config), "llama": (LlamaForCausalLM, LlamaConfig)}[architecture]
    config = settings(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=STOP,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return kind(config)


def full_logp(model, context, ids, temperature=1.0):
    """Log-probs of ``ids`` after ``context`` by one forward of the whole sequence with stock sdpa."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + ids])).logits[0, len(context) - 1 : -1]
    return (logits.float() / temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()


def complete(session, append, limits):
    """Call generate until every row named in ``limits`` has ended."""
    completions = session.generate(append, limits)
    assert completions
    while len(completions) < len(limits):
        later = session.generate({}, {})
        assert later
        assert not later.keys() & completions.keys()
        completions |= later
    return completions


def play(model, prompts, turns, *, sampling=Sampling(), seeds=None, max_new=12):  # noqa: B008
    """Several turns with ragged observations. Returns per row the list of (context before the turn, completion)."""
    seeds = list(range(len(prompts))) if seeds is None else seeds
    rng_of = {row: np.random.default_rng(seeds[row]) for row in range(len(prompts))}
    session = TransformersEngine(model).open(prompts, stop_id=STOP, sampling=sampling, seeds=seeds)
    contexts = {row: list(prompt) for row, prompt in enumerate(prompts)}
    history = {row: [] for row in contexts}
    limits, ready, going = {}, dict.fromkeys(contexts, 0), set()
    while ready or going:
        append, new_limits = {}, {}
        for row, turn in ready.items():
            rng = rng_of[row]
            new_limits[row] = int(rng.integers(1, max_new + 1))
            append[row] = rng.integers(0, VOCAB, int(rng.integers(0, 9))).tolist() if turn else []
            contexts[row] += append[row]
        limits |= new_limits
        going |= ready.keys()
        completions = session.generate(append, new_limits)
        assert completions
        for row, completion in completions.items():
            history[row].append((list(contexts[row]), completion))
            contexts[row] += completion.ids
            assert 1 <= len(completion.ids) == len(completion.logp) <= limits[row]
            assert STOP not in completion.ids[:-1]
            assert completion.finished == (completion.ids[-1] == STOP)
            assert completion.finished or len(completion.ids) == limits[row]
        going -= completions.keys()
        # Rows leave at different turns, as episodes do.
        ready = {row: len(history[row]) for row in completions if len(history[row]) < turns - seeds[row] % 3}
    session.close()
    return history


def ragged_prompts(n_groups=3, n=4, seed=0):
    rng = np.random.default_rng(seed)
    groups = [rng.integers(0, VOCAB, int(rng.integers(2, 40))).tolist() for _ in range(n_groups)]
    return [prompt for prompt in groups for _ in range(n)]


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_full_forward_over_many_turns(architecture, temperature):
    model = make_model(architecture)
    history = play(model, ragged_prompts(), 6, sampling=Sampling(temperature))
    n_turns = 0
    for turns in history.values():
        for context, completion in turns:
            expected = full_logp(model, context, completion.ids, temperature)
            np.testing.assert_allclose(completion.logp, expected, rtol=0, atol=1e-5)
            n_turns += 1
    assert n_turns == 5 * 12


def test_cache_growth_and_chunked_feeds(monkeypatch):
    monkeypatch.setattr(prompt_cache, "FIRST_CAPACITY", 2)
    monkeypatch.setattr(transformers, "SCORE_ELEMENTS", 4 * 12 * 3 * 20)
    monkeypatch.setattr(transformers, "PREFILL_TOKENS", 30)
    model = make_model()
    for turns in play(model, ragged_prompts(), 5).values():
        for context, completion in turns:
            np.testing.assert_allclose(completion.logp, full_logp(model, context, completion.ids), rtol=0, atol=1e-5)


def test_one_token_prompts():
    model = make_model()
    for prompts in ([[3], [3], [5]], [[3], [4, 5, 6, 8]]):
        for turns in play(model, prompts, 3).values():
            for context, completion in turns:
                np.testing.assert_allclose(completion.logp, full_logp(model, context, completion.ids), atol=1e-5)


def test_greedy_equals_transformers_generate():
    model = make_model()
    prompts = ragged_prompts(5, 1)
    session = TransformersEngine(model).open(prompts, stop_id=STOP, sampling=GREEDY, seeds=[0] * 5)
    completions = complete(session, {}, dict.fromkeys(range(5), 30))
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)[0]
        assert prompt + completions[row].ids == expected.tolist()
        np.testing.assert_allclose(completions[row].logp, full_logp(model, prompt, completions[row].ids), atol=1e-5)


def test_a_row_does_not_depend_on_its_batch():
    model = make_model()
    prompts = ragged_prompts(3, 4)
    together = play(model, prompts, 5, seeds=list(range(12)))
    chosen = [7, 2, 11, 6]
    apart = play(model, [prompts[row] for row in chosen], 5, seeds=chosen)
    for place, row in enumerate(chosen):
        assert len(apart[place]) == len(together[row])
        for (_, one), (_, other) in zip(apart[place], together[row]):
            assert one.ids == other.ids
            np.testing.assert_allclose(one.logp, other.logp, atol=1e-5)


def test_rows_of_one_prompt_differ_and_seeds_repeat():
    model = make_model()
    prompts = [[3, 1, 4, 1, 5]] * 6
    first, again = play(model, prompts, 1), play(model, prompts, 1)
    other = play(model, prompts, 1, seeds=[10, 11, 12, 13, 14, 15])
    ids = [[completion.ids for _, completion in turns] for turns in first.values()]
    assert ids == [[completion.ids for _, completion in turns] for turns in again.values()]
    assert ids != [[completion.ids for _, completion in turns] for turns in other.values()]
    assert len({str(row) for row in ids}) > 3


def test_tokens_are_drawn_with_their_probabilities():
    logits = torch.tensor([[2.0, -torch.inf, 0.5, 1.0, -3.0]])
    n = 40_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    ids, logp = sample_tokens(logits.expand(n, -1), uniform, Sampling(0.5))
    expected = torch.softmax(logits[0] / 0.5, -1)
    torch.testing.assert_close(torch.bincount(ids, minlength=5) / n, expected, rtol=0, atol=2 / n)
    torch.testing.assert_close(logp, expected.log()[ids])
    # The nucleus of 0.8 is the fewest most probable tokens whose mass reaches 0.8; logp stays that of the softmax.
    probs = torch.softmax(logits[0], -1)
    ids, logp = sample_tokens(logits.expand(n, -1), uniform, Sampling(1.0, top_p=0.8))
    kept = torch.zeros(5)
    kept[[0, 3]] = probs[[0, 3]] / probs[[0, 3]].sum()
    torch.testing.assert_close(torch.bincount(ids, minlength=5) / n, kept, rtol=0, atol=2 / n)
    torch.testing.assert_close(logp, probs.log()[ids])


def test_extreme_uniforms_never_give_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).expand(2, -1)
    ids, _ = sample_tokens(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), Sampling())
    assert ids.tolist() == [1, 3]


def test_the_model_is_left_as_it_was():
    model = make_model().train()
    model.model.layers[0].eval()
    attach_tree_attention(model)
    modes = [module.training for module in model.modules()]
    implementation = model.config._attn_implementation
    play(model, [[1, 2, 3], [4, 5]], 2)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == implementation
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_new_weights_are_seen_by_the_next_session():
    model = make_model()
    engine = TransformersEngine(model)
    for _ in range(2):
        completion = engine.open([[1, 2, 3]], stop_id=STOP, sampling=Sampling(), seeds=[1]).generate({}, {0: 5})[0]
        np.testing.assert_allclose(completion.logp, full_logp(model, [1, 2, 3], completion.ids), atol=1e-5)
        with torch.no_grad():
            model.lm_head.weight.mul_(-1.3)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_stays_close_to_the_full_forward(autocast):
    model = make_model() if autocast else make_model().bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for turns in play(model, ragged_prompts(), 3).values():
            for context, completion in turns:
                expected = full_logp(model, context, completion.ids)
                # Two orders of summation in bfloat16; a wrong mask or position gives differences of order 1.
                assert np.abs(np.array(completion.logp) - expected).mean() < 0.15


def test_attention_that_sees_only_part_of_the_context_is_refused():
    model = make_model()
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="sliding_attention"):
        TransformersEngine(model)


def test_bad_input_is_refused():
    model = make_model()
    engine = TransformersEngine(model, max_batch=2)
    options = {"stop_id": STOP, "sampling": Sampling()}
    with pytest.raises(ValueError, match="max_batch = 2"):
        engine.open([[1]] * 3, seeds=[0, 1, 2], **options)
    with pytest.raises(ValueError, match="one seed a row"):
        engine.open([[1], [2]], seeds=[0], **options)
    with pytest.raises(ValueError, match="prompt is empty"):
        engine.open([[1], []], seeds=[0, 1], **options)
    with pytest.raises(ValueError, match="vocabulary of 61"):
        engine.open([[1]], seeds=[0], stop_id=61, sampling=Sampling())
    with pytest.raises(ValueError, match="max_new_tokens"):
        engine.open([[1]], seeds=[0], **options).generate({}, {0: 0})
    session = engine.open([[1], [2]], seeds=[0, 1], **options)
    with pytest.raises(ValueError, match="no row"):
        session.generate({}, {})
    going = {0, 1} - session.generate({}, {0: 1, 1: 50}).keys()
    assert going == {1}
    with pytest.raises(ValueError, match="still being sampled"):
        session.generate({}, {1: 3})
    with pytest.raises(ValueError, match="still being sampled"):
        session.generate({1: [3]}, {})
    with pytest.raises(ValueError, match="max_batch"):
        TransformersEngine(model, max_batch=0)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        engine.open([[1]], seeds=[0], **options).generate({}, {0: 3})
