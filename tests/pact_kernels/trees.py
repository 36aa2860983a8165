"""Trees, operands and the error rule of tree attention, shared by the tests of its backends."""

from __future__ import annotations

import numpy as np
import torch
from oracles import DEVICE, assert_within

from pact_kernels.prefix_tree import PrefixTree
from pact_kernels.tree_attention import tree_attention
from pact_kernels.tree_attention.reference import tree_attention_reference, visible

BACKENDS = ("torch", "triton", "flash")


def group(prompt, context, responses, seed=0):
    """Sequences of one prompt group: every response below the prompt alone and below prompt and context."""
    random = np.random.default_rng(seed)
    x, c, *ys = [random.integers(0, 50, n).tolist() for n in (prompt, context, *responses)]
    return [x + y for y in ys] + [x + c + y for y in ys]


def inputs(length, heads, kv_heads, dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(length, heads, dim), (length, kv_heads, dim), (length, kv_heads, dim), (length, heads, dim)]
    q, k, v, grad_out = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return [x.requires_grad_() for x in (q, k, v)], grad_out


def output_and_gradients(attention, qkv, grad_out):
    out = attention(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad_out)]


TREES = {
    "one token": [[1]],
    "one path": [[1] * 70],
    "a group": group(37, 21, [50, 9, 33]),
    "siblings at offset 57 of a block": [[1] * 57 + [i] * 20 for i in range(2, 6)],
    "roots in a row": [[i] * n for i, n in enumerate((1, 31, 32, 33, 64, 5))],
    "short siblings": [[1, 2, 3, i] for i in range(40)],
    "deep": [[*range(d * 4), 99 - d] for d in range(8)],
}


def check(sequences, heads=4, kv_heads=2, dim=16, dtype=torch.float32, scale=None) -> None:
    """`check_tree` of a tree of these sequences."""
    check_tree(PrefixTree.from_sequences(sequences).to(DEVICE), heads, kv_heads, dim, dtype, scale)


def check_tree(
    tree,
    heads,
    kv_heads,
    dim,
    dtype,
    scale=None,
    backend="triton",
    seed=0,
    turned=False,
    of_sums=False,
    spread=1,
    offset=0,
) -> None:
    """`check_operands` of normal numbers.

    ``turned``: as models hand them over, head by head in memory. ``spread``: factor of q and k. ``offset``: added to k.
    """
    qkv, grad_out = inputs(len(tree), heads, kv_heads, dim, torch.float64, seed)
    q, k, v = (x.detach() for x in qkv)
    operands = [x.to(DEVICE, dtype) for x in (spread * q, spread * k + offset, v, grad_out)]
    if turned:
        operands = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in operands]
    check_operands(tree, operands, scale, backend, of_sums)


def check_operands(
    tree, operands, scale=None, backend="triton", of_sums=False, names=("out", "dq", "dk", "dv")
) -> None:
    """Output and gradients of (q, k, v, dout): twice the error of the dense formula in their dtype, plus rounding.

    ``of_sums``: rounding is relative to the sums behind a result and not to it, for random trees: of one token, say,
    dQ is 0 and the dense formula exact by luck.
    """
    *qkv, grad_out = operands
    qkv, dtype = [x.requires_grad_() for x in qkv], grad_out.dtype
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
        if name in names:
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
