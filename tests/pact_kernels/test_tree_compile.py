"""Tree attention of every backend under torch.compile and activation checkpointing: same numbers, no graph break."""

from __future__ import annotations

import pytest
import torch
from oracles import DEVICE
from torch.utils.checkpoint import checkpoint
from trees import BACKENDS, group, inputs, output_and_gradients

from pact_kernels.prefix_tree import PrefixTree
from pact_kernels.tree_attention import flash, ops, tiled, tree_attention, work

every_backend = pytest.mark.parametrize("backend", BACKENDS)
PLANS = {"torch": tiled.PLANS, "triton": work.KEY_LISTS, "flash": flash.PLANS}


def problem(backend: str, seed: int = 0):
    """On a GPU the flash backend takes 16-bit operands only."""
    dtype = torch.bfloat16 if backend == "flash" and DEVICE.type == "cuda" else torch.float32
    tree = PrefixTree.from_sequences(group(30, 9, [20, 7 + seed], seed)).to(DEVICE)
    qkv, grad_out = inputs(len(tree), 2, 1, 16, dtype, seed=seed)
    return tree, [x.detach().to(DEVICE).requires_grad_() for x in qkv], grad_out.to(DEVICE)


def assert_same(found, expected) -> None:
    """Equal, but for the order in which the GPU's flash operators add up dQ."""
    for got, wanted in zip(found, expected):
        eps = torch.finfo(torch.bfloat16 if DEVICE.type == "cuda" else wanted.dtype).eps
        rounding = 2 * eps * max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(got, wanted, rtol=0, atol=rounding)


def layer(q, k, v, tree, backend):
    """More than the operator alone, so that something is recomputed."""
    return torch.tanh(tree_attention(2 * q, k.sin(), v, tree, backend=backend)) * q


@every_backend
def test_compiles_without_a_graph_break(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for seed in range(3):  # other lengths too
        tree, qkv, grad_out = problem(backend, seed)
        plain = output_and_gradients(lambda *x, t=tree: layer(*x, t, backend), qkv, grad_out)
        mine = output_and_gradients(lambda *x, t=tree: compiled(*x, t, backend), qkv, grad_out)
        assert_same(mine, plain)


def test_auto_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    tree, qkv, _ = problem("auto")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*qkv, tree, "auto"), layer(*qkv, tree, "auto"))


@every_backend
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients_from_one_plan(backend: str, use_reentrant: bool) -> None:
    tree, qkv, grad_out = problem(backend)
    plain = output_and_gradients(lambda *x: layer(*x, tree, backend), qkv, grad_out)
    n_plans = len(PLANS[backend])
    out = checkpoint(layer, *qkv, tree, backend, use_reentrant=use_reentrant)
    out.backward(grad_out)
    assert_same((out, *(x.grad for x in qkv)), plain)
    assert len(PLANS[backend]) == n_plans


@every_backend
def test_a_second_derivative_is_an_error(backend: str) -> None:
    tree, qkv, _ = problem(backend)
    (first,) = torch.autograd.grad(tree_attention(*qkv, tree, backend=backend).sum(), qkv[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        first.sum().backward()


@every_backend
def test_under_autocast_it_computes_in_its_dtype_and_sums_in_float32(backend: str) -> None:
    tree, qkv, grad_out = problem("torch")
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        mine = output_and_gradients(lambda *x: tree_attention(*x, tree, backend=backend), qkv, grad_out.bfloat16())
    rounded = [x.detach().bfloat16().requires_grad_() for x in qkv]
    plain = output_and_gradients(lambda *x: tree_attention(*x, tree, backend=backend), rounded, grad_out.bfloat16())
    assert mine[0].dtype == torch.bfloat16
    assert torch.equal(mine[0], plain[0])
    assert all(got.dtype == torch.float32 for got in mine[1:])
    assert_same(mine[1:], [x.float() for x in plain[1:]])


@every_backend
def test_float64_stays_float64_under_autocast(backend: str) -> None:
    tree, qkv, _ = problem("torch")
    qkv = [x.detach().double() for x in qkv]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        if backend == "torch":
            assert tree_attention(*qkv, tree, backend=backend).dtype == torch.float64
        elif backend == "triton":
            with pytest.raises(TypeError, match="use backend='torch' for float64"):
                tree_attention(*qkv, tree, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_registration(backend: str) -> None:
    operator = {"triton": ops.tree_triton, "torch": tiled.tree_tiled, "flash": flash.tree_flash}[backend]
    tree, qkv, _ = problem(backend)
    torch.library.opcheck(operator, (*qkv, tree.subtree_end, 0.25))
