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


def problem(seed: int = 0):
    tree = PrefixTree.from_sequences(group(30, 9, [20, 7 + seed], seed)).to(DEVICE)
    qkv, grad_out = inputs(len(tree), 2, 1, 16, seed=seed)
    return tree, [x.detach().to(DEVICE).requires_grad_() for x in qkv], grad_out.to(DEVICE)


def layer(q, k, v, tree, backend):
    """More than the operator alone, so that something is recomputed."""
    return torch.tanh(tree_attention(2 * q, k.sin(), v, tree, backend=backend)) * q


@every_backend
def test_compiles_without_a_graph_break(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for seed in range(3):  # other lengths too
        tree, qkv, grad_out = problem(seed)
        plain = output_and_gradients(lambda *x, t=tree: layer(*x, t, backend), qkv, grad_out)
        mine = output_and_gradients(lambda *x, t=tree: compiled(*x, t, backend), qkv, grad_out)
        for got, wanted in zip(mine, plain):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_auto_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    tree, qkv, _ = problem()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*qkv, tree, "auto"), layer(*qkv, tree, "auto"))


@every_backend
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients_from_one_plan(backend: str, use_reentrant: bool) -> None:
    tree, qkv, grad_out = problem()
    plain = output_and_gradients(lambda *x: layer(*x, tree, backend), qkv, grad_out)
    n_plans = len(PLANS[backend])
    out = checkpoint(layer, *qkv, tree, backend, use_reentrant=use_reentrant)
    out.backward(grad_out)
    assert all(torch.equal(x, y) for x, y in zip((out, *(x.grad for x in qkv)), plain))
    assert len(PLANS[backend]) == n_plans


@every_backend
def test_a_second_derivative_is_an_error(backend: str) -> None:
    tree, qkv, _ = problem()
    (first,) = torch.autograd.grad(tree_attention(*qkv, tree, backend=backend).sum(), qkv[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        first.sum().backward()


@every_backend
def test_under_autocast_it_computes_in_its_dtype_and_sums_in_float32(backend: str) -> None:
    tree, qkv, grad_out = problem()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        mine = output_and_gradients(lambda *x: tree_attention(*x, tree, backend=backend), qkv, grad_out.bfloat16())
    rounded = [x.detach().bfloat16().requires_grad_() for x in qkv]
    plain = output_and_gradients(lambda *x: tree_attention(*x, tree, backend=backend), rounded, grad_out.bfloat16())
    assert mine[0].dtype == torch.bfloat16
    assert torch.equal(mine[0], plain[0])
    assert all(got.dtype == torch.float32 and torch.equal(got, x.float()) for got, x in zip(mine[1:], plain[1:]))


@pytest.mark.parametrize("operator", [ops.tree_triton, tiled.tree_tiled, flash.tree_flash])
def test_operator_registration(operator) -> None:
    tree, qkv, _ = problem()
    torch.library.opcheck(operator, (*qkv, tree.subtree_end, 0.25))
