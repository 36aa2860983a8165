"""The public tree attention: checks its input once and picks the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from pact_kernels.backend import require_triton, resolve_backend
from pact_kernels.prefix_tree import PrefixTree
from pact_kernels.tree_attention.flash import tree_flash
from pact_kernels.tree_attention.providers import provider_for
from pact_kernels.tree_attention.tiled import tree_tiled

BUILT = ("torch", "triton", "flash")
MAX_HEAD_DIM = 256
# From this mean path and mean segment on (tokens) the cascade is the faster one on a CPU: 1.2 to 1.4 times on long
# prompt groups, half as fast on short or much branched ones (benchmarks/tree_attention.py).
LONG_PATH, LONG_SEGMENT = 512, 128


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Attention of every token to its own path in the tree: query ``i`` sees key ``j`` iff ``j <= i < subtree_end[j]``.

    Args:
        q: [L, Hq, D] queries in the tree's flat order, positions (RoPE) already applied.
        k, v: [L, Hkv, D]; Hkv divides Hq, query head ``h`` reads key head ``h // (Hq / Hkv)``.
        tree: its ``subtree_end`` must lie on the device of ``q``; what the backend plans for it is kept with it.
        scale: factor of ``q k^T``, default ``D ** -0.5``.
        backend: "auto", "torch", "triton" or "flash". Auto is, on a CPU, flash for long paths that branch seldom and
            torch otherwise; on a GPU torch, until the others have been measured there.

    Returns:
        [L, Hq, D] in the dtype of ``q``. Softmax and sums are in float32 for 16-bit inputs, float64 for float64.
        Under autocast the inputs may differ in dtype and are rounded to autocast's dtype first, as torch's sdpa does.

    >>> tree = PrefixTree.from_sequences([[5, 1], [5, 2]])  # flat: 5, 1, 2; the last two do not see each other
    >>> q, values = torch.zeros(3, 1, 1), torch.tensor([3.0, 1.0, 7.0]).view(3, 1, 1)
    >>> tree_attention(q, q, values, tree).flatten()  # means over what each token sees
    tensor([3., 2., 5.])

    Raises:
        TypeError: inputs that are not of one floating dtype.
        ValueError: shapes or devices that do not fit the tree or each other, an unknown backend.
        RuntimeError: a backend that this build does not have.
    """
    chosen = _automatic(q, tree) if backend == "auto" else resolve_backend("tree_attention", backend, BUILT)
    if chosen == "triton":
        require_triton("tree_attention", q.device)
    _check_layout(q, k, v, tree)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (_autocast(x) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise TypeError(f"tree_attention needs q, k, v of one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if chosen == "triton":
        return _run_triton(q, k, v, tree, scale)
    if chosen == "flash":
        provider_for(q)  # its refusals name the mend
    run = tree_flash if chosen == "flash" else tree_tiled
    return run(q, k, v, tree.subtree_end, scale)[0]


def _automatic(q: Tensor, tree: PrefixTree) -> str:
    if q.device.type != "cpu" or len(tree) < LONG_SEGMENT * len(tree.segments):
        return "torch"
    return "flash" if tree.pairs >= LONG_PATH * len(tree) else "torch"


def _autocast(x: Tensor) -> Tensor:
    """As torch's sdpa under autocast: float64 and integers stay what they are."""
    casts = x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if casts else x


def _run_triton(q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree, scale: float) -> Tensor:
    """The custom operators; imported here, so that the package does not need Triton."""
    from pact_kernels.tree_attention.ops import tree_triton

    if q.dtype == torch.float64:
        raise TypeError("the triton backend computes in float32: use backend='torch' for float64 inputs")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(
            f"the triton backend takes head dims to {MAX_HEAD_DIM}, got {q.shape[-1]}: use backend='torch'"
        )
    return tree_triton(q, k, v, tree.subtree_end, scale)[0]


def _check_layout(q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree) -> None:
    if not isinstance(tree, PrefixTree):
        raise TypeError(f"tree_attention needs a PrefixTree (PrefixTree.from_sequences), got a {type(tree).__name__}")
    fit = q.dim() == k.dim() == 3 and k.shape == v.shape and q.shape[::2] == k.shape[::2]
    if not fit or 0 in q.shape[1:] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"tree_attention needs q [L, Hq, D] and k, v [L, Hkv, D] with Hkv dividing Hq, got {shapes}")
    if not q.shape[0] == len(tree) == tree.subtree_end.numel():
        raise ValueError(
            f"tree_attention: q has {q.shape[0]} rows but the tree has {len(tree)} tokens and "
            f"{tree.subtree_end.numel()} subtree ends; build q from the tree's own input_ids"
        )
    devices = {str(x.device) for x in (q, k, v, tree.subtree_end)}
    if len(devices) > 1:
        raise ValueError(
            f"tree_attention needs q, k, v and the tree on one device, got {sorted(devices)}; use tree.to(...)"
        )
