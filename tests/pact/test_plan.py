"""The memory estimate, the automatic token budget and `pact plan`; nothing here loads weights larger than a page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from test_train import TINY
from trainer_setup import arguments, tiny_model, toybox
from transformers import AutoConfig, AutoModelForCausalLM

from pact import cli, train
from pact.arguments import parse_settings, with_token_budget
from pact.budget import Fit, room_in
from pact.groups import PactConfig
from pact.memory import (
    GIB,
    MOST_TOKENS,
    PeakMemory,
    Shadow,
    Strategy,
    _cgroup_rooms,
    count,
    estimate,
    fit_tokens,
    free_memory,
    optimizer_bytes,
    size_of,
)
from pact.objective import PactObjective
from pact.packing import plan_trees
from pact.trace import prepare_tokenizer
from pact.workload import group_of, longest_sequence, with_rollouts, workload

BIG = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
CONFIG = PactConfig(kl_coef=0.0)


def build(settings=SMALL, dtype=torch.float32):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **settings), dtype=dtype)


def small(tmp_path, **settings):
    """A shadow of a model whose activations of some hundred tokens outweigh everything else."""
    return Shadow(build, CONFIG, arguments(tmp_path, **settings))


@pytest.fixture(scope="module")
def tasks():
    env = toybox(train=12)
    return env.tasks("train"), prepare_tokenizer(env.tokenizer())


def real_peak(model, tokens, accumulates):
    """`Shadow.step` with data: the same tree through the real model, operator by operator."""
    objective = PactObjective(CONFIG)
    (batch,) = objective.build([small(Path("unused"))._group(tokens)], progress=0.0)
    loss = objective.loss(model, batch).loss  # also attaches the tree attention and plans the tree
    loss.backward()
    if not accumulates:
        model.zero_grad(set_to_none=True)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    with Watched(known) as memory:
        objective.loss(model, batch).loss.backward()
    return memory.peak + gradients


class Watched(PeakMemory):
    """On real tensors, where values may be asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("accumulates", [True, False])
def test_a_step_without_data_takes_the_memory_of_one_with_data(tmp_path, accumulates):
    model = build().train()
    for tokens in (200, 600):
        estimated = small(tmp_path).step(tokens, accumulates=accumulates).peak
        assert estimated == pytest.approx(real_peak(model, tokens, accumulates), rel=0.03)


def test_peak_counts_each_storage_once_while_it_is_alive():
    kept = torch.zeros(1000)
    with PeakMemory([kept]) as memory:
        first = kept + 1  # 4,000 bytes
        view = first.view(10, 100)
        second = view + first.view(10, 100)
        assert memory.alive == memory.peak == 8000
        del first, view
        assert memory.alive == 4000
        third = second * 2
        assert memory.peak == memory.alive == 8000
    del third


def test_activations_are_a_line_in_tokens_and_checkpointing_flattens_it(tmp_path):
    shadow = small(tmp_path)
    low, mid, high = (shadow.step(n).peak for n in (400, 800, 1200))
    assert high - mid == pytest.approx(mid - low, rel=0.02)
    flat = [shadow.step(n, checkpointing=True).peak for n in (400, 800)]
    assert flat[1] - flat[0] < 0.8 * (mid - low)
    assert shadow.step(400).peak == low  # checkpointing is off again


def test_autocast_halves_what_is_saved(tmp_path):
    full, half = small(tmp_path), small(tmp_path, bf16=True)
    slopes = [(one.step(1200).peak - one.step(400).peak) / 800 for one in (full, half)]
    assert 0.5 < slopes[1] / slopes[0] < 0.9


def test_a_large_model_needs_no_memory_to_be_estimated(tmp_path):
    """GQA, tied embeddings of 1.5 GB: followed without allocating them; the head's gradients show in the constant."""
    shadow = Shadow(lambda: build(BIG, torch.bfloat16), CONFIG, arguments(tmp_path))
    layer = 2560 * 128 * (2 * 32 + 2 * 8) + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    assert count(shadow.parameters) == 151936 * 2560 + 2 * layer + 2560
    assert shadow.gradients == 2 * count(shadow.parameters)
    assert shadow.cache_bytes == 2 * 2 * 8 * 128 * 2
    low, high = shadow.step(1024), shadow.step(2048)
    assert high.flops - low.flops == 1024 * 6 * 2 * (layer - 2 * 2560 - 2 * 128)
    float32_head = 4 * 151936 * 2560
    assert low.peak > shadow.gradients + 2 * float32_head


def test_lora_counts_adapters_only(tmp_path):
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    args = arguments(tmp_path, optim="adamw_torch")
    shadow = Shadow(lambda: get_peft_model(build(dtype=torch.bfloat16), adapters), CONFIG, args)
    trained = 2 * 4 * ((32 + 32) + (32 + 16))
    assert count(shadow.trainable) == trained
    need = estimate(shadow, args, Strategy(), 100, with_reference=True)
    assert need.gradients == need.reference == 4 * trained
    assert need.optimizer == pytest.approx(8 * trained, rel=0.01)
    assert need.weights == size_of(shadow.parameters) == 2 * count(shadow.parameters) + 2 * trained


@pytest.mark.parametrize(
    ("optim", "dtype", "expected"),
    [
        ("adamw_torch", torch.float32, 8),
        ("adamw_torch_fused", torch.bfloat16, 4),
        ("sgd", torch.float32, 0),
        ("adagrad", torch.float32, 4),
        ("adamw_8bit", torch.float32, 2 * (1 + 4 / 256)),
    ],
)
def test_optimiser_states_a_value(tmp_path, optim, dtype, expected):
    parameters = [torch.zeros(300, 700, dtype=dtype), torch.zeros(700, dtype=dtype)]
    assert optimizer_bytes(parameters, arguments(tmp_path, optim=optim)) / count(parameters) == pytest.approx(
        expected, abs=0.01
    )


def test_factored_states_go_by_rows_and_columns(tmp_path):
    states = optimizer_bytes([torch.zeros(1000, 3000)], arguments(tmp_path, optim="adafactor"))
    assert states == pytest.approx(4 * (1000 + 3000), rel=0.02)


def test_strategies_divide_what_they_shard(tmp_path):
    shadow = small(tmp_path, optim="adamw_torch")
    one, ddp, zero2, fsdp2 = (
        estimate(shadow, shadow._args, Strategy(name, n), 200, cached_tokens=1000)
        for name, n in (("single", 1), ("ddp", 4), ("zero2", 4), ("fsdp2", 4))
    )
    assert (ddp.weights, ddp.gradients, ddp.optimizer) == (one.weights, one.gradients, one.optimizer)
    assert ddp.communication == one.gradients
    assert one.communication == 0
    assert zero2.weights == one.weights
    assert zero2.gradients == one.gradients // 4
    assert fsdp2.weights == one.weights // 4
    assert fsdp2.optimizer == one.optimizer // 4
    assert fsdp2.rollouts == one.rollouts + one.weights
    offloaded = estimate(shadow, shadow._args, Strategy("fsdp2", 4, offload=True), 200)
    assert offloaded.weights == offloaded.optimizer == 0
    with pytest.raises(ValueError, match="choose single, ddp"):
        Strategy("fsdp1")


def test_strategy_is_read_from_the_launch(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    assert Strategy.of(args) == Strategy()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert Strategy.of(args) == Strategy("zero3", 1)


def test_fit_tokens_finds_the_last_that_fits():
    calls = []

    def peak(tokens):
        calls.append(tokens)
        return max(50_000 + 10 * tokens, 30 * tokens)

    found = fit_tokens(peak, 1_000_000, 100)
    assert peak(found) <= 1_000_000
    assert found == pytest.approx(1_000_000 / 30, rel=2e-3)
    assert len(calls) < 9
    assert fit_tokens(peak, 50_000, 100) is None
    assert fit_tokens(lambda tokens: 1000, 2000, 100) == MOST_TOKENS


def test_the_least_of_all_control_groups_counts(tmp_path):
    groups, inner = tmp_path / "cgroup", tmp_path / "fs" / "a" / "b"
    groups.write_text("1:name=x:/old\n0::/a/b\n")
    inner.mkdir(parents=True)
    for folder, limit, used, cache in ((inner, "max", 10, 0), (inner.parent, 900, 500, 100)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")
    assert list(_cgroup_rooms(groups, tmp_path / "fs")) == [500]
    assert free_memory(torch.device("cpu"), 2.5) == 2.5 * GIB
    assert 0 < free_memory(torch.device("cpu")) < 2**50


def test_workload_equals_trees_counted_by_hand(tasks, tmp_path):
    tasks, tokenizer = tasks
    args = arguments(tmp_path, num_rollouts=3, max_response_tokens=300, warm_start_steps=1, warm_start_batch_size=2)
    config = PactConfig(context_length=2048, anchor_q=0.0)
    work = workload(tasks, tokenizer, config, args)
    groups = [group_of(task, tokenizer, config) for task in tasks]
    prompts = [len(group.head_ids) + len(group.suffix_ids) for group in groups]
    assert (work.tasks, work.sampled, work.prompt) == (12, 12, max(prompts))
    contexts = [len(group.context_ids) for group in groups]
    assert work.longest == max(p + c for p, c in zip(prompts, contexts)) + 300
    # Two prompts a micro-batch, each with its trace in context: paths end one token before the last one predicted.
    sizes = sorted((p + c + 3 * 299 for p, c in zip(prompts, contexts)), reverse=True)
    traces = [len(group.trace.ids) + p for group, p in zip(groups, prompts)]
    assert sum(sizes[:2]) < work.limit.unique < sum(sizes[:2]) + 2 * max(traces)
    assert work.limit.dense > work.limit.unique
    assert work.limit.sampled == 2 * 3 * 300
    assert work.warm is not None
    assert work.warm.largest <= 2 * max(traces)


def test_prompts_without_room_are_counted(tasks, tmp_path):
    tasks, tokenizer = tasks
    config = PactConfig(context_length=2048)
    tokens = sorted(
        len(group.head_ids) + len(group.suffix_ids) for group in (group_of(t, tokenizer, config) for t in tasks)
    )
    args = arguments(tmp_path, max_prompt_tokens=tokens[5])
    assert workload(tasks, tokenizer, config, args).overlong == sum(n > tokens[5] for n in tokens) > 0
    with pytest.raises(ValueError, match="raise context_length"):
        workload(tasks, tokenizer, PactConfig(context_length=8), args)


def fit_of(tasks, tmp_path, free, **settings):
    tokenizer = tasks[1]
    args = arguments(tmp_path, max_response_tokens=200, **settings)
    shadow = Shadow(lambda: tiny_model(tokenizer, max_position_embeddings=1024), CONFIG, args)
    return Fit(shadow, args, PactConfig(context_length=1024, kl_coef=0.0), Strategy(), free)


def test_automatic_budget_fits_and_no_sequence_is_over_it(tasks, tmp_path):
    tasks, tokenizer = tasks
    fit = fit_of((tasks, tokenizer), tmp_path, 24 * 2**20)
    budget = fit.token_budget(tasks, tokenizer)
    assert estimate(fit.shadow, fit.args, Strategy(), budget).training <= room_in(fit.free)
    assert estimate(fit.shadow, fit.args, Strategy(), int(1.01 * budget)).training > room_in(fit.free)
    groups = [group_of(task, tokenizer, fit.config) for task in tasks]
    longest = max(longest_sequence(group, fit.config, fit.args) for group in groups)
    assert budget >= longest
    full = [with_rollouts(group, 200, fit.config, fit.args) for group in groups]
    paths = [[torch.tensor(g.head_ids + g.suffix_ids + r.ids).numpy() for r in g.rollouts] for g in full]
    assert plan_trees(paths, budget)  # would raise for a sequence over the budget


def test_no_budget_fits_is_one_error_that_names_settings(tasks, tmp_path):
    fit = fit_of(tasks, tmp_path, 2 * 2**20)
    with pytest.raises(ValueError, match="set gradient_checkpointing, or lower max_response_tokens or context_length"):
        fit.token_budget(*tasks)


def test_weights_that_do_not_fit_are_an_error_with_mends(tasks, tmp_path):
    with pytest.raises(ValueError, match=r"optimiser states .* are free, .*: train LoRA .* bfloat16, .* \(FSDP2\)"):
        fit_of(tasks, tmp_path, 100_000, optim="adamw_torch").check_fixed()
    fit_of(tasks, tmp_path, GIB).check_fixed()


def test_warnings_name_the_settings(tasks, tmp_path):
    tasks, tokenizer = tasks
    fit = fit_of((tasks, tokenizer), tmp_path, 100_000)
    config = PactConfig(context_length=1024, kl_coef=0.0, token_budget=100)
    training, sampling, budget = fit.plan(workload(tasks, tokenizer, config, fit.args)).warnings()
    assert "token_budget to auto" in training
    assert "gradient_checkpointing" in training
    assert "generation_batch_size" in sampling
    assert "over token_budget 100" in budget
    roomy = fit_of((tasks, tokenizer), tmp_path, GIB)
    assert roomy.plan(workload(tasks, tokenizer, roomy.config, roomy.args)).warnings() == []


def test_auto_is_a_setting_that_becomes_a_number():
    settings = parse_settings(["--token_budget", "auto"])
    assert settings.auto_budget
    assert settings.pact.token_budget is None
    assert with_token_budget(settings, 4096).values["token_budget"] == 4096
    assert with_token_budget(settings, 4096).pact.token_budget == 4096
    assert parse_settings(["--token_budget", "512"]).pact.token_budget == 512
    with pytest.raises(ValueError, match="must be a number of tokens, or auto"):
        parse_settings(["--token_budget", "many"])
    with pytest.raises(ValueError, match="memory_gib"):
        parse_settings(["--memory_gib", "0"])


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"eval_tasks": 0, "eval_strategy": "no"}))
    return path


def test_plan_command_prints_every_part_and_starts_nothing(config, capsys):
    assert cli.main(["plan", str(config), "--processes", "4", "--memory_gib", "0.001"]) == 0
    out = capsys.readouterr().out
    for text in ("qwen3", "8 of them looked at", "rollouts at the limit", "warm start", "KL reference", "Tflop"):
        assert text in out
    assert all(name in out for name in ("ddp", "fsdp2", "zero3", "KiB a token", "with gradient checkpointing"))
    assert "warning (ddp): training may need" in out
    assert not Path("runs").exists()
    assert cli.main(["plan", str(config), "--sample", "0"]) == 2


def test_train_resolves_auto_once_and_a_resumed_run_keeps_it(config, capsys):
    command = ["train", str(config), "--run_name", "fit", "--token_budget", "auto", "--memory_gib", "0.05"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    written = yaml.safe_load(Path("runs/fit/config.yaml").read_text())["token_budget"]
    assert f"token_budget: {written}\n" in out
    assert "memory:" in out
    assert "tokens of a step:" in out
    assert parse_settings([], Path("runs/fit/config.yaml")).pact.token_budget == written
    assert not parse_settings([], Path("runs/fit/config.yaml")).auto_budget


def test_train_stops_before_any_work_when_nothing_can_fit(config, capsys):
    assert cli.main(["train", str(config), "--run_name", "no", "--memory_gib", "0.00001"]) == 2
    assert "LoRA" in capsys.readouterr().err
    assert not Path("runs/no").exists()


@pytest.mark.parametrize("flags", [[], ["--lora_r", "2"], ["--dtype", "bfloat16", "--copy_gain", "0"]])
def test_outline_is_the_model_that_is_loaded(tmp_path, flags):
    """Names, shapes, dtypes and what is trained: of a folder with and without adapters, and of a new model."""
    env = toybox()
    model = tiny_model(env.tokenizer())
    model.save_pretrained(tmp_path)
    env.tokenizer().save_pretrained(tmp_path)
    source = ["--model", "toybox"] if "bfloat16" in flags else ["--model", str(tmp_path)]
    settings = parse_settings([*source, *flags])
    loaded, tokenizer = train.load_model(settings.model, env, 0, None, settings.lora)
    shadow = Shadow(lambda: train.outline(settings, tokenizer), CONFIG, arguments(tmp_path))
    kinds = [
        {name: (p.shape, p.dtype, p.requires_grad) for name, p in made.named_parameters()}
        for made in (loaded, shadow.model)
    ]
    assert kinds[0] == kinds[1]
    assert shadow.step(64).peak > 0
