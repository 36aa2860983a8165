"""Tree attention: the torch backend against the dense specification, which itself meets plain causal attention."""

import gc
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import BACKENDS, check_tree, group, inputs, output_and_gradients

from pact_kernels.prefix_tree import PrefixTree
from pact_kernels.tree_attention import api, tiled
from pact_kernels.tree_attention.api import tree_attention
from pact_kernels.tree_attention.reference import tree_attention_reference


def compare(sequences, heads=4, kv_heads=2, dim=16, dtype=torch.float32, scale=None):
    """Largest error of output and gradients: the backend's, and that of the dense formula in the input's dtype."""
    tree = PrefixTree.from_sequences(sequences)
    qkv, grad_out = inputs(len(tree), heads, kv_heads, dim, dtype)
    exact_qkv = [x.detach().double().requires_grad_() for x in qkv]

    def dense(q, k, v):
        return tree_attention_reference(q, k, v, tree.subtree_end, scale)

    exact = output_and_gradients(dense, exact_qkv, grad_out.double())
    plain = output_and_gradients(dense, qkv, grad_out)
    ours = output_and_gradients(lambda q, k, v: tree_attention(q, k, v, tree, scale=scale), qkv, grad_out)
    assert all(x.dtype == dtype for x in ours)
    return [[float((x - y).abs().max()) for x, y in zip(result, exact)] for result in (ours, plain)]


def test_reference_is_causal_attention_of_each_sequence():
    sequences = group(7, 3, [5, 4, 6])
    tree = PrefixTree.from_sequences(sequences)
    (q, k, v), _ = inputs(len(tree), 2, 2, 8, torch.float64)
    out = tree_attention_reference(q, k, v, tree.subtree_end)
    for path in tree.index:
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(x[path].transpose(0, 1) for x in (q, k, v)), is_causal=True
        )
        torch.testing.assert_close(out[path], alone.transpose(0, 1), rtol=0, atol=1e-12)


SHAPES = {
    "one group": group(70, 45, [33, 60, 12]),
    "single token": [[3]],
    "one sequence": [list(range(200))],
    "many roots": [[i] * (1 + i % 7) for i in range(90)],
    "shorter than a tile": group(5, 2, [3, 4]),
    "prefix of another": [[1, 2, 3], [1, 2, 3, 4, 5], [1], [1, 2, 9]],
    # Masks packed in 64-bit words go wrong for siblings that start late in a block of 64 keys.
    "siblings at offset 57": [list(range(57)) + [100 + i] * 40 for i in range(6)],
    "siblings at offset 63": [list(range(63)) + [100 + i] * 3 for i in range(30)],
    "long path": group(600, 300, [150, 90]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_float32_is_as_exact_as_the_dense_formula(name):
    ours, plain = compare(SHAPES[name])
    assert all(x <= 2 * y + 4e-6 for x, y in zip(ours, plain)), (ours, plain)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 64), (6, 2, 96), (4, 1, 128), (2, 2, 256), (3, 3, 20)])
def test_head_layouts(heads, kv_heads, dim):
    ours, plain = compare(SHAPES["one group"], heads, kv_heads, dim)
    assert all(x <= 2 * y + 4e-6 for x, y in zip(ours, plain)), (ours, plain)


def test_scale_and_float64():
    ours, _ = compare(SHAPES["one group"], dtype=torch.float64, scale=0.7)
    assert max(ours) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_only_round_the_results(dtype):
    # Nothing but the stored results is rounded: half a unit in the last place of numbers up to 4 (outputs) or 32.
    ours, plain = compare(SHAPES["long path"], dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert ours[0] <= 2 * eps
    assert all(x <= 2 * y + 16 * eps for x, y in zip(ours, plain)), (ours, plain)


@pytest.mark.parametrize("constants", [{"BATCH_KEYS": 1}, {"MASK_CACHE_BYTES": 0}, {"SHORT_TILE": 5, "LONG_TILE": 5}])
def test_tiling_does_not_change_the_result(constants, monkeypatch):
    for name, value in constants.items():
        monkeypatch.setattr(tiled, name, value)
    ours, _ = compare(SHAPES["one group"], dtype=torch.float64)
    assert max(ours) < 1e-12


def test_matmul_form_of_other_devices(monkeypatch):
    monkeypatch.setattr(tiled, "has_flash", lambda x: False)
    ours, _ = compare(SHAPES["one group"], heads=6, kv_heads=2, dtype=torch.float64)
    assert max(ours) < 1e-12


def test_gradcheck():
    tree = PrefixTree.from_sequences(group(4, 2, [3, 2]))
    qkv, _ = inputs(len(tree), 4, 2, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: tree_attention(q, k, v, tree), qkv)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=90), min_size=1, max_size=12))
def test_random_trees(sequences):
    ours, _ = compare(sequences, heads=2, kv_heads=1, dim=4, dtype=torch.float64)
    assert max(ours) < 1e-12


def test_results_repeat_bit_by_bit_whatever_else_ran():
    tree = PrefixTree.from_sequences(SHAPES["one group"])
    (q, k, v), _ = inputs(len(tree), 4, 2, 16)
    first = tree_attention(q, k, v, tree)
    tree_attention(q.double(), k.double(), v.double(), tree)
    assert torch.equal(first, tree_attention(q, k, v, tree))


def test_non_contiguous_inputs():
    tree = PrefixTree.from_sequences(SHAPES["one group"])
    (q, k, v), _ = inputs(len(tree), 4, 2, 16)
    strided = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert torch.equal(tree_attention(*strided, tree), tree_attention(q, k, v, tree))


def test_plan_is_made_once_and_dies_with_the_tree():
    n_plans = len(tiled.PLANS)
    tree = PrefixTree.from_sequences(SHAPES["one group"])
    (q, k, v), grad_out = inputs(len(tree), 4, 2, 16)
    tree_attention(q, k, v, tree).backward(grad_out)
    assert len(tiled.PLANS) == n_plans + 1
    assert tiled.PLANS.of(tree.subtree_end) is tiled.PLANS.of(tree.subtree_end.detach())
    del tree
    gc.collect()
    assert len(tiled.PLANS) == n_plans


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_of_0_and_below(backend, scale):
    """Whoever masks with -inf before multiplying by the scale has NaN here."""
    check_tree(PrefixTree.from_sequences(SHAPES["one group"]), 2, 1, 16, torch.float32, scale, backend, of_sums=True)


def test_auto_takes_the_cascade_for_long_paths_that_branch_seldom(monkeypatch):
    taken = []
    for name in ("tree_flash", "tree_tiled"):
        run = getattr(api, name)
        monkeypatch.setattr(api, name, lambda *x, name=name, run=run: taken.append(name) or run(*x))
    for sequences in (group(600, 600, [200]), group(600, 600, [2] * 50), group(200, 100, [150])):
        tree = PrefixTree.from_sequences(sequences)
        (q, k, v), _ = inputs(len(tree), 1, 1, 8)
        tree_attention(q, k, v, tree)
    assert taken == ["tree_flash", "tree_tiled", "tree_tiled"]


def test_bad_input_is_one_clear_error():
    tree = PrefixTree.from_sequences([[1, 2, 3], [1, 4]])
    (q, k, v), _ = inputs(4, 4, 2, 8)
    with pytest.raises(ValueError, match="unknown backend 'sdpa'"):
        tree_attention(q, k, v, tree, backend="sdpa")
    not_a_tree = replace(tree, subtree_end=torch.tensor([3, 4, 3, 4], dtype=torch.int32))
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=r"subtree_end is no tree.*PrefixTree.from_sequences"):
            tree_attention(q, k, v, not_a_tree, backend=backend)
        for end in (tree.subtree_end[:3], torch.cat([tree.subtree_end, tree.subtree_end])):
            with pytest.raises(ValueError, match=r"4 tokens and [38] subtree ends"):
                tree_attention(q, k, v, replace(tree, subtree_end=end), backend=backend)
        with pytest.raises(TypeError, match="contiguous 1-D int32"):
            tree_attention(q, k, v, replace(tree, subtree_end=tree.subtree_end.repeat(2)[::2]), backend=backend)
        with pytest.raises(TypeError, match="one floating dtype"):
            tree_attention(*(x.long() for x in (q, k, v)), tree, backend=backend)
        with pytest.raises(TypeError, match="needs a PrefixTree"):
            tree_attention(q, k, v, tree.subtree_end, backend=backend)
        for shape in ((4, 2, 0), (4, 0, 8)):
            with pytest.raises(ValueError, match="Hkv dividing Hq"):
                tree_attention(
                    torch.zeros(4, 4, shape[2]), torch.zeros(shape), torch.zeros(shape), tree, backend=backend
                )
    with pytest.raises(TypeError, match="one floating dtype"):
        tree_attention(q, k, v.double(), tree)
    with pytest.raises(ValueError, match="Hkv dividing Hq"):
        tree_attention(q[:, :3], k, v, tree)
    with pytest.raises(ValueError, match="k, v"):
        tree_attention(q, k, v[..., :4], tree)
    with pytest.raises(ValueError, match="3 rows but the tree has 4 tokens"):
        tree_attention(q[:3], k[:3], v[:3], tree)
    with pytest.raises(ValueError, match=r"on one device.*use tree.to"):
        tree_attention(*(x.to("meta") for x in (q, k, v)), tree)
