"""A tiny policy, prompts with traces and trainers for the tests of `pact.integrations.trl`."""

from __future__ import annotations

import json
import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from datasets import Dataset
from tiny_tokenizers import tiny_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from pact.integrations.trl import PactGRPOTrainer
from pact.objective import PactConfig
from pact.trace import prepare_tokenizer

PLAIN = PactConfig(anchor_q=1.0, sft_coef=0.0)  # TRL's own loss


def tokenizer_and_model(folder=None, stops=120, layout="qwen", seed=0):
    """A random Qwen3 of two layers. Many ids end a turn, so that completions have all lengths. Saved to ``folder``."""
    tokenizer = prepare_tokenizer(tiny_tokenizer(layout))
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = list(range(100, 100 + stops)) or tokenizer.eos_token_id
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = Qwen3ForCausalLM.from_pretrained(folder)
    return tokenizer, model


def trace(number):
    call = {"name": "lookup", "arguments": json.dumps({"key": f"value {number}"})}
    return [
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": f"I need the tool for {number}. First look at the price.",
            "tool_calls": [{"type": "function", "function": call}],
        },
        {"role": "tool", "name": "lookup", "content": f"The result is {number}."},
        {"role": "assistant", "content": f"The answer is {number}.", "reasoning_content": "Then read the result."},
    ]


def rows(count=4, without=()):
    return [
        {
            "prompt": [{"role": "user", "content": f"What is the price of item {number}?"}],
            "expert": None if number in without else trace(number),
        }
        for number in range(count)
    ]


def reward(completion_ids, **kwargs):
    """Depends on the sampled ids alone, differs between rollouts."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def arguments(folder, **overrides):
    values = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "shuffle_dataset": False,
    }
    return GRPOConfig(**{**values, **overrides})


def make_trainer(folder, pact=PLAIN, *, kind=PactGRPOTrainer, model=None, tokenizer=None, data=None, **overrides):
    """A trainer of ``kind``; arguments of the trainer itself are told from those of GRPOConfig by name."""
    if model is None:
        tokenizer, model = tokenizer_and_model()
    names = ("tools", "peft_config", "environment_factory")
    own = {name: overrides.pop(name) for name in names if name in overrides}
    if kind is not GRPOTrainer:
        own["pact"] = pact
    return kind(
        model=model,
        reward_funcs=overrides.pop("reward_funcs", reward),
        args=arguments(folder, **overrides),
        train_dataset=Dataset.from_list(rows() if data is None else data),
        processing_class=tokenizer,
        **own,
    )


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def largest_difference(first, second):
    return max((first[name] - second[name]).abs().max().item() for name in first)
