"""A backend's forward and backward as torch custom operators with autograd; one signature for all, no maths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

FORWARD = "(Tensor q, Tensor k, Tensor v, Tensor subtree_end, float scale) -> (Tensor, Tensor)"
BACKWARD = (
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, Tensor subtree_end, float scale) "
    "-> (Tensor, Tensor, Tensor)"
)
Tensors = tuple[Tensor, ...]
# A new tree is planned inside the operator, which reads it back; a captured graph would replay the plan of the old one.
PLANS_ON_THE_HOST = (torch.Tag.cudagraph_unsafe,)


def lse_like(q: Tensor) -> Tensor:
    """Room for the log-sum-exp in nats: [Hq, L], float32 (float64 for float64 inputs)."""
    return q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))


def empty_like(x: Tensor) -> Tensor:
    """Room for a contiguous tensor of the shape and dtype of ``x``."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def differentiable(
    name: str,
    forward: Callable[..., Tensors],
    backward: Callable[..., Tensors],
    statistics_like: Callable[[Tensor], Tensor] = lse_like,
) -> CustomOpDef:
    """The operator ``pact_kernels::<name>_forward`` of (q, k, v, subtree_end, scale) -> (out, statistics).

    Args:
        forward: q [L, Hq, D], k and v [L, Hkv, D], subtree_end [L] int32 -> out like q, and what of its rows backward
            reads.
        backward: (dout, q, k, v, out, statistics, subtree_end, scale) -> gradients of q, k, v, contiguous.
        statistics_like: room for the statistics, given q.

    Both run on the device of ``q`` and without autocast. There is no second derivative: asking for one is an error.
    """
    forward_op = torch.library.custom_op(
        f"pact_kernels::{name}_forward", _plain(forward), mutates_args=(), schema=FORWARD, tags=PLANS_ON_THE_HOST
    )
    backward_op = torch.library.custom_op(
        f"pact_kernels::{name}_backward", _plain(backward), mutates_args=(), schema=BACKWARD, tags=PLANS_ON_THE_HOST
    )
    forward_op.register_fake(lambda q, k, v, subtree_end, scale: (empty_like(q), statistics_like(q)))
    backward_op.register_fake(
        lambda dout, q, k, v, out, statistics, subtree_end, scale: (empty_like(q), empty_like(k), empty_like(v))
    )

    def differentiate(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        q, k, v, subtree_end, out, statistics = ctx.saved_tensors
        return *backward_op(dout, q, k, v, out, statistics, subtree_end, ctx.scale), None, None

    forward_op.register_autograd(differentiate, setup_context=_save)
    return forward_op


def _plain(compute: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """``compute`` on the device of its first tensor, where kernels launch, and without autocast, which would round."""

    def run(first: Tensor, *arguments: Any) -> Tensors:
        with torch.cuda.device_of(first), torch.autocast(first.device.type, enabled=False):
            return compute(first, *arguments)

    return run


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *operands, ctx.scale = inputs
    ctx.save_for_backward(*operands, *output)
    ctx.mark_non_differentiable(output[1])
