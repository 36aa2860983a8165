"""The flash backend of tree attention by the error rule: its cascade on the CPU operators, on a GPU where there is one,
and through stand-ins for the GPU operators that have their signatures, shapes and roundings."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DEVICE, assert_within
from torch import Tensor
from trees import group, inputs, output_and_gradients

from pact_kernels.prefix_tree import PrefixTree
from pact_kernels.tree_attention import flash, providers
from pact_kernels.tree_attention.flash import tree_flash
from pact_kernels.tree_attention.reference import tree_attention_reference, visible


def flash_tree_attention(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float) -> Tensor:
    return tree_flash(q, k, v, subtree_end, scale)[0]


def chain(levels: int, step: int) -> list[list[int]]:
    """Sequences that leave a common path one after the other: as many segments above the last ones."""
    path = list(range(levels * step))
    return [path[: (level + 1) * step] + [1000 + level] * (1 + level % 3) for level in range(levels)] + [path]


TREES = {
    "one token": [[1]],
    "one path": [[1] * 70],
    "a group": group(37, 21, [50, 9, 33]),
    "siblings at offset 57": [[1] * 57 + [i] * 20 for i in range(2, 6)],
    "many roots": [[i] * n for i, n in enumerate((1, 31, 32, 33, 64, 5, 1, 1))],
    "roots of one token": [[i] for i in range(9)],
    "short siblings": [[1, 2, 3, i] for i in range(40)],
    "prefix of another": [[1, 2, 3], [1, 2, 3, 4, 5], [1], [1, 2, 9]],
    "deep": chain(8, 4),
    "deep and wide": [[*range(i % 9), 50 + i % 4, *range(i % 5), 90 + i] for i in range(60)],
}


def turned(x: Tensor, a: int, b: int) -> Tensor:
    """The same numbers with the strides of dimensions ``a`` and ``b`` exchanged."""
    return x.detach().transpose(a, b).contiguous().transpose(a, b)


def within_the_rule(
    sequences, heads=4, kv_heads=2, dim=16, dtype=torch.float32, scale=0.3, device=None, turn=(0, 0)
) -> None:
    """Output and gradients: twice the error of the dense formula in the input's dtype, plus rounding."""
    device = (DEVICE if dtype in providers.GPU_DTYPES else "cpu") if device is None else device
    tree = PrefixTree.from_sequences(sequences).to(device)
    qkv, grad_out = inputs(len(tree), heads, kv_heads, dim, dtype)
    qkv = [turned(x.to(device), *turn).requires_grad_() for x in qkv]
    grad_out = turned(grad_out.to(device), *turn)
    exact_qkv = [x.detach().double().requires_grad_() for x in qkv]

    def dense(q, k, v):
        return tree_attention_reference(q, k, v, tree.subtree_end, scale)

    exact = output_and_gradients(dense, exact_qkv, grad_out.double())
    plain = output_and_gradients(dense, qkv, grad_out)
    mine = output_and_gradients(lambda q, k, v: flash_tree_attention(q, k, v, tree.subtree_end, scale), qkv, grad_out)
    # In float64 the plain computation is the exact one, so it has no error to measure by.
    units = 64 if dtype == torch.float64 else 4
    # dS is a difference of numbers as large as the incoming gradient: dq and dk are 0 for a root of one token.
    rounding = units * torch.finfo(dtype).eps * max(x.abs().max().item() for x in (grad_out, *exact))
    for name, got, same, wanted in zip(("out", "dq", "dk", "dv"), mine, plain, exact):
        assert got.dtype == dtype
        assert got.is_contiguous()  # as the fake kernels promise
        assert_within(name, got, same, wanted, rounding)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_error_rule(tree: str, dtype: torch.dtype) -> None:
    within_the_rule(TREES[tree], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 24, 64, 96, 128, 256])
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    within_the_rule(TREES["a group"][:3], dim=dim, dtype=dtype, scale=dim**-0.5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 1), (8, 2), (8, 1), (3, 1)])
def test_grouped_heads(heads: int, kv_heads: int) -> None:
    within_the_rule(TREES["a group"], heads, kv_heads)
    within_the_rule(TREES["short siblings"], heads, kv_heads, dtype=torch.float16)


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=12))
def test_random_trees(sequences: list[list[int]]) -> None:
    within_the_rule(sequences, heads=2, kv_heads=1, dim=8, dtype=torch.float64)


def test_large_scores() -> None:
    # Log-sum-exps of about 1,000 are known to 6e-5 only: weights made of them one by one would not add up to 1.
    tree = PrefixTree.from_sequences(TREES["deep"])
    (q, k, _), _ = inputs(len(tree), 2, 2, 16)
    v = torch.ones(len(tree), 2, 16)
    out = flash_tree_attention(q.detach(), k.detach(), v, tree.subtree_end, 100.0)
    torch.testing.assert_close(out, v, rtol=0, atol=1e-6)


def test_log_sum_exp() -> None:
    tree = PrefixTree.from_sequences(TREES["a group"])
    (q, k, v), _ = inputs(len(tree), 4, 2, 16, torch.float64)
    _, lse_HL = tree_flash(q, k, v, tree.subtree_end, 0.3)
    score_HLL = 0.3 * torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, dim=1))
    exact = score_HLL.masked_fill(~visible(tree.subtree_end), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse_HL, exact, rtol=0, atol=1e-12)
    assert tree_flash(*(x.bfloat16() for x in (q, k, v)), tree.subtree_end, 0.3)[1].dtype == torch.float32


# --- the cascade ---


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=12))
def test_segments_are_those_of_the_tree(sequences: list[list[int]]) -> None:
    tree = PrefixTree.from_sequences(sequences)
    start, stop, last, level = flash.segments(tree.subtree_end.numpy().astype(np.int64))
    known, depth = tree.segments, []
    for parent in known.parent.tolist():
        depth.append(depth[parent] + 1 if parent >= 0 else 0)
    for got, wanted in zip((start, stop, last, level), (known.start, known.end, known.subtree_end, depth)):
        assert got.tolist() == list(wanted)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=12))
def test_the_pieces_hold_every_visible_pair_once(sequences: list[list[int]]) -> None:
    end = PrefixTree.from_sequences(sequences).subtree_end
    position, seen = torch.arange(end.numel()), torch.zeros(end.numel(), end.numel(), dtype=torch.int64)
    for piece in flash.cascade(end):
        queries, keys = (position[rows] for rows in (piece.queries, piece.keys))
        assert queries.unique().numel() == queries.numel()
        assert keys.unique().numel() == keys.numel()
        bounds = zip(*(x.unfold(0, 2, 1).tolist() for x in (piece.sequences.cu_q, piece.sequences.cu_k)))
        for (q0, q1), (k0, k1) in bounds:
            assert q1 - q0 <= piece.sequences.max_q
            assert k1 - k0 <= piece.sequences.max_k
            block = torch.ones(q1 - q0, k1 - k0, dtype=torch.int64)
            seen[queries[q0:q1, None], keys[k0:k1]] += block.tril() if piece.causal else block
    assert torch.equal(seen, visible(end).long())


def test_a_group_needs_few_calls_and_slices() -> None:
    pieces = flash.cascade(PrefixTree.from_sequences(TREES["a group"]).subtree_end)
    assert len(pieces) == 3  # by itself, below the prompt, below the context
    assert all(isinstance(rows, slice) for piece in pieces for rows in (piece.queries, piece.keys))


def test_a_large_tree_is_planned_without_a_loop_over_tokens(monkeypatch) -> None:
    random = np.random.default_rng(0)
    end = PrefixTree.from_sequences([random.integers(0, 6, 20).tolist() for _ in range(5000)]).subtree_end
    loops = []
    original = providers.rows_of
    monkeypatch.setattr(flash, "rows_of", lambda *ranges: loops.append(1) or original(*ranges))
    pieces = flash.cascade(end)
    assert sum(piece.sequences.lengths_k.size for piece in pieces) > 5000
    assert len(loops) == 2 * (len(pieces) - 1) < 30


def test_plan_is_made_once_and_dies_with_the_tree(monkeypatch) -> None:
    made, make = [], flash.PLANS.make
    monkeypatch.setattr(flash.PLANS, "make", lambda end: made.append(1) or make(end))
    tree = PrefixTree.from_sequences(TREES["a group"])
    qkv, grad_out = inputs(len(tree), 4, 2, 16)
    gc.collect()
    n_plans = len(flash.PLANS)
    for subtree_end in (tree.subtree_end, tree.subtree_end.detach(), tree.subtree_end.view(-1)):
        output_and_gradients(lambda *x, end=subtree_end: flash_tree_attention(*x, end, 0.3), qkv, grad_out)
    assert len(made) == 1
    assert len(flash.PLANS) == n_plans + 1
    del tree, subtree_end
    gc.collect()
    assert len(flash.PLANS) == n_plans


def test_what_is_no_tree_is_refused() -> None:
    q = torch.zeros(3, 1, 8)
    with pytest.raises(ValueError, match=r"no tree.*PrefixTree.from_sequences"):
        flash_tree_attention(q, q, q, torch.tensor([2, 3, 3], dtype=torch.int32), 1.0)


# --- the operators ---


def test_strides_do_not_matter() -> None:
    tree = PrefixTree.from_sequences(TREES["a group"])
    qkv, grad_out = inputs(len(tree), 4, 2, 16)

    def attention(q, k, v):
        return flash_tree_attention(q, k, v, tree.subtree_end, 0.3)

    plain = output_and_gradients(attention, qkv, grad_out)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        again = output_and_gradients(attention, [turned(x, a, b).requires_grad_() for x in qkv], turned(grad_out, a, b))
        assert all(torch.equal(x, y) for x, y in zip(again, plain))
    summed = torch.autograd.grad(attention(*qkv).sum(), qkv)  # a gradient of strides 0
    ones = torch.autograd.grad(attention(*qkv), qkv, torch.ones_like(grad_out))
    assert all(torch.equal(x, y) for x, y in zip(summed, ones))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_registration(dtype: torch.dtype) -> None:
    tree = PrefixTree.from_sequences(TREES["a group"][:2])
    qkv, grad_out = inputs(len(tree), 4, 2, 16, dtype)
    torch.library.opcheck(tree_flash, (*qkv, tree.subtree_end, 0.25))
    heads_first = [turned(x, 0, 1) for x in qkv]
    out, lse = tree_flash(*heads_first, tree.subtree_end, 0.25)
    backward = torch.ops.pact_kernels.tree_flash_backward.default
    torch.library.opcheck(backward, (grad_out, *heads_first, out, lse, tree.subtree_end, 0.25))


def test_one_token_and_no_token_do_not_alias_the_inputs() -> None:
    for length in (1, 0):
        q = torch.randn(length, 2, 8)
        end = torch.full((length,), 1, dtype=torch.int32)
        out, lse = tree_flash(q, q, q, end, 1.0)
        assert out.shape == q.shape
        assert lse.shape == (2, length)
        assert torch.equal(out, q)
        grads = torch.ops.pact_kernels.tree_flash_backward(q, q, q, q, out, lse, end, 1.0)
        assert all(grad.shape == q.shape and grad.isfinite().all() for grad in grads)
        assert not length or out.data_ptr() != q.data_ptr()


def test_autocast_does_not_round_what_the_operator_was_given() -> None:
    tree = PrefixTree.from_sequences(TREES["a group"])
    qkv, grad_out = inputs(len(tree), 4, 2, 16)

    def attention(q, k, v):
        return flash_tree_attention(q, k, v, tree.subtree_end, 0.3)

    plain = output_and_gradients(attention, qkv, grad_out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = output_and_gradients(attention, qkv, grad_out)
    assert all(torch.equal(x, y) for x, y in zip(cast, plain))
