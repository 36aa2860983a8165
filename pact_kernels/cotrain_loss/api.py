"""cotrain_loss and linear_cotrain_loss: argument checks and choice of backend. Compute nothing themselves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pact_kernels.backend import require_triton, resolve_backend
from pact_kernels.cotrain_loss.fused import LinearCoTrainLoss
from pact_kernels.cotrain_loss.rowwise import CoTrainLoss, LossOptions, Rows, row_loss, sum_metrics
from pact_kernels.linear_logprob.api import check_head
from pact_kernels.linear_logprob.chunked import Head
from pact_kernels.terms import METRICS, RL, CoTrainResult, TokenTerms

BUILT = ("torch", "triton")  # auto is torch until the kernels have been measured on a GPU


def cotrain_loss(
    logp: Tensor,
    terms: TokenTerms,
    *,
    entropy: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    clip_dual: float | None = None,
    backend: str = "auto",
) -> CoTrainResult:
    """The co-training loss ``sum_i weight_i l_i`` of rows whose log-probs are known (DESIGN sections 1 and 3).

    ``l_RL = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef (e^d - d - 1) - entropy_coef H`` with
    ``r = exp(logp - old_logp)``, ``d = ref_logp - logp``; ``l_SFT = -logp``. With ``clip_dual`` = c the first term is
    at most ``-c A`` where A < 0 (dual-clip PPO, arXiv 1912.09729). Differentiable once, in logp and entropy; the terms
    are constants. A row of weight 0 adds nothing, even where its loss is not finite.

    Args:
        logp: [N] float32 or float64, nats.
        terms: what each row is; see ``TokenTerms``.
        entropy: [N] like logp; needed where entropy_coef is not 0, else for the metrics only.
        clip_low, clip_high: how far below and above 1 the ratio may go.
        kl_coef: coefficient of the k3 KL to ``ref_logp``, RL rows only.
        entropy_coef: coefficient of the entropy bonus, RL rows only.
        clip_dual: how far above 1 the ratio of a row with A < 0 may go, above 1; None: without limit. Where
            ``old_logp`` is of another policy than the one that is trained, such rows else outweigh all others.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``CoTrainResult``: a scalar of the dtype of logp, and float64 sums by kind, branch and component.

    >>> from torch import tensor
    >>> logp = tensor([-1.0, -3.0], requires_grad=True)
    >>> on_policy = tensor([-1.0, 0.0])  # ratio 1; not read in the second row, which is of the trace
    >>> terms = TokenTerms(tensor([7, 3]), on_policy, tensor([2.0, 0.0]), tensor([0.5, 0.5]), kind=tensor([0, 1]))
    >>> result = cotrain_loss(logp, terms)
    >>> result.loss.item()  # 0.5 * (-1 * 2) + 0.5 * 3
    0.5
    >>> result.loss.backward()
    >>> logp.grad.tolist()
    [-1.0, -0.5]

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: lengths, devices or coefficients that do not fit; kl_coef without ref_logp, entropy_coef without
            entropy.
        RuntimeError: a backend that cannot run.
    """
    chosen = resolve_backend("cotrain_loss", backend, BUILT)
    if chosen == "triton":
        require_triton("cotrain_loss", logp.device)
    options = LossOptions(clip_low, clip_high, kl_coef, entropy_coef, math.inf if clip_dual is None else clip_dual)
    _check_options(options, terms)
    _check_rows("logp", logp, terms)
    if entropy is not None:
        _check_rows("entropy", entropy, terms)
        if entropy.dtype != logp.dtype:
            raise TypeError(f"entropy is {entropy.dtype} but logp is {logp.dtype}")
    elif entropy_coef != 0:
        raise ValueError("entropy_coef is not 0 but no entropy was given; ask linear_logprob for it with entropy=True")
    if chosen == "triton":
        return _run_triton(logp, entropy, terms, options)
    with torch.no_grad():
        row = row_loss(logp, entropy, Rows.of(terms, logp.dtype), options)
        metrics = sum_metrics(logp, entropy, terms, row)
    return CoTrainResult(CoTrainLoss.apply(logp, entropy, row), metrics)


def _run_triton(logp: Tensor, entropy: Tensor | None, terms: TokenTerms, options: LossOptions) -> CoTrainResult:
    """The custom operator; imported here, so that the package does not need Triton."""
    from pact_kernels.cotrain_loss.ops import cotrain_loss_op

    if logp.dtype == torch.float64:
        raise TypeError("the triton backend computes in float32: use backend='torch' for float64 log-probs")
    loss, metrics, *_ = cotrain_loss_op(logp, entropy, *_columns(terms), _coefficients(options))
    return CoTrainResult(loss, _by_name(metrics))


def linear_cotrain_loss(
    hidden: Tensor,
    weight: Tensor,
    terms: TokenTerms,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    clip_dual: float | None = None,
    backend: str = "auto",
) -> CoTrainResult:
    """``cotrain_loss`` of ``linear_logprob(hidden, weight, terms.target, ...)``, fused: the fast path.

    Takes the arguments of both and equals their composition, but forms the gradients in the forward, chunk by chunk
    (three matmuls a row, no recomputation), wherever hidden, weight or bias need one; they are kept in float32 until
    the backward, which scales them by the upstream gradient. Rows without gradient are dropped before the matmuls.

    Args:
        entropy: whether the metrics shall have the entropies even where entropy_coef is 0.
        hidden, weight, rows, bias, temperature, softcap: see ``linear_logprob``.
        terms, clip_low, clip_high, kl_coef, entropy_coef, clip_dual: see ``cotrain_loss``.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        TypeError, ValueError, RuntimeError: as ``linear_logprob`` and ``cotrain_loss``.
    """
    chosen = resolve_backend("linear_cotrain_loss", backend, BUILT)
    if chosen == "triton":
        require_triton("linear_cotrain_loss", hidden.device)
    options = LossOptions(clip_low, clip_high, kl_coef, entropy_coef, math.inf if clip_dual is None else clip_dual)
    _check_options(options, terms)
    head = check_head(hidden, weight, terms.target, rows, bias, temperature, softcap, scan=chosen == "torch")
    with_entropy = entropy or entropy_coef != 0
    needs = tuple(
        torch.is_grad_enabled() and operand is not None and operand.requires_grad for operand in (hidden, weight, bias)
    )
    if chosen == "triton":
        return _run_fused_triton(head, terms, options, with_entropy, needs)
    constants = Rows.of(terms, head.dtype)
    loss, logp, entropies = LinearCoTrainLoss.apply(hidden, weight, bias, head, constants, options, with_entropy, needs)
    with torch.no_grad():
        metrics = sum_metrics(logp, entropies, terms, row_loss(logp, entropies, constants, options))
    return CoTrainResult(loss, metrics)


def _run_fused_triton(
    head: Head, terms: TokenTerms, options: LossOptions, entropy: bool, needs: tuple[bool, ...]
) -> CoTrainResult:
    """The custom operators; imported here, so that the package does not need Triton.

    float16 needs a loss scale, which is known in the backward only: gradients formed before it would underflow. So
    float16 takes the composition, whose backward is given the scale.
    """
    from pact_kernels.cotrain_loss.ops import cotrain_loss_op, linear_cotrain_loss_op
    from pact_kernels.linear_logprob.ops import head_forward

    softcap = head.softcap or 0.0
    if head.operand_dtype == torch.float16:
        logp, entropies, *_ = head_forward(*head.operands, softcap, head.operand_dtype, entropy, True)
        result = cotrain_loss_op(logp, entropies if entropy else None, *_columns(terms), _coefficients(options))
    else:
        result = linear_cotrain_loss_op(
            *head.operands, softcap, head.operand_dtype, entropy, *_columns(terms), _coefficients(options), list(needs)
        )
    return CoTrainResult(result[0], _by_name(result[1]))


def _columns(terms: TokenTerms) -> tuple[Tensor | None, ...]:
    """What the operators read of the terms."""
    names = ("old_logp", "advantage", "weight", "kind", "component", "branch", "ref_logp")
    values = (getattr(terms, name) for name in names)
    return tuple(None if value is None else value.detach() for value in values)


def _coefficients(options: LossOptions) -> list[float]:
    return [options.clip_low, options.clip_high, options.kl_coef, options.entropy_coef, options.clip_dual]


def _by_name(metrics: Tensor) -> dict[str, Tensor]:
    return dict(zip(METRICS, metrics.detach().unbind()))


def _check_options(options: LossOptions, terms: TokenTerms) -> None:
    if not isinstance(terms, TokenTerms):
        raise TypeError(f"terms must be TokenTerms, got {type(terms).__name__}")
    if not 0 <= options.clip_low <= 1:
        raise ValueError(f"clip_low must lie in 0..1, got {options.clip_low}")
    if not options.clip_high >= 0:
        raise ValueError(f"clip_high must not be negative, got {options.clip_high}")
    if not options.clip_dual > 1:
        raise ValueError(f"clip_dual must be above 1, or None for no limit, got {options.clip_dual}")
    for name, value in (("kl_coef", options.kl_coef), ("entropy_coef", options.entropy_coef)):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    # Inside a torch.compile region kinds cannot be looked at.
    if (
        options.kl_coef != 0
        and terms.ref_logp is None
        and (torch.compiler.is_compiling() or bool((terms.kind == RL).any()))
    ):
        raise ValueError("kl_coef is not 0 but RL rows have no ref_logp; fill TokenTerms.ref_logp or set kl_coef=0")


def _check_rows(name: str, values: Tensor, terms: TokenTerms) -> None:
    if values.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {values.dtype}")
    if values.shape != terms.target.shape:
        raise ValueError(f"{name} has shape {list(values.shape)} but the terms have {list(terms.target.shape)}")
    if values.device != terms.target.device:
        raise ValueError(f"{name} is on {values.device} but the terms are on {terms.target.device}")
