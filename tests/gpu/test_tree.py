"""Tree attention at sizes that only a GPU can take. Needs torch, triton and pytest: `make gpu`."""

from __future__ import annotations

import pytest
import torch

from pact_kernels import PrefixTree, tree_attention
from pact_kernels.tree_attention.reference import tree_attention_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
BACKENDS = ("triton", "flash")


def group(prompt: int, trace: int, response: int, rollouts: int, seed: int = 0) -> PrefixTree:
    """Both branches of one prompt group, on the GPU."""
    g = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(50_000, (n,), generator=g).tolist()

    x, c, ys = ids(prompt), ids(trace), [ids(response) for _ in range(rollouts)]
    return PrefixTree.from_sequences([x + y for y in ys] + [x + c + y for y in ys]).to("cuda")


def operands(tree: PrefixTree, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.bfloat16):
    """q, k, v that need gradients, and dout; head by head in memory, as models hand them over."""
    g = torch.Generator("cuda").manual_seed(1)
    made = (torch.randn(n, len(tree), dim, generator=g, device="cuda") for n in (heads, kv_heads, kv_heads, heads))
    q, k, v, dout = (x.to(dtype).transpose(0, 1) for x in made)
    return [x.requires_grad_() for x in (q, k, v)], dout


def results(tree: PrefixTree, qkv: list[torch.Tensor], dout: torch.Tensor, backend: str) -> list[torch.Tensor]:
    out = tree_attention(*qkv, tree, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, qkv, dout)]


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (8, 2, 128), (8, 1, 96), (2, 2, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_against_float64(backend: str, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    tree = group(700, 300, 150, 4)
    qkv, dout = operands(tree, heads, kv_heads, dim, dtype)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    out = tree_attention_reference(*exact, tree.subtree_end)
    wanted = [out.detach(), *torch.autograd.grad(out, exact, dout.double())]
    allowed = 1e-2 if dtype == torch.bfloat16 else 2e-3
    for mine, expected in zip(results(tree, qkv, dout, backend), wanted, strict=True):
        assert relative(mine, expected) < allowed


def test_float32_is_not_tf32() -> None:
    tree = group(300, 100, 90, 3)
    qkv, dout = operands(tree, 4, 2, 128, torch.float32)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    out = tree_attention_reference(*exact, tree.subtree_end)
    wanted = [out.detach(), *torch.autograd.grad(out, exact, dout.double())]
    for mine, expected in zip(results(tree, qkv, dout, "triton"), wanted, strict=True):
        assert relative(mine, expected) < 2e-6


def check_that_the_backends_agree(tree: PrefixTree, heads: int, kv_heads: int) -> None:
    qkv, dout = operands(tree, heads, kv_heads, 128)
    found = [results(tree, qkv, dout, backend) for backend in BACKENDS]
    for mine, other in zip(*found, strict=True):
        assert relative(mine, other) < 1e-2


def test_both_backends_agree_on_the_reference_shape() -> None:
    check_that_the_backends_agree(group(4096, 2048, 1024, 16), 32, 8)


def test_a_million_tokens() -> None:
    """2^20 tokens in one row, and int32 offsets far behind: one head checked against the cascade."""
    tree = group(16_384, 2_000, 32_300, 16)
    assert len(tree) > 2**20
    check_that_the_backends_agree(tree, 2, 1)


def test_two_runs_are_bitwise_equal() -> None:
    """No atomics: split lists of queries are joined in order."""
    tree = group(2000, 500, 1500, 8)
    qkv, dout = operands(tree, 8, 1, 128)
    runs = [results(tree, qkv, dout, "triton") for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_that_of_the_operands(backend: str) -> None:
    """No mask, no copies of the prefix: with output and gradients less than four times the operands."""
    tree = group(4096, 2048, 1024, 16)
    qkv, dout = operands(tree, 32, 8, 128)
    results(tree, qkv, dout, backend)  # plans
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results(tree, qkv, dout, backend)
    kept = sum(x.numel() * x.itemsize for x in (*qkv, qkv[0]))
    assert torch.cuda.max_memory_allocated() - before < 4 * kept
