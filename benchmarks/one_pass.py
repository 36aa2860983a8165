"""The one pass against what people write first: the same loss and gradients, side by side in time and memory.

`full`: two padded [G, length] passes (prompt-only, trace-conditioned) and a third for SFT, log-softmax at every
position. `keep`: the same with logits only where they are needed. `tree`: `PactObjective` in mixture mode.

    python benchmarks/one_pass.py --shape cpu
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import torch
from measure import MiB, interleaved, peak_memory, ratio, save
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from pact.groups import Group, PactConfig, Rollout
from pact.objective import CoTrainBatch, PactObjective
from pact.trace import Component, TokenizedTrace

SUFFIX = 4  # tokens between the user's text and the answer: end of turn and generation prompt
CONFIG = PactConfig(anchor_mode="mixture", kl_coef=0.0, entropy_coef=0.0)


@dataclass(frozen=True)
class Shape:
    """A model and the lengths of its prompt groups, in tokens."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    prompt: int
    trace: int
    response: int
    rollouts: int
    groups: int = 1


SHAPES = {
    "cpu": Shape(512, 4, 8, 4, 64, 8192, prompt=1024, trace=512, response=256, rollouts=8),
    "toybox": Shape(128, 4, 4, 2, 32, 512, prompt=150, trace=120, response=150, rollouts=16, groups=4),
    "tiny": Shape(64, 2, 2, 1, 32, 256, prompt=40, trace=20, response=10, rollouts=3),
}


def build_model(shape: Shape) -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=3 * shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=shape.prompt + shape.trace + shape.response,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).train()


def build_groups(shape: Shape, model: PreTrainedModel) -> list[Group]:
    """Random groups whose old log-probs lie so near the model's that some tokens are clipped and most are not.

    No ratio lies within 1e-3 of a clip edge, where rounding alone would decide whether a token has a gradient.
    """
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(shape.vocab, (n,), generator=generator).tolist()

    half = shape.trace // 2
    component = [Component.REASONING] * half + [Component.TOOL_CALL] * (shape.trace - half)
    segment = [t // 16 for t in range(half)] + [-1] * (shape.trace - half)
    groups = []
    for _ in range(shape.groups):
        trace = TokenizedTrace(ids(shape.trace), [int(c) for c in component], segment)
        advantages = torch.randn(shape.rollouts, generator=generator).tolist()
        rollouts = [Rollout(ids(n), [1] * n, [a] * n) for a in advantages for n in [shape.response]]
        groups.append(Group(ids(shape.prompt - SUFFIX), ids(SUFFIX), ids(shape.trace - SUFFIX), trace, rollouts))
    PactObjective(CONFIG).attach_logprobs(copy.deepcopy(model), groups)
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        for branch, logp in (rollout.old_logp or {}).items():
            noise = 0.1 * torch.randn(len(logp), generator=generator)
            for edge in (1 - CONFIG.clip_low, 1 + CONFIG.clip_high):
                noise[((-noise).exp() - edge).abs() < 1e-3] = 0.0
            rollout.old_logp[branch] = (torch.tensor(logp) + noise).tolist()
    return groups


def build_batches(groups: list[Group]) -> list[CoTrainBatch]:
    return PactObjective(CONFIG).build(groups, progress=0.0)


def tree_loss(model: PreTrainedModel, groups: list[Group]) -> Tensor:
    objective = PactObjective(CONFIG)
    return torch.stack([objective.loss(model, batch).loss for batch in build_batches(groups)]).sum()


def naive_loss(model: PreTrainedModel, groups: list[Group], keep: bool) -> Tensor:
    """Every sequence on its own; written without pact, from the formulas of the method."""
    z = sum(len(rollout.ids) for group in groups for rollout in group.rollouts)
    z_sft = sum(len(group.trace.ids) for group in groups)
    loss = torch.zeros(())
    for group in groups:
        conditioned = group.head_ids + group.context_ids + group.suffix_ids
        for branch, share, prompt in (
            ("prompt", CONFIG.anchor_q, group.head_ids + group.suffix_ids),
            ("trace", 1 - CONFIG.anchor_q, conditioned),
        ):
            responses = [rollout.ids for rollout in group.rollouts]
            logp = next_logp(model, torch.tensor([prompt + ids for ids in responses]), len(responses[0]), keep)
            advantage = torch.tensor([rollout.advantage for rollout in group.rollouts])
            r = (logp - torch.tensor([rollout.old_logp[branch] for rollout in group.rollouts])).exp()
            clipped = r.clamp(1 - CONFIG.clip_low, 1 + CONFIG.clip_high)
            loss = loss - share * torch.minimum(r * advantage, clipped * advantage).sum() / z
        trace = group.trace
        target = torch.tensor([group.head_ids + group.suffix_ids + trace.ids])
        is_call = torch.tensor(trace.component) == Component.TOOL_CALL
        weight = torch.where(is_call, CONFIG.tool_call_weight[0], 1.0)
        loss = loss - CONFIG.sft_coef * (weight * next_logp(model, target, len(trace.ids), keep)).sum() / z_sft
    return loss


def next_logp(model: PreTrainedModel, input_ids: Tensor, n: int, keep: bool) -> Tensor:
    """Log-probs [G, n] of the last n tokens of each row."""
    logits = model(input_ids, logits_to_keep=n + 1 if keep else 0, use_cache=False).logits[:, :-1]
    logp = logits.log_softmax(-1)
    target = input_ids[:, -logits.shape[1] :, None]
    return logp.gather(-1, target).squeeze(-1)[:, -n:]


LOSSES: dict[str, Callable[[PreTrainedModel, list[Group]], Tensor]] = {
    "full": partial(naive_loss, keep=False),
    "keep": partial(naive_loss, keep=True),
    "tree": tree_loss,
}


def step(way: str, model: PreTrainedModel, groups: list[Group]) -> Tensor:
    model.zero_grad()
    loss = LOSSES[way](model, groups)
    loss.backward()
    return loss.detach()


def check_equal(models: dict[str, PreTrainedModel], groups: list[Group]) -> None:
    """Losses within 1e-5, every gradient within 1e-4 of its largest entry; otherwise no number is printed."""
    expected_loss = step("full", models["full"], groups)
    expected = {name: p.grad.clone() for name, p in models["full"].named_parameters()}
    for way in ("keep", "tree"):
        loss = step(way, models[way], groups)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
        errors = {n: float((p.grad - expected[n]).abs().max()) for n, p in models[way].named_parameters()}
        worst = max(errors, key=lambda name: errors[name] / float(expected[name].abs().max()))
        relative = errors[worst] / float(expected[worst].abs().max())
        if not relative <= 1e-4:
            raise AssertionError(f"gradient of {worst} differs between {way} and full by {relative:.1e} of its maximum")
        print(
            f"gate: {way} equals full (loss {float(loss):.6f}, worst gradient {relative:.0e} of its maximum)",
            flush=True,
        )


def naive_paths(shape: Shape) -> list[tuple[int, int, int]]:
    """(number, length, predicted tokens) of the naive sequences of one group."""
    with_context = shape.prompt + shape.trace - SUFFIX + shape.response
    return [
        (shape.rollouts, shape.prompt + shape.response, shape.response),
        (shape.rollouts, with_context, shape.response),
        (1, shape.prompt + shape.trace, shape.trace),
    ]


def flops(shape: Shape, tokens: int, pairs: int, head_rows: int) -> float:
    """Forward and backward: 3 matmuls of 2 flops a weight and token, and 7 (2 + 5) of 2 flops a pair and channel."""
    attention_weights = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    weights = shape.layers * (attention_weights + 3 * shape.hidden * 3 * shape.hidden)
    attention = shape.layers * 14 * pairs * shape.heads * shape.head_dim
    return 6 * tokens * weights + attention + 6 * head_rows * shape.hidden * shape.vocab


def work_of(shape: Shape, batches: list[CoTrainBatch]) -> dict[str, dict[str, float]]:
    """Tokens and flops of each way."""
    paths = naive_paths(shape)
    tokens = shape.groups * sum(n * length for n, length, _ in paths)
    pairs = shape.groups * sum(n * length * (length + 1) // 2 for n, length, _ in paths)
    rows = shape.groups * sum(n * predicted for n, _, predicted in paths)
    trees = [batch.tree for batch in batches if batch.tree is not None]
    tree_tokens, tree_pairs = sum(len(tree) for tree in trees), sum(tree.pairs for tree in trees)
    return {
        "full": {"tokens": tokens, "flops": flops(shape, tokens, pairs, tokens)},
        "keep": {"tokens": tokens, "flops": flops(shape, tokens, pairs, rows)},
        "tree": {"tokens": tree_tokens, "flops": flops(shape, tree_tokens, tree_pairs, rows)},
    }


def memory_of(way: str, shape: Shape) -> int:
    """Peak bytes above the weights of one step, in this process; a small step first loads what libraries load."""
    tiny = build_model(SHAPES["tiny"])
    tiny_groups = build_groups(SHAPES["tiny"], tiny)
    step(way, tiny, tiny_groups)
    model = build_model(shape)
    groups = build_groups(shape, model)
    return peak_memory(lambda: step(way, model, groups))


def memory_in_fresh_processes(name: str) -> dict[str, float]:
    """MiB of each way, each in a process of its own.

    With a fixed mmap threshold freed tensors go back to the system at once; otherwise glibc's free lists add hundreds
    of MiB by chance and the figure is no longer that of the tensors alive.
    """
    result = {}
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}
    for way in LOSSES:
        command = [sys.executable, __file__, "--shape", name, "--memory_of", way]
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        result[way] = int(run.stdout.split()[-1]) / MiB
    return result


def compare(name: str, repeats: int) -> None:
    shape = SHAPES[name]
    model = build_model(shape)
    groups = build_groups(shape, model)
    models = {"full": model, "keep": model, "tree": copy.deepcopy(model)}
    check_equal(models, groups)
    work = work_of(shape, build_batches(groups))
    wall, cpu = interleaved({way: partial(step, way, models[way], groups) for way in LOSSES}, repeats)
    memory = memory_in_fresh_processes(name)
    print(f"shape {name}: {asdict(shape)}, {torch.get_num_threads()} threads, median of {repeats} interleaved rounds")
    print(f"{'way':5} {'tokens':>7} {'Tflop':>6} {'wall s':>7} {'CPU s':>7} {'peak MiB above weights':>23}")
    for way, done in work.items():
        tflop, mib = done["flops"] / 1e12, memory[way]
        print(f"{way:5} {done['tokens']:7d} {tflop:6.2f} {median(wall[way]):7.2f} {median(cpu[way]):7.2f} {mib:23.0f}")
    ratios = {}
    for way in ("full", "keep"):
        ratios[way] = {
            "wall": ratio(wall, way, "tree"),
            "cpu": ratio(cpu, way, "tree"),
            "flop_ceiling": work[way]["flops"] / work["tree"]["flops"],
            "memory": memory[way] / memory["tree"],
        }
        r = ratios[way]
        print(
            f"tree against {way}: {r['wall']:.2f} x the speed ({r['cpu']:.2f} by CPU time, flop ceiling "
            f"{r['flop_ceiling']:.2f}), "
            f"1/{r['memory']:.1f} of the memory"
        )
    result = {
        "shape": asdict(shape),
        "work": work,
        "wall_s": wall,
        "cpu_s": cpu,
        "peak_mib": memory,
        "tree_against": ratios,
    }
    print(f"written to {save(f'one_pass_{name}', result)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory_of", choices=LOSSES, help="print the peak bytes of one way in this process, and stop")
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(memory_of(arguments.memory_of, SHAPES[arguments.shape]))
    else:
        compare(arguments.shape, arguments.repeats)


if __name__ == "__main__":
    main()
