"""The Triton backend of linear_logprob as torch custom operators with autograd: tensors and numbers in and out.

Checks are the api's and the kernels'. The backward makes dL/du of a chunk of live rows with Triton and leaves the two
matmuls to torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pact_kernels.linear_logprob.launch import (
    FLAGS,
    SYNCHRONISES,
    Gradients,
    Scores,
    TritonHead,
    live_rows,
    logit_gradient,
    plain_context,
    raise_flag,
    score,
)


@torch.library.custom_op("pact_kernels::head_forward", mutates_args=())
def head_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rows: Tensor,
    inv_temperature: Tensor | None,
    softcap: float,
    operand_dtype: torch.dtype,
    entropy: bool,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of ``Scores`` of all rows. ``softcap`` 0 is none.

    hidden [R, H], weight [V, H] and bias [V] are rounded to ``operand_dtype`` first. ``check``: read the flag here and
    raise ValueError, which synchronises.
    """
    with plain_context(hidden):
        head = TritonHead.of(hidden, weight, bias, target, rows, inv_temperature, softcap, operand_dtype)
        scores = Scores.empty(target.numel(), entropy, hidden.device)
        score(head, torch.arange(target.numel(), device=hidden.device), scores)
        if check:
            raise_flag(scores.flag.tolist(), head.n_vocab, hidden.shape[0])
    return scores.logp, scores.entropy, scores.centre, scores.log_total, scores.flag


@head_forward.register_fake
def _(hidden, weight, bias, target, rows, inv_temperature, softcap, operand_dtype, entropy, check):
    n, new = target.shape[0], hidden.new_empty
    rowwise = (new(size, dtype=torch.float32) for size in (n, n if entropy else 0, n, n))
    return *rowwise, new(len(FLAGS), dtype=torch.int32)


@torch.library.custom_op("pact_kernels::head_backward", mutates_args=(), tags=SYNCHRONISES)
def head_backward(
    dlogp: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rows: Tensor,
    inv_temperature: Tensor | None,
    scores: list[Tensor],
    softcap: float,
    operand_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias in their dtypes, accumulated in float32; empty where not ``needs``.

    Raises ValueError where the forward flagged a target, a row index or a temperature.
    """
    with plain_context(hidden):
        head = TritonHead.of(hidden, weight, bias, target, rows, inv_temperature, softcap, operand_dtype)
        found = Scores(*scores)
        raise_flag(found.flag.tolist(), head.n_vocab, hidden.shape[0])
        live = live_rows(dlogp, dentropy).nonzero()[:, 0]
        gradients, step = Gradients(head, needs, live.numel()), head.chunk_rows()
        for begin in range(0, live.numel(), step):
            chunk = live[begin : begin + step]
            gradients.add(chunk, logit_gradient(head, chunk, found, dlogp, dentropy))
        dhidden, dweight, dbias = gradients.hidden_RH(hidden.dtype), gradients.weight_VH, gradients.bias_V
        bias_dtype = (weight if bias is None else bias).dtype
        empty = hidden.new_empty
        return (
            empty(0, hidden.shape[1]) if dhidden is None else dhidden,
            empty(0, hidden.shape[1], dtype=weight.dtype) if dweight is None else dweight.to(weight.dtype),
            empty(0, dtype=bias_dtype) if dbias is None else dbias.to(bias_dtype),
        )


@head_backward.register_fake
def _(
    dlogp, dentropy, hidden, weight, bias, target, rows, inv_temperature, scores, softcap, operand_dtype, needs
):  # fmt: skip
    (n_hidden, width), n_vocab = hidden.shape, weight.shape[0]
    return (
        hidden.new_empty(n_hidden if needs[0] else 0, width),
        weight.new_empty(n_vocab if needs[1] else 0, width),
        (weight if bias is None else bias).new_empty(n_vocab if needs[2] else 0),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *operands, softcap, operand_dtype, entropy, _ = inputs
    ctx.save_for_backward(*operands, *output)
    ctx.settings = (softcap, operand_dtype)
    ctx.with_entropy = entropy
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    operands, scores = ctx.saved_tensors[:6], list(ctx.saved_tensors[6:])
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    dlogp = torch.zeros_like(scores[0]) if dlogp is None else dlogp.contiguous()
    dentropy = dentropy.contiguous() if ctx.with_entropy and dentropy is not None else None
    gradients = head_backward(dlogp, dentropy, *operands, scores, *ctx.settings, needs)
    return *(gradient if need else None for gradient, need in zip(gradients, needs)), *(None,) * 7


head_forward.register_autograd(_backward, setup_context=_setup)
