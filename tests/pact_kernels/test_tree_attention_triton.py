"""The Triton backend of tree attention by the error rule: in the interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch
from oracles import DEVICE
from trees import TREES, check, check_operands, check_tree, group, inputs, output_and_gradients

from pact_kernels.prefix_tree import PrefixTree
from pact_kernels.tiles import TREE_TILES, TreeTile, TreeTiles
from pact_kernels.tree_attention import ops
from pact_kernels.tree_attention.api import tree_attention


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


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_any_scale(scale: float) -> None:
    check_tree(PrefixTree.from_sequences(TREES["a group"]).to(DEVICE), 2, 1, 16, torch.float32, scale, of_sums=True)


def test_pieces_of_a_prompt_add_up_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries of a key tile in pieces of one tile each, joined in order."""
    tree = PrefixTree.from_sequences(TREES["a group"]).to(DEVICE)
    monkeypatch.setattr(ops, "PIECE_TILES", 1)
    monkeypatch.setattr(ops, "PIECES", 10**6)
    check_tree(tree, 4, 2, 24, torch.float32)
    qkv, grad_out = inputs(len(tree), 4, 2, 16)
    qkv, grad_out = [x.detach().to(DEVICE).requires_grad_() for x in qkv], grad_out.to(DEVICE)
    first, again = (
        output_and_gradients(lambda *x: tree_attention(*x, tree, backend="triton"), qkv, grad_out) for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, again))


@pytest.mark.parametrize("dim", [16, 20])
def test_nothing_beyond_the_rows_and_columns_is_read(dim: int) -> None:
    """The operands lie in a larger buffer of NaN; what nobody wrote of the results is NaN too (conftest)."""
    tree = PrefixTree.from_sequences(TREES["siblings at offset 57 of a block"]).to(DEVICE)
    qkv, grad_out = inputs(len(tree), 2, 1, dim)
    qkv, grad_out = [x.detach().to(DEVICE) for x in qkv], grad_out.to(DEVICE)

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        length, heads, width = x.shape
        room = x.new_full((length + 128, heads + 1, width + 12), torch.nan)
        room[:length, :heads, :width] = x
        return room[:length, :heads, :width]

    def run(*operands: torch.Tensor) -> list[torch.Tensor]:
        *qkv, grad_out = operands
        qkv = [x.detach().requires_grad_() for x in qkv]
        return output_and_gradients(lambda *x: tree_attention(*x, tree, backend="triton"), qkv, grad_out)

    plain, mine = run(*qkv, grad_out), run(*(poisoned(x) for x in (*qkv, grad_out)))
    assert all(torch.equal(got, wanted) for got, wanted in zip(mine, plain))


def test_several_thousand_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tiles in the interpreter, which takes as long for a small one."""
    tile = TreeTile(128, 128, 4, 1)
    monkeypatch.setitem(TREE_TILES["interpreter"], 4, {256: TreeTiles(tile, tile, tile)})
    sequences = group(500, 300, [700, 90, 333])
    assert len(PrefixTree.from_sequences(sequences)) > 3000
    check(sequences, heads=1, kv_heads=1, dim=16)


def test_bad_input() -> None:
    tree = PrefixTree.from_sequences([[1, 2]]).to(DEVICE)
    with pytest.raises(ValueError, match="takes head dims to 256, got 512: use backend='torch'"):
        tree_attention(*(torch.zeros(2, 1, 512, device=DEVICE) for _ in range(3)), tree, backend="triton")
    with pytest.raises(TypeError, match="use backend='torch' for float64"):
        tree_attention(*(torch.zeros(2, 1, 8, device=DEVICE).double() for _ in range(3)), tree, backend="triton")


@pytest.mark.parametrize(("factor", "offset"), [(5.0, 0.0), (16.0, 0.0), (1.0, 30.0), (1.0, 100.0)])
def test_peaked_scores_and_keys_far_from_0(monkeypatch: pytest.MonkeyPatch, factor: float, offset: float) -> None:
    """Scores to about 1e3: the backward's probabilities must be those that the forward summed, or they do not add up
    to 1 and dQ takes in the keys' common part. One tile shape: the interpreter's matmuls round by shape. For the same
    reason dK and dV, whose scores are made transposed, are left out.
    """
    tile = TreeTile(32, 32, 4, 1)
    monkeypatch.setitem(TREE_TILES["interpreter"], 4, {256: TreeTiles(tile, tile, tile)})
    tree = PrefixTree.from_sequences([*TREES["siblings at offset 57 of a block"], [9] * 3]).to(DEVICE)
    for seed in range(4):
        qkv, grad_out = inputs(len(tree), 2, 1, 16, seed=seed)
        operands = [x.detach().to(DEVICE) for x in (*qkv, grad_out)]
        operands[0], operands[1] = factor * operands[0], factor * operands[1] + offset
        check_operands(tree, operands, scale=0.25, names=("out", "dq"))
