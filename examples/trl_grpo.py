"""PACT in a script for TRL's GRPOTrainer: five changed lines. Runs on a CPU in seconds: the model is random and tiny.

Before:

    from trl import GRPOConfig, GRPOTrainer

    dataset = Dataset.from_list([{"prompt": prompt} for prompt, trace in data])
    trainer = GRPOTrainer(model, reward, GRPOConfig(...), dataset, processing_class=tokenizer)
    trainer.train()

After (the marked lines):

    from trl import GRPOConfig
    from pact.integrations.trl import PactGRPOTrainer                                             # 1
    from pact.objective import PactConfig                                                         # 2

    dataset = Dataset.from_list([{"prompt": prompt, "expert": trace} for prompt, trace in data])  # 3
    trainer = PactGRPOTrainer(                                                                    # 4
        model, reward, GRPOConfig(...), dataset, processing_class=tokenizer,
        pact=PactConfig(anchor_q=0.4, sft_coef=0.1),                                              # 5
    )
    trainer.train()
"""

from __future__ import annotations

import json
import tempfile

import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig

from pact.envs import make
from pact.integrations.trl import PactGRPOTrainer
from pact.objective import PactConfig

SHOWN = ("reward", "loss", "loss/rl_prompt", "loss/rl_trace", "loss/sft", "anchor/prompt_share", "ratio/prompt")
SHOWN += ("ratio/trace", "tokens/sft_reasoning", "tokens/sft_tool_call", "tokens/unique", "tokens/dense")


def tiny_model(vocabulary: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=1024,
        )
    )


def reward(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """Share of even ids: something that a random model can learn at once."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def row(task) -> dict:
    """A task as a row. Arguments are JSON text: Arrow would give every call the arguments of all the others."""
    expert = []
    for message in task.expert:
        calls = [
            {
                "type": "function",
                "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])},
            }
            for call in message.get("tool_calls") or []
        ]
        expert.append({**message, "tool_calls": calls or None})
    return {"prompt": task.messages, "expert": expert}


def main() -> None:
    env = make("toybox", train=16, test=1)
    tokenizer = env.tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        trainer = PactGRPOTrainer(
            tiny_model(len(tokenizer)),
            reward,
            GRPOConfig(
                output_dir=folder,
                max_steps=3,
                per_device_train_batch_size=16,
                num_generations=4,
                max_completion_length=16,
                learning_rate=1e-3,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                bf16=False,
            ),
            Dataset.from_list([row(task) for task in env.tasks("train")]),
            processing_class=tokenizer,
            pact=PactConfig(anchor_q=0.4, sft_coef=0.1),
        )
        trainer.train()
    for line in trainer.state.log_history[:3]:
        print(json.dumps({name: round(line[name], 4) for name in SHOWN if name in line}))


if __name__ == "__main__":
    main()
