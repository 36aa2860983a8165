"""A tiny policy, task set and trainer for the trainer's tests: nothing learns here, everything runs."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from pact.arguments import PactTrainingArguments
from pact.envs import make
from pact.envs.base import Score
from pact.objective import PactConfig
from pact.trainer import PactTrainer
from pact.warm_start import WarmStartTrainer

MODEL = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


class AlternatingRewards:
    """Every other rollout of a prompt scores 1, so that advantages are not 0 although the policy is random."""

    reward = 1.0

    def generate(self, tasks):
        episodes = super().generate(tasks)
        return [
            [replace(episode, score=Score(i % 2 * self.reward, [], {})) for i, episode in enumerate(attempts)]
            for attempts in episodes
        ]


class SteeredTrainer(AlternatingRewards, PactTrainer):
    """`PactTrainer` on alternating rewards."""


def toybox(**options):
    return make("toybox", **{"train": 8, "test": 4, "hops": [1, 1], "sources": 2, "distractors": 0} | options)


def tiny_model(tokenizer, **overrides):
    values = {**MODEL, **overrides}
    set_seed(0)
    config = AutoConfig.for_model(
        values.pop("model_type"), vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **values
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def arguments(folder, **overrides):
    values = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_rollouts": 2,
        "max_turns": 2,
        "max_turn_tokens": 6,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "disable_tqdm": True,
    }
    return PactTrainingArguments(output_dir=str(folder), **{**values, **overrides})


def make_trainer(folder, *, kind=SteeredTrainer, config=None, env=None, callbacks=None, model=None, **overrides):
    env = env or toybox()
    tokenizer = env.tokenizer()
    return kind(
        model or tiny_model(tokenizer),
        arguments(folder, **overrides),
        env,
        tokenizer,
        config or PactConfig(anchor_q=0.5),
        callbacks=callbacks,
    )


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def largest_difference(first, second):
    return max((first[name] - second[name]).abs().max().item() for name in first)


__all__ = ["WarmStartTrainer", "arguments", "largest_difference", "make_trainer", "tiny_model", "toybox", "weights"]
