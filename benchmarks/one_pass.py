"""The one pass against what people write first: the same loss and gradients, side by side in time and memory.

`full`: two padded [G, length] passes (prompt-only, trace-conditioned) and a third for SFT, log-softmax at every
position. `keep`: the same with logits only where they are needed. `tree`: `PactObjective` in mixture mode.

    python benchmarks/one_pass.py --shape cpu    float32 on the CPU; --shape 4b in bfloat16 on a GPU, with fewer layers
    python benchmarks/one_pass.py --shape long   peak memory of a group far over one tree's budget, by rollouts

On a GPU the tree runs on the Triton kernels, `tree flash` on the flash cascade. Equality is checked before any timing,
on a GPU in float32 at the shape `tiny`. A way that runs out of memory says so and the others go on.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from head import Guarded
from measure import MiB, interleaved, interleaved_cuda, peak_cuda_memory, peak_memory, ratio, save
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from pact.groups import Group, PactConfig, Rollout
from pact.objective import PactObjective
from pact.trace import Component, TokenizedTrace

SUFFIX = 4  # tokens between the user's text and the answer: end of turn and generation prompt
CONFIG = PactConfig(anchor_mode="mixture", kl_coef=0.0, entropy_coef=0.0)
ON_GPU = replace(CONFIG, head_backend="triton", attention_backend="triton")


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
    # 4 layers of 36: the ratios hardly change with their number, time and memory do.
    "4b": Shape(2560, 4, 32, 8, 128, 151936, prompt=4096, trace=2048, response=1024, rollouts=16),
    "long": Shape(64, 1, 2, 1, 32, 256, prompt=7000, trace=2000, response=21000, rollouts=16),
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


def build_groups(shape: Shape, model: PreTrainedModel, config: PactConfig = CONFIG) -> list[Group]:
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
    PactObjective(config).attach_logprobs(copy.deepcopy(model), groups)
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        for branch, logp in (rollout.old_logp or {}).items():
            noise = 0.1 * torch.randn(len(logp), generator=generator)
            for edge in (1 - CONFIG.clip_low, 1 + CONFIG.clip_high):
                noise[((-noise).exp() - edge).abs() < 1e-3] = 0.0
            rollout.old_logp[branch] = (torch.tensor(logp) + noise).tolist()
    return groups


def tree_step(model: PreTrainedModel, groups: list[Group], config: PactConfig) -> Tensor:
    """Tree by tree, as a training step does it: only one tree's activations are alive."""
    objective, total = PactObjective(config), torch.zeros((), device=model.device)
    for batch in objective.build(groups, progress=0.0):
        loss = objective.loss(model, batch).loss
        loss.backward()
        total += loss.detach()
    return total


def naive_step(model: PreTrainedModel, groups: list[Group], keep: bool) -> Tensor:
    loss = naive_loss(model, groups, keep)
    loss.backward()
    return loss.detach()


def naive_loss(model: PreTrainedModel, groups: list[Group], keep: bool) -> Tensor:
    """Every sequence on its own; written without pact, from the formulas of the method."""
    z = sum(len(rollout.ids) for group in groups for rollout in group.rollouts)
    z_sft = sum(len(group.trace.ids) for group in groups)
    device = model.device
    loss = torch.zeros((), device=device)
    for group in groups:
        conditioned = group.head_ids + group.context_ids + group.suffix_ids
        for branch, share, prompt in (
            ("prompt", CONFIG.anchor_q, group.head_ids + group.suffix_ids),
            ("trace", 1 - CONFIG.anchor_q, conditioned),
        ):
            responses = [rollout.ids for rollout in group.rollouts]
            ids = torch.tensor([prompt + ids for ids in responses], device=device)
            logp = next_logp(model, ids, len(responses[0]), keep)
            advantage = torch.tensor([rollout.advantage for rollout in group.rollouts], device=device)
            old = torch.tensor([rollout.old_logp[branch] for rollout in group.rollouts], device=device)
            r = (logp - old).exp()
            clipped = r.clamp(1 - CONFIG.clip_low, 1 + CONFIG.clip_high)
            loss = loss - share * torch.minimum(r * advantage, clipped * advantage).sum() / z
        trace = group.trace
        target = torch.tensor([group.head_ids + group.suffix_ids + trace.ids], device=device)
        is_call = torch.tensor(trace.component, device=device) == Component.TOOL_CALL
        weight = torch.where(is_call, CONFIG.tool_call_weight[0], 1.0)
        loss = loss - CONFIG.sft_coef * (weight * next_logp(model, target, len(trace.ids), keep)).sum() / z_sft
    return loss


def next_logp(model: PreTrainedModel, input_ids: Tensor, n: int, keep: bool) -> Tensor:
    """Log-probs [G, n] of the last n tokens of each row."""
    logits = model(input_ids, logits_to_keep=n + 1 if keep else 0, use_cache=False).logits[:, :-1]
    logp = logits.float().log_softmax(-1)
    target = input_ids[:, -logits.shape[1] :, None]
    return logp.gather(-1, target).squeeze(-1)[:, -n:]


STEPS: dict[str, Callable[[PreTrainedModel, list[Group]], Tensor]] = {
    "full": partial(naive_step, keep=False),
    "keep": partial(naive_step, keep=True),
    "tree": partial(tree_step, config=CONFIG),
}
GPU_STEPS = STEPS | {
    "tree": partial(tree_step, config=ON_GPU),
    "tree flash": partial(tree_step, config=replace(ON_GPU, attention_backend="flash")),
}
Steps = dict[str, Callable[[PreTrainedModel, list[Group]], Tensor]]


def step(run: Callable[..., Tensor], model: PreTrainedModel, groups: list[Group]) -> Tensor:
    model.zero_grad()
    return run(model, groups)


def check_equal(steps: Steps, models: dict[str, PreTrainedModel], groups: list[Group]) -> None:
    """Losses within 1e-5, every gradient within 1e-4 of its largest entry; otherwise no number is printed."""
    expected_loss = step(steps["full"], models["full"], groups)
    expected = {name: p.grad.clone() for name, p in models["full"].named_parameters()}
    for way in [way for way in steps if way != "full"]:
        loss = step(steps[way], models[way], groups)
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


def work_of(shape: Shape, groups: list[Group]) -> dict[str, dict[str, float]]:
    """Tokens and flops of each way."""
    paths = naive_paths(shape)
    tokens = shape.groups * sum(n * length for n, length, _ in paths)
    pairs = shape.groups * sum(n * length * (length + 1) // 2 for n, length, _ in paths)
    rows = shape.groups * sum(n * predicted for n, _, predicted in paths)
    batches = PactObjective(CONFIG).build(groups, progress=0.0)
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
    step(STEPS[way], tiny, build_groups(SHAPES["tiny"], tiny))
    model = build_model(shape)
    groups = build_groups(shape, model)
    return peak_memory(lambda: step(STEPS[way], model, groups))


def in_fresh_process(*arguments: str) -> float:
    """MiB that a process of its own prints last.

    With a fixed mmap threshold freed tensors go back to the system at once; otherwise glibc's free lists add hundreds
    of MiB by chance and the figure is no longer that of the tensors alive.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}
    command = [sys.executable, __file__, *arguments]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(run.stdout.split()[-1]) / MiB


def measure_cpu(name: str, repeats: int) -> dict[str, Any]:
    shape = SHAPES[name]
    model = build_model(shape)
    groups = build_groups(shape, model)
    models = {"full": model, "keep": model, "tree": copy.deepcopy(model)}
    check_equal(STEPS, models, groups)
    runs = {way: partial(step, run, models[way], groups) for way, run in STEPS.items()}
    wall, cpu = interleaved(runs, repeats)
    memory = {way: in_fresh_process("--shape", name, "--memory_of", way) for way in STEPS}
    return {"work": work_of(shape, groups), "wall_s": wall, "cpu_s": cpu, "peak_mib": memory, "failed": {}}


def check_flash(model: PreTrainedModel, groups: list[Group]) -> None:
    """The cascade takes 16 bits only: its gradients against those of the Triton kernels, within their rounding."""
    gradients = []
    for way in ("tree", "tree flash"):
        step(GPU_STEPS[way], model, groups)
        gradients.append([p.grad.double().clone() for p in model.parameters()])
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(*gradients)]
    if not max(errors) <= 0.1:
        raise AssertionError(f"a gradient of tree flash differs from that of tree by {max(errors):.1e} of its norm")
    print(f"gate: tree flash equals tree in bfloat16 (worst gradient {max(errors):.0e} of its norm)", flush=True)


def measure_gpu(name: str, repeats: int) -> dict[str, Any]:
    shape, tiny = SHAPES[name], SHAPES["tiny"]
    small = build_model(tiny).cuda()
    small_groups = build_groups(tiny, small)
    exact = {way: run for way, run in GPU_STEPS.items() if way != "tree flash"}
    check_equal(exact, {way: copy.deepcopy(small) for way in exact}, small_groups)
    check_flash(small.bfloat16(), small_groups)
    naive = build_model(shape).cuda().bfloat16()
    groups = build_groups(shape, naive)
    ours = copy.deepcopy(naive)
    runs = {
        way: Guarded(way, partial(step, run, ours if "tree" in way else naive, groups))
        for way, run in GPU_STEPS.items()
    }
    memory = {}
    for way, run in runs.items():  # also compiles
        ours.zero_grad()
        naive.zero_grad()
        memory[way] = peak_cuda_memory(run) / MiB
    alive = {way: run for way, run in runs.items() if not run.failure}
    wall = interleaved_cuda(alive, repeats)
    failed = {way: run.failure for way, run in runs.items() if run.failure}
    work = work_of(shape, groups)
    return {"work": work | {"tree flash": work["tree"]}, "wall_s": wall, "peak_mib": memory, "failed": failed}


def compare(name: str, repeats: int) -> None:
    """Measure all ways, print the table and save it."""
    shape = SHAPES[name]
    result = (measure_gpu if torch.cuda.is_available() else measure_cpu)(name, repeats)
    wall, memory, work = result["wall_s"], result["peak_mib"], result["work"]
    print(f"shape {name}: {asdict(shape)}, {torch.get_num_threads()} threads, median of {repeats} interleaved rounds")
    print(f"{'way':10} {'tokens':>7} {'Tflop':>7} {'seconds':>8} {'peak MiB above weights':>23}")
    for way, done in work.items():
        if way in result["failed"]:
            print(f"{way:10} failed: {result['failed'][way]}")
            continue
        seconds, tflop = median(wall[way]), done["flops"] / 1e12
        print(f"{way:10} {done['tokens']:7d} {tflop:7.2f} {seconds:8.3f} {memory[way]:23.0f}")
    ratios = {}
    for ours, way in [(o, w) for o in wall if "tree" in o for w in ("full", "keep") if w in wall]:
        r = ratios[way if ours == "tree" else f"{way}, {ours}"] = {
            "wall": ratio(wall, way, ours),
            "flop_ceiling": work[way]["flops"] / work["tree"]["flops"],
            "memory": memory[way] / memory[ours],
        }
        if "cpu_s" in result:
            r["cpu"] = ratio(result["cpu_s"], way, ours)
        print(
            f"{ours} against {way}: {r['wall']:.2f} x the speed, {r['wall'] / r['flop_ceiling']:.0%} of the flop "
            f"ceiling {r['flop_ceiling']:.2f}; 1/{r['memory']:.1f} of the memory"
        )
    print(f"written to {save(f'one_pass_{name}', {'shape': asdict(shape), **result, 'tree_against': ratios})}")


def long_group(rollouts: int, budget: int) -> tuple[int, int]:
    """(number of trees, peak bytes above the weights) of one step on one group cut into trees of ``budget`` tokens."""
    shape = replace(SHAPES["long"], rollouts=rollouts)
    model = build_model(shape)
    config = replace(CONFIG, token_budget=budget)
    groups = build_groups(shape, model, config)
    trees = len(PactObjective(config).build(groups, progress=0.0))
    return trees, peak_memory(lambda: tree_step(model, groups, config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory_of", choices=STEPS, help="print the peak bytes of one way in this process, and stop")
    parser.add_argument("--rollouts", type=int, help="with --shape long: print the peak bytes of one step, and stop")
    parser.add_argument("--budget", type=int, default=32768, help="with --shape long: most tokens of a tree")
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(memory_of(arguments.memory_of, SHAPES[arguments.shape]))
    elif arguments.rollouts:
        print(*long_group(arguments.rollouts, arguments.budget))
    elif arguments.shape == "long":
        own = ("--shape", "long", "--budget", str(arguments.budget), "--rollouts")
        peaks = {rollouts: in_fresh_process(*own, str(rollouts)) for rollouts in (1, 4, 16)}
        for rollouts, mib in peaks.items():
            print(f"{rollouts:2d} rollouts of {SHAPES['long'].response} tokens on two branches: peak {mib:.0f} MiB")
        result = {"shape": asdict(SHAPES["long"]), "budget": arguments.budget, "peak_mib": peaks}
        print(f"written to {save('one_pass_long', result)}")
    else:
        compare(arguments.shape, arguments.repeats)


if __name__ == "__main__":
    main()
