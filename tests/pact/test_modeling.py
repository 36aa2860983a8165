"""Trees through transformers models: equal to each sequence on its own, in log-probs and every parameter gradient."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from pact.modeling import attach_tree_attention, dense_hidden, lm_head, tree_hidden
from pact_kernels import PrefixTree

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FAMILIES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "llama with yarn": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 2.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
}


def build(family, **changes):
    model_class, config_class, options = FAMILIES[family]
    torch.manual_seed(0)
    return model_class(config_class(**{**SIZES, **options, **changes})).train()


def sequences():
    generator = torch.Generator().manual_seed(1)
    x, c, *ys = [torch.randint(61, (n,), generator=generator).tolist() for n in (20, 14, 9, 13, 4)]
    return [x + y for y in ys] + [x + c + y for y in ys] + [x + c]


def loss_of(head, hidden, paths):
    """A differently weighted sum of all next-token log-probs."""
    total = 0.0
    for s, path in enumerate(paths):
        logits = (hidden[s][:-1] @ head.weight.T + (0 if head.bias is None else head.bias)) * head.scale
        logp = logits.log_softmax(-1)[torch.arange(len(path) - 1), torch.tensor(path[1:])]
        total = total + (logp * torch.linspace(0.5, 1.5, len(logp)) * (s + 1)).sum()
    return total / 100


def tree_loss(model, backend="auto"):
    paths = sequences()
    tree = PrefixTree.from_sequences(paths)
    hidden = tree_hidden(model, tree, backend)
    return loss_of(lm_head(model), [hidden[index] for index in tree.index], paths)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tree_equals_each_sequence_alone(family, checkpointing):
    check_against_sequences_alone(family, checkpointing, "auto")


@pytest.mark.parametrize("checkpointing", [None, False], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("backend", ["triton", "flash"])
def test_tree_equals_each_sequence_alone_with_every_backend(family, checkpointing, backend):
    check_against_sequences_alone(family, checkpointing, backend)


def check_against_sequences_alone(family, checkpointing, backend):
    model = build(family)
    stock = copy.deepcopy(model)
    alone = [stock.model(torch.tensor([path])).last_hidden_state[0] for path in sequences()]
    expected_loss = loss_of(lm_head(stock), alone, sequences())
    expected = gradients(stock, expected_loss)

    attach_tree_attention(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    loss = tree_loss(model, backend)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    for name, grad in gradients(model, loss).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_dense_hidden_equals_each_sequence_alone():
    model = build("qwen3")
    alone = [model.model(torch.tensor([path])).last_hidden_state[0] for path in sequences()]
    attach_tree_attention(model)
    for ours, expected in zip(dense_hidden(model, sequences()), alone):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_without_a_tree_it_is_sdpa():
    model = build("qwen3").eval()
    stock = copy.deepcopy(model)
    attach_tree_attention(model)
    attach_tree_attention(model)
    ids = torch.randint(61, (3, 17), generator=torch.Generator().manual_seed(0))
    left_padded = torch.ones_like(ids)
    left_padded[1, :5] = 0
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock(ids).logits)
        masked = [m(ids, attention_mask=left_padded).logits for m in (model, stock)]
        assert torch.equal(*masked)
        cached = []
        for m in (model, stock):
            cache = DynamicCache(config=m.config)
            m(ids[:, :9], past_key_values=cache)
            cached.append(m(ids[:, 9:], past_key_values=cache).logits)
        assert torch.equal(*cached)
    generated = [m.generate(ids, attention_mask=left_padded, max_new_tokens=8, do_sample=False) for m in (model, stock)]
    assert torch.equal(*generated)


def test_saved_model_knows_nothing_of_the_tree(tmp_path):
    model = build("llama")
    attach_tree_attention(model)
    model.save_pretrained(tmp_path)
    assert "pact_tree" not in (tmp_path / "config.json").read_text()
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_no_mask_of_tree_size_is_built():
    model = build("qwen3")
    attach_tree_attention(model)
    seen = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
    tree_loss(model).backward()
    assert seen == [None, None]


def test_autocast():
    model = build("qwen3")
    attach_tree_attention(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = tree_hidden(model, PrefixTree.from_sequences(sequences()))
        alone = dense_hidden(model, sequences())
    tree = PrefixTree.from_sequences(sequences())
    for index, expected in zip(tree.index, alone):
        torch.testing.assert_close(hidden[index], expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("model_class", "config", "field"),
    [
        (GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=3.0), "scale"),
        (CohereForCausalLM, CohereConfig(**SIZES, logit_scale=0.3), "scale"),
        (Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0), "softcap"),
    ],
)
def test_head_reproduces_the_logits(model_class, config, field):
    torch.manual_seed(0)
    model = model_class(config)
    head = lm_head(model)
    assert getattr(head, field) not in (None, 1.0)
    ids = torch.tensor([[3, 5, 8]])
    raw = model.model(ids).last_hidden_state @ head.weight.T
    logits = head.scale * (raw if head.softcap is None else head.softcap * (raw / head.softcap).tanh())
    torch.testing.assert_close(logits, model(ids).logits)
    assert head.options(temperature=0.5) == {"bias": None, "softcap": head.softcap, "temperature": 0.5 / head.scale}


def with_convolution(model):
    model.model.layers[0].mixer = torch.nn.Conv1d(4, 4, 3)
    return model


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 2.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64,
}
REFUSED = {
    "slides over 16 tokens": lambda: build("mistral", sliding_window=16),
    "layers of type sliding_attention": lambda: build(
        "qwen3", use_sliding_window=True, sliding_window=16, max_window_layers=1
    ),
    "RoPE is dynamic": lambda: build(
        "llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "RoPE is longrope": lambda: build("llama", rope_parameters=LONGROPE),
    "drops out attention": lambda: build("llama", attention_dropout=0.1),
    "attn_logit_softcapping": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, layer_types=["full_attention"] * 2, sliding_window=None)
    ),
    "attention sinks": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES, head_dim=8, num_local_experts=2, layer_types=["full_attention"] * 2, sliding_window=None)
    ),
    "layers of type linear_attention": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(**SIZES, head_dim=8, num_experts=2)
    ),
    "neighbouring tokens by Conv1d": lambda: with_convolution(build("llama")),
    "cross-attention": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_models_a_tree_would_get_wrong_are_refused(reason):
    with pytest.raises(ValueError, match=f"cannot take prefix trees: .*{reason}"):
        attach_tree_attention(REFUSED[reason]())


DENSE = {
    **{reason: REFUSED[reason] for reason in REFUSED if "RoPE" in reason or "slid" in reason or "drops" in reason},
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, sliding_window=16)),
    "sinks": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, sliding_window=16)),
    "linear": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(**{**SIZES, "num_hidden_layers": 4}, head_dim=8, num_experts=16)
    ),
}


@pytest.mark.parametrize("reason", DENSE)
def test_the_dense_way_takes_refused_models(reason):
    model = DENSE[reason]().eval()
    paths = [path * 3 for path in sequences()]  # beyond the window and the original positions
    paths = [path[: 20 + 25 * i] for i, path in enumerate(paths[:4])]
    with torch.no_grad():
        alone = [model.model(torch.tensor([path])).last_hidden_state[0] for path in paths]
        for ours, expected in zip(dense_hidden(model, paths), alone):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_takes_trees_without_a_graph_break():
    """Trees and plain calls in turn, of several lengths, compiled a few times at most."""
    model, stock = build("qwen3"), build("qwen3")
    for one in (model, stock):
        attach_tree_attention(one)
    torch._dynamo.reset()
    counted = CompileCounterWithBackend("aot_eager")
    model.model.compile(backend=counted, fullgraph=True)
    for length in (5, 9, 30, 41, 50):
        paths = [[*range(3, 20), *[20 + i] * length] for i in range(4)]
        tree = PrefixTree.from_sequences(paths)
        hidden, expected = (tree_hidden(one, tree) for one in (model, stock))
        torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-6)
        for one, h in ((model, hidden), (stock, expected)):
            one.zero_grad()
            h.pow(2).sum().backward()
        for (name, mine), wanted in zip(model.model.named_parameters(), stock.model.parameters()):
            torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        ids = torch.tensor([paths[0]])
        torch.testing.assert_close(model.model(ids).last_hidden_state, stock.model(ids).last_hidden_state)
    assert counted.frame_count <= 4


def test_a_window_longer_than_the_positions_is_no_window():
    model = build("mistral", sliding_window=128)
    attach_tree_attention(model)
    tree_loss(model).backward()


def test_tree_without_attachment_and_too_long_sequences_are_errors():
    model = build("qwen3")
    with pytest.raises(RuntimeError, match="attach_tree_attention"):
        tree_loss(model)
    attach_tree_attention(model)
    for run in (dense_hidden, lambda m, s: tree_hidden(m, PrefixTree.from_sequences(s))):
        with pytest.raises(ValueError, match="129 tokens but the model's max_position_embeddings is 128"):
            run(model, [[1] * 129, [2, 3]])


def test_wrappers_and_unusual_heads_are_errors():
    model = build("qwen3")
    with pytest.raises(TypeError, match="causal LM"):
        attach_tree_attention(torch.nn.DataParallel(model))
    with pytest.raises(TypeError, match="causal LM"):
        attach_tree_attention(model.model)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(TypeError, match="not a plain linear layer"):
        lm_head(model)


def test_layers_that_skip_or_lose_the_tree_are_errors():
    model = build("llama")
    attach_tree_attention(model)
    attention = model.model.layers[1].self_attn
    plain_forward = attention.forward
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(RuntimeError, match="1 of its 2 layers"):
        tree_loss(model)
    attention.forward = lambda **kwargs: plain_forward(**{k: v for k, v in kwargs.items() if k != "pact_tree"})
    with pytest.raises(RuntimeError, match="does not pass keyword arguments on"):
        tree_loss(model)
    attention.forward = lambda **kwargs: plain_forward(**kwargs, softcap=30.0)
    with pytest.raises(ValueError, match="asks its attention for softcap"):
        tree_loss(model)
    attention.forward = plain_forward
    tree_loss(model).backward()
