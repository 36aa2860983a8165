"""The memory estimate of `pact.memory` against real training steps: peak resident memory above the weights, on a CPU.

    python benchmarks/memory_estimate.py    about five minutes on two cores

Every figure is from a process of its own, whose high-water mark is reset before the step. A step is forward and
backward of one prompt group in one tree, rollouts on both branches and the trace, with the default backends; in the
cases `accumulated`, gradients of a tree before it are there already.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from measure import MiB, peak_memory, save
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pact.arguments import PactTrainingArguments
from pact.groups import Group, PactConfig, Rollout
from pact.memory import Shadow, autocast_dtype, checkpoints
from pact.objective import PactObjective
from pact.trace import Component, TokenizedTrace

VOCAB, HIDDEN, LAYERS = 8192, 512, 6
TOKENS = (2048, 4096, 8192)
BF16_TOKENS = (512, 1024, 2048)  # CPUs that emulate bfloat16 take minutes for more
CONFIG = PactConfig(anchor_mode="mixture", kl_coef=0.0)
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "accumulated": {},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "lora": {},
    "llama, untied": {},
}


def build(case: str) -> nn.Module:
    """Qwen3 with tied embeddings, or Llama without; weights in float32."""
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": max(TOKENS),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if case.startswith("llama"):
        return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True))
    if case != "lora":
        return model
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", exclude_modules=["lm_head"]))


def arguments(case: str) -> PactTrainingArguments:
    return PactTrainingArguments(output_dir=tempfile.gettempdir(), use_cpu=True, report_to="none", **CASES[case])


def group_of(tokens: int) -> Group:
    """A prompt, a trace and rollouts that make a tree of about ``tokens`` tokens: 1/4, 1/8 and the rest."""
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(VOCAB, (n,), generator=generator).tolist()

    prompt, trace, rollouts = tokens // 4, tokens // 8, 4
    response = (tokens - prompt - 2 * trace) // (2 * rollouts)
    component = [int(Component.REASONING)] * (trace // 2) + [int(Component.TOOL_CALL)] * (trace - trace // 2)
    segment = [t // 16 if t < trace // 2 else -1 for t in range(trace)]
    made = [Rollout(ids(response), [1] * response, [(-1.0) ** i] * response) for i in range(rollouts)]
    return Group(ids(prompt), ids(4), ids(trace), TokenizedTrace(ids(trace), component, segment), made)


def step(model: nn.Module, case: str, tokens: int) -> Callable[[], None]:
    """One forward and backward, ready to run."""
    objective, dtype = PactObjective(CONFIG), autocast_dtype(arguments(case))
    (batch,) = objective.build([group_of(tokens)], progress=0.0)

    def run() -> None:
        with torch.autocast("cpu", dtype) if dtype is not None else nullcontext():
            loss = objective.loss(model, batch).loss
        loss.backward()

    return run


def tokens_of(tokens: int) -> int:
    (batch,) = PactObjective(CONFIG).build([group_of(tokens)], progress=0.0)
    return batch.tokens


def measured(case: str, tokens: int) -> int:
    """Peak bytes above the weights of one real step; a small one first loads what libraries load."""
    torch.manual_seed(0)
    model = build(case).train()
    if checkpoints(arguments(case)):
        model.gradient_checkpointing_enable()
    step(model, case, 64)()
    if case != "accumulated":
        model.zero_grad(set_to_none=True)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return peak_memory(step(model, case, tokens)) + gradients


def in_fresh_process(case: str, tokens: int) -> int:
    """With a fixed mmap threshold freed tensors go back to the system at once (glibc): else its free lists count."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}
    command = [sys.executable, __file__, "--case", case, "--tokens", str(tokens)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(run.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="print the peak bytes of one step in this process, and stop")
    parser.add_argument("--tokens", type=int, default=TOKENS[0])
    asked = parser.parse_args()
    if asked.case:
        print(measured(asked.case, asked.tokens))
        return
    rows = []
    print(f"{'case':15} {'tokens':>7} {'estimate, MiB':>14} {'measured, MiB':>14} {'ratio':>6}")
    for case in CASES:
        shadow = Shadow(lambda case=case: build(case), CONFIG, arguments(case))
        for size in BF16_TOKENS if case == "bf16" else TOKENS:
            tokens = tokens_of(size)
            expected = shadow.step(tokens, accumulates=case == "accumulated").peak
            real = in_fresh_process(case, size)
            rows.append({"case": case, "tokens": tokens, "estimate_mib": expected / MiB, "measured_mib": real / MiB})
            print(
                f"{case:15} {tokens:7,} {expected / MiB:14,.0f} {real / MiB:14,.0f} {expected / real:6.3f}", flush=True
            )
    ratios = [row["estimate_mib"] / row["measured_mib"] for row in rows]
    print(f"estimate / measured: {min(ratios):.3f} to {max(ratios):.3f}")
    print(f"written to {save('memory_estimate_cpu', {'rows': rows, 'ratio': [min(ratios), max(ratios)]})}")


if __name__ == "__main__":
    main()
