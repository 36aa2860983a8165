"""The specification of linear_logprob: the formula in plain torch, logits and all. Kernels never import it."""

from __future__ import annotations

import torch
from torch import Tensor

from pact_kernels.terms import LogProbs


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
) -> LogProbs:
    """``log softmax(z)[target]`` and ``-sum p log p``, ``z = cap tanh(u / cap) / temperature``, ``u = h W^T + b``.

    Differentiable any number of times, in float64 for float64 inputs and in float32 for all others.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    hidden_NH = (hidden if rows is None else hidden[rows.long()]).to(dtype)
    u_NV = hidden_NH @ weight.to(dtype).T
    if bias is not None:
        u_NV = u_NV + bias.to(dtype)
    z_NV = u_NV if softcap is None else softcap * torch.tanh(u_NV / softcap)
    temperature_N1 = torch.as_tensor(temperature, dtype=dtype, device=hidden.device).reshape(-1, 1)
    z_NV = z_NV / temperature_N1
    logp_NV = torch.log_softmax(z_NV, dim=-1)
    logp_N = logp_NV.gather(1, target.long()[:, None])[:, 0]
    return LogProbs(logp_N, -(logp_NV.exp() * logp_NV).sum(-1) if entropy else None)
