"""The Triton backend of tree attention by the error rule: in the interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch
from oracles import DEVICE, assert_within
from test_tree_attention import group, inputs, output_and_gradients

from pact_kernels.prefix_tree import PrefixTree
from pact_kernels.tree_attention import ops
from pact_kernels.tree_attention.api import tree_attention
from pact_kernels.tree_attention.reference import tree_attention_reference, visible

EPS = torch.finfo(torch.float32).eps


def check(sequences, heads=4, kv_heads=2, dim=16, dtype=torch.float32, scale=None) -> None:
    """`check_tree` of a tree of these sequences."""
    check_tree(PrefixTree.from_sequences(sequences).to(DEVICE), heads, kv_heads, dim, dtype, scale)


def check_tree(
    tree, heads, kv_heads, dim, dtype, scale=None, backend="triton", seed=0, turned=False, of_sums=False
) -> None:
    """Output and gradients: twice the error of the dense formula in the input's dtype, plus rounding.

    ``turned``: operands as models hand them over, head by head in memory. ``of_sums``: rounding is relative to the sums
    behind a result and not to it, for random trees: of one token, say, dQ is 0 and the dense formula exact by luck.
    """
    qkv, grad_out = inputs(len(tree), heads, kv_heads, dim, dtype, seed)
    qkv, grad_out = [x.detach().to(DEVICE) for x in qkv], grad_out.to(DEVICE)
    if turned:
        *qkv, grad_out = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (*qkv, grad_out))
    qkv = [x.requires_grad_() for x in qkv]
    exact_qkv = [x.detach().double().requires_grad_() for x in qkv]

    def dense(q, k, v):
        return tree_attention_reference(q, k, v, tree.subtree_end, scale)

    exact = output_and_gradients(dense, exact_qkv, grad_out.double())
    plain = output_and_gradients(dense, qkv, grad_out)
    mine = output_and_gradients(
        lambda q, k, v: tree_attention(q, k, v, tree, scale=scale, backend=backend), qkv, grad_out
    )
    sizes = sums_behind(*exact_qkv, grad_out.double(), tree.subtree_end, scale) if of_sums else exact
    for name, got, same, wanted, size in zip(("out", "dq", "dk", "dv"), mine, plain, exact, sizes):
        assert got.dtype == dtype
        rounding = (2 if of_sums else 4) * torch.finfo(dtype).eps * max(1.0, size.abs().max().item())
        assert_within(name, got, same, wanted, rounding)


def sums_behind(q, k, v, grad_out, subtree_end, scale) -> list[torch.Tensor]:
    """What output and gradients would be with all factors positive, times the largest score: a softmax is off by the
    rounding of its scores."""
    group = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k_LHD, v_LHD = (x.detach().repeat_interleave(group, 1) for x in (k, v))
    hidden = ~visible(subtree_end)
    score = scale * torch.einsum("qhd,khd->hqk", q.detach(), k_LHD)
    p = score.masked_fill(hidden, -torch.inf).softmax(-1)
    q, k_LHD, v_LHD, grad_out = (x.detach().abs() for x in (q, k_LHD, v_LHD, grad_out))
    out = torch.einsum("hqk,khd->qhd", p, v_LHD)
    delta = (out * grad_out).sum(-1).T[..., None]
    ds = abs(scale) * p * (torch.einsum("qhd,khd->hqk", grad_out, v_LHD) + delta)
    dk, dv = torch.einsum("hqk,qhd->khd", ds, q), torch.einsum("hqk,qhd->khd", p, grad_out)
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return [(1 + score.abs().max()) * x for x in (out, torch.einsum("hqk,khd->qhd", ds, k_LHD), dk, dv)]


TREES = {
    "one token": [[1]],
    "one path": [[1] * 70],
    "a group": group(37, 21, [50, 9, 33]),
    "siblings at offset 57 of a block": [[1] * 57 + [i] * 20 for i in range(2, 6)],
    "roots in a row": [[i] * n for i, n in enumerate((1, 31, 32, 33, 64, 5))],
    "short siblings": [[1, 2, 3, i] for i in range(40)],
    "deep": [[*range(d * 4), 99 - d] for d in range(8)],
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_rule(tree: str, dtype: torch.dtype) -> None:
    check(TREES[tree], dtype=dtype)


@pytest.mark.parametrize("dim", [16, 24, 64, 96, 128, 256])
def test_head_dims(dim: int) -> None:
    check(TREES["a group"][:3], dim=dim)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 1), (8, 2), (3, 1)])
def test_grouped_heads(heads: int, kv_heads: int) -> None:
    check(TREES["a group"][:3], heads, kv_heads)


def test_strides_do_not_matter() -> None:
    tree = PrefixTree.from_sequences(TREES["a group"]).to(DEVICE)
    (q, k, v), _ = inputs(len(tree), 4, 2, 16)
    q, k, v = (x.detach().to(DEVICE) for x in (q, k, v))
    plain = tree_attention(q, k, v, tree, backend="triton")
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert torch.equal(tree_attention(*turned, tree, backend="triton"), plain)
    assert torch.equal(
        tree_attention(q, k, v.transpose(1, 2).contiguous().transpose(1, 2), tree, backend="triton"), plain
    )


def test_operator_registration() -> None:
    tree = PrefixTree.from_sequences(TREES["a group"][:2]).to(DEVICE)
    qkv, _ = inputs(len(tree), 4, 2, 16)
    qkv = [x.detach().to(DEVICE).requires_grad_() for x in qkv]
    torch.library.opcheck(ops.tree_triton, (*qkv, tree.subtree_end, 0.25))


def test_bad_input() -> None:
    tree = PrefixTree.from_sequences([[1, 2]]).to(DEVICE)
    with pytest.raises(ValueError, match="takes head dims to 256, got 512: use backend='torch'"):
        tree_attention(*(torch.zeros(2, 1, 512, device=DEVICE) for _ in range(3)), tree, backend="triton")
    with pytest.raises(TypeError, match="use backend='torch' for float64"):
        tree_attention(*(torch.zeros(2, 1, 8, device=DEVICE).double() for _ in range(3)), tree, backend="triton")
