"""linear_logprob: argument checks and choice of backend. Computes nothing itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pact_kernels.backend import require_triton, resolve_backend
from pact_kernels.linear_logprob.chunked import Head, LinearLogProb
from pact_kernels.terms import LogProbs

_OPERAND_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
BUILT = ("torch", "triton")  # auto is torch until the kernels have been measured on a GPU


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    backend: str = "auto",
) -> LogProbs:
    """Log-probs of target tokens under an LM head, and the entropies of those distributions, in nats.

    ``u = hidden weight^T + bias``, ``z = softcap tanh(u / softcap) / temperature``, ``logp = log softmax(z)[target]``
    (DESIGN section 2). Logits live in float32 a few rows at a time and are never kept: the backward recomputes them,
    only for rows whose upstream gradients are not both exactly 0. Differentiable once, in hidden, weight and bias.

    Args:
        hidden: [R, H] float.
        weight: [V, H], the dtype of hidden. Its gradient is accumulated in float32.
        target: [N] integers in 0..V-1.
        rows: [N] integers in 0..R-1, the row of hidden that predicts each target; they may repeat. None: N = R.
        bias: [V], the dtype of hidden, or None.
        temperature: positive number, or positive floats [N]; no gradient flows to it.
        softcap: positive number, or None for no cap.
        entropy: whether to compute the entropies as well.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Under autocast hidden, weight and bias may differ in dtype and are rounded to autocast's dtype here, inside the
    operator; logits and accumulation stay float32.

    Returns:
        ``LogProbs(logp [N], entropy [N] or None)``, float32 (float64 for float64 inputs).

    >>> hidden, weight = torch.eye(2), torch.zeros(4, 2)  # all four tokens are as likely
    >>> target, rows = torch.tensor([0, 3, 1]), torch.tensor([0, 0, 1])
    >>> out = linear_logprob(hidden, weight, target, rows=rows, entropy=True)
    >>> [round(value, 4) for value in (out.logp.exp() + out.entropy.exp()).tolist()]  # 1/4 + 4
    [4.25, 4.25, 4.25]

    Raises:
        TypeError: a dtype that does not fit, a sharded weight.
        ValueError: shapes, devices or values that do not fit. The triton backend finds a target, a row or a
            temperature out of range in its kernels, with no scan of its own: such a row is NaN, and the backward
            raises.
        RuntimeError: a backend that cannot run.
    """
    chosen = resolve_backend("linear_logprob", backend, BUILT)
    if chosen == "triton":
        require_triton("linear_logprob", hidden.device)
        return _run_triton(check_head(hidden, weight, target, rows, bias, temperature, softcap, scan=False), entropy)
    head = check_head(hidden, weight, target, rows, bias, temperature, softcap)
    logp, entropies = LinearLogProb.apply(*head.operands, head.softcap, head.operand_dtype, entropy)
    return LogProbs(logp, entropies)


def _run_triton(head: Head, entropy: bool) -> LogProbs:
    """The custom operators; imported here, so that the package does not need Triton."""
    from pact_kernels.linear_logprob.ops import head_forward

    logp_N, entropy_N, *_ = head_forward(*head.operands, head.softcap or 0.0, head.operand_dtype, entropy, False)
    return LogProbs(logp_N, entropy_N if entropy else None)


def check_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    scan: bool = True,
) -> Head:
    """The checked operands of one call; see ``linear_logprob`` for what is checked.

    ``scan``: whether to look at values on the device (one synchronisation each) for targets, rows and temperatures out
    of range. The Triton kernels look at them themselves, and compute in float32 only.
    """
    operand_dtype = _check_operands(hidden, weight, bias)
    for name, index in (("target", target), ("rows", rows)):
        if not isinstance(index, Tensor) and not (name == "rows" and index is None):
            raise TypeError(f"{name} must be a tensor of integers, got {type(index).__name__}")
    if not scan and operand_dtype == torch.float64:
        raise TypeError("the triton backend computes in float32: use backend='torch' for float64 inputs")
    if rows is None and target.shape != hidden.shape[:1]:
        raise ValueError(f"target is {list(target.shape)} beside {hidden.shape[0]} hidden rows; pass rows to pair them")
    _check_indices("target", target, hidden.device)
    if rows is None:
        rows = torch.arange(target.numel(), device=hidden.device)
    _check_indices("rows", rows, hidden.device)
    if rows.shape != target.shape:
        raise ValueError(f"rows has shape {list(rows.shape)} but target has shape {list(target.shape)}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be a positive number or None, got {softcap}")
    if scan:
        _check_range("target", target, weight.shape[0], "the vocabulary")
        _check_range("rows", rows, hidden.shape[0], "the rows of hidden")
    if target.numel() and not (hidden.shape[0] and weight.shape[0]):
        raise ValueError(f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}: targets need rows in both")
    inv_temperature = _inverse_temperature(temperature, target, operand_dtype, scan)
    return Head(hidden, weight, bias, target.long(), rows.long(), inv_temperature, softcap, operand_dtype)


def _check_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype the operands are rounded to."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [R, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}; "
            "flatten batch dimensions first"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{weight.shape[0]}], got {list(bias.shape)}")
    operands = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, operand in operands.items():
        if hasattr(operand, "full_tensor"):
            raise TypeError(
                f"{name} is a DTensor: each process holds a shard of it. Call this inside the forward of the module "
                "that FSDP2 wraps, where its parameters are gathered, or pass "
                f"{name}.full_tensor(grad_placements=[Partial()]) yourself"
            )
        if operand.dtype not in _OPERAND_DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {operand.dtype}")
        if operand.device != hidden.device:
            raise ValueError(f"{name} is on {operand.device} but hidden is on {hidden.device}")
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    for name, operand in operands.items():
        if operand.dtype != hidden.dtype:
            raise TypeError(f"{name} is {operand.dtype} but hidden is {hidden.dtype}; cast one, or use torch.autocast")
    return hidden.dtype


def _check_indices(name: str, index: Tensor, device: torch.device) -> None:
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"{name} must be 1-D, got shape {list(index.shape)}")
    if index.device != device:
        raise ValueError(f"{name} is on {index.device} but hidden is on {device}")


def _check_range(name: str, index: Tensor, stop: int, what: str) -> None:
    if index.numel() == 0:
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= stop:
        raise ValueError(f"{name} must lie in 0..{stop - 1} ({what}), got {low if low < 0 else high}")


def _inverse_temperature(
    temperature: float | Tensor, target: Tensor, operand_dtype: torch.dtype, scan: bool
) -> Tensor | None:
    """1 / temperature as [N] in the accumulation dtype, or None for the number 1."""
    dtype = torch.float64 if operand_dtype == torch.float64 else torch.float32
    if not isinstance(temperature, Tensor):
        if not (temperature > 1e-38 and math.isfinite(temperature)):  # its inverse is a float32
            raise ValueError(f"temperature must be positive, got {temperature}")
        if temperature == 1:
            return None
        return torch.full(target.shape, 1 / temperature, dtype=dtype, device=target.device)
    if temperature.shape != target.shape or temperature.device != target.device:
        raise ValueError(
            f"temperature must be a number or [N] like target, got {list(temperature.shape)} on {temperature.device} "
            f"beside {list(target.shape)} on {target.device}"
        )
    if scan and not bool(((temperature > 0) & temperature.isfinite()).all()):
        raise ValueError("temperature must be positive and finite in every row")
    return temperature.detach().to(dtype).reciprocal()
