"""The Triton backend of tree_attention as torch custom operators with autograd: tensors and numbers in and out."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from pact_kernels.backend import INTERPRETED
from pact_kernels.tree_attention.triton import (
    tree_delta_kernel,
    tree_dkv_kernel,
    tree_dq_kernel,
    tree_forward_kernel,
)
from pact_kernels.tree_attention.work import work_of

BLOCK_Q, BLOCK_K = 32, 32


def _meta(q: Tensor, k: Tensor) -> dict[str, Any]:
    width = q.shape[2]
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "D": width,
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
        "BLOCK_Q": BLOCK_Q,
        "BLOCK_K": BLOCK_K,
        "UPCAST": INTERPRETED,
    }


@torch.library.custom_op("pact_kernels::tree_forward", mutates_args=())
def tree_forward(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [L, Hq, D] and log-sum-exp [Hq, L] float32; see ``tree_attention``."""
    (length, heads, _), lists = q.shape, work_of(subtree_end, BLOCK_Q, BLOCK_K).keys
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(heads, length, dtype=torch.float32)
    tree_forward_kernel[(triton.cdiv(length, BLOCK_Q), heads)](
        q, k, v, subtree_end, *lists, out, lse, length,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], scale, **_meta(q, k),
    )  # fmt: skip
    return out, lse


@tree_forward.register_fake
def _(q, k, v, subtree_end, scale):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("pact_kernels::tree_backward", mutates_args=())
def tree_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, subtree_end: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    (length, heads, width), work, meta = q.shape, work_of(subtree_end, BLOCK_Q, BLOCK_K), _meta(q, k)
    tiles = triton.cdiv(length, BLOCK_Q)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)
    tree_delta_kernel[(tiles, heads)](
        out, dout, delta, length, *out.stride()[:2], *dout.stride()[:2],
        D=width, BLOCK_D=meta["BLOCK_D"], BLOCK_Q=BLOCK_Q,
    )  # fmt: skip
    operands = (q, k, v, dout, lse, delta, subtree_end)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2])
    tree_dq_kernel[(tiles, heads)](*operands, *work.keys, dq, length, *strides, *dq.stride()[:2], scale, **meta)
    tree_dkv_kernel[(triton.cdiv(length, BLOCK_K), k.shape[1])](
        *operands, *work.queries, dk, dv, length, *strides, *dk.stride()[:2], scale, **meta
    )
    return dq, dk, dv


@tree_backward.register_fake
def _(dout, q, k, v, out, lse, subtree_end, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *operands, ctx.scale = inputs
    ctx.save_for_backward(*operands, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, subtree_end, out, lse = ctx.saved_tensors
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    return *tree_backward(dout, q, k, v, out, lse, subtree_end, ctx.scale), None, None


tree_forward.register_autograd(_backward, setup_context=_setup)
