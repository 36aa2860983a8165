"""Settings of transformers that must not change what is learnt: compiled layers, bf16, optimisers, clipping."""

from __future__ import annotations

import os

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters
from trainer_setup import make_trainer, tiny_model, toybox, weights

from pact.modeling import compile_layers
from pact.objective import PactConfig


@pytest.fixture(autouse=True)
def no_graphs():
    """Also what transformers leaves in the environment for torch_compile."""
    counters.clear()
    yield
    for name in ("BACKEND", "MODE"):
        os.environ.pop(f"ACCELERATE_DYNAMO_{name}", None)
    torch._dynamo.reset()


def trained(folder, **settings):
    """A finished run on two layers: its trainer."""
    tokenizer = toybox().tokenizer()
    config = PactConfig(anchor_q=0.5, kl_coef=0.1)
    trainer = make_trainer(folder, model=tiny_model(tokenizer, num_hidden_layers=2), config=config, **settings)
    trainer.train()
    return trainer


def gap(trainer, other):
    ours, theirs = weights(trainer), weights(other)
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_learn_the_same(tmp_path, checkpointing):
    settings = {"gradient_checkpointing": checkpointing, "max_steps": 3, "eval_tasks": 2, "eval_strategy": "steps"}
    plain = trained(tmp_path / "plain", **settings)
    assert not counters["stats"]
    compiled = trained(tmp_path / "compiled", torch_compile=True, torch_compile_backend="aot_eager", **settings)
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]
    assert gap(plain, compiled) < 1e-6
    assert [*plain.model.state_dict()] == [*compiled.model.state_dict()]


def test_graphs_do_not_grow_with_the_steps(tmp_path):
    found = []
    for steps in (2, 6):
        torch._dynamo.reset()
        counters.clear()
        trained(tmp_path / str(steps), torch_compile=True, torch_compile_backend="eager", max_steps=steps)
        found.append(counters["stats"]["unique_graphs"])
    assert found[0] == found[1]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_that_capture_graphs_are_refused(tmp_path, mode):
    with pytest.raises(ValueError, match=r"captures a CUDA graph for each shape.*max-autotune-no-cudagraphs"):
        make_trainer(tmp_path, torch_compile=True, torch_compile_mode=mode)


def test_a_model_without_marked_layers_is_refused():
    model = tiny_model(toybox().tokenizer())
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="Qwen3ForCausalLM does not mark its layers: set torch_compile to false"):
        compile_layers(model)


def first_step(trainer):
    """How one step of SGD changes each parameter, and the loss."""
    before = weights(trainer)
    trainer.train()
    change = {name: value.detach() - before[name] for name, value in trainer.model.named_parameters()}
    return change, next(line["loss"] for line in trainer.state.log_history if "loss" in line)


def test_bf16_computes_in_16_bits_and_learns_the_same_within_their_precision(tmp_path):
    """Rollouts of the exact run are replayed, as sampling in 16 bits would take other tokens."""
    exact = make_trainer(tmp_path / "exact", max_steps=1)
    kept = []
    make_groups = exact.make_groups
    exact.make_groups = lambda tasks: kept.append(make_groups(tasks)) or kept[-1]
    change, loss = first_step(exact)
    rounded = make_trainer(tmp_path / "rounded", max_steps=1, bf16=True)
    dtypes = set()
    rounded.model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda m, i, out: dtypes.add(out.dtype))
    rounded.make_groups = lambda tasks: kept[0]
    other, rounded_loss = first_step(rounded)
    assert dtypes == {torch.bfloat16}
    assert all(value.dtype == torch.float32 for value in rounded.model.parameters())
    assert rounded_loss == pytest.approx(loss, abs=2e-2)
    one, two = (torch.cat([value.flatten() for value in part.values()]) for part in (change, other))
    assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.99
    assert not torch.equal(one, two)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "adamw_8bit"])
def test_optimisers_of_transformers(tmp_path, optim):
    model = tiny_model(toybox().tokenizer(), intermediate_size=512)  # bitsandbytes keeps small states in 32 bits
    trainer = make_trainer(tmp_path, model=model, optim=optim, max_steps=2, learning_rate=1e-2)
    before = weights(trainer)
    trainer.train()
    assert max((value - before[name]).abs().max() for name, value in weights(trainer).items()) > 1e-3
    optimizer = trainer.optimizer.optimizer
    if optim == "adamw_torch_fused":
        assert all(group["fused"] for group in optimizer.param_groups)
    if optim == "adamw_8bit":
        assert any(state["state1"].dtype == torch.uint8 for state in optimizer.state.values())


def test_gradients_are_clipped_to_the_norm_of_the_whole_step(tmp_path):
    """SGD at rate 1: the change of the weights is the clipped gradient of all micro-batches."""
    free = make_trainer(tmp_path / "free", learning_rate=1.0, max_steps=1, gradient_accumulation_steps=2)
    change, _ = first_step(free)
    norm = torch.cat([value.flatten() for value in change.values()]).norm()
    limit = norm.item() / 3
    clipped = make_trainer(
        tmp_path / "clipped", learning_rate=1.0, max_steps=1, gradient_accumulation_steps=2, max_grad_norm=limit
    )
    other, _ = first_step(clipped)
    for name, value in change.items():
        assert torch.allclose(other[name], value / 3, atol=1e-6), name
