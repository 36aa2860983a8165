"""The ways of the LM-head benchmark: ours, PyTorch's and the peers', each behind the same two calls.

Holds the operands, one adapter a way, and what each way computes. Measures nothing, and imports a peer only when its
adapter is loaded: a machine without it still runs the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pact_kernels import TokenTerms, linear_cotrain_loss, linear_logprob
from pact_kernels.backend import INTERPRETED
from pact_kernels.terms import RL

MASKED, LIVE = 0, 1  # components of the rows
MASKED_SHARE, ZERO_SHARE = 0.6, 0.1  # of all rows; of the rest
ROWS_OF = 8  # compacted row counts are multiples of this: peers that load by TMA refuse others


class Absent(Exception):
    """This way cannot run here; the message says why."""


@dataclass(frozen=True)
class Shape:
    """N rows, hidden size H, vocabulary V."""

    n: int
    h: int
    v: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``"8192x2560x151936"`` is N x H x V."""
        n, h, v = (int(part) for part in text.split("x"))
        return cls(n, h, v)

    @property
    def live(self) -> int:
        """Rows of a PACT batch that carry weight."""
        return ROWS_OF * max(1, round((1 - MASKED_SHARE) * self.n / ROWS_OF))

    @property
    def active(self) -> int:
        """Rows of a PACT batch whose coefficient is not 0."""
        return self.live - round(ZERO_SHARE * self.live)

    def __str__(self) -> str:
        return f"{self.n}x{self.h}x{self.v}"


@dataclass(frozen=True)
class Operands:
    """One batch. Ratios are 1, so the gradient of every way with row weights is that of ``-sum gain_i logp_i``."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    target: Tensor  # [N]
    gain: Tensor  # [N] float32: weight x advantage
    live: Tensor  # [N] bool: rows of weight > 0
    terms: TokenTerms

    def frozen(self) -> Operands:
        """The same without gradients: some peers look at ``requires_grad`` and not at ``torch.no_grad``."""
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach())

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def rows(self, index_N: Tensor) -> Operands:
        """A batch of these rows, under the same weight."""
        hidden = self.hidden.detach()[index_N].requires_grad_()
        return make_operands(
            hidden, self.weight, self.target[index_N], self.terms.advantage[index_N], self.live[index_N]
        )


def make_operands(hidden: Tensor, weight: Tensor, target: Tensor, advantage: Tensor, live: Tensor) -> Operands:
    """Weights are 1 / (live rows); a masked row has weight 0 and a component of its own, as prompt tokens have."""
    weight_N = live.float() / live.sum()
    kind = torch.full_like(target, RL)
    component = torch.where(live, LIVE, MASKED)
    terms = TokenTerms(target, None, advantage, weight_N, kind, component)
    return Operands(hidden, weight, target, weight_N * advantage, live, terms)


def make_batches(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Operands]:
    """``dense``; ``pact``, all N rows with weights; ``pact compacted``, its rows of weight > 0. One weight for all.

    Targets get a probability from near 0 to near 1, as a trained model gives: with flat logits a peer that skips small
    gradients would skip nearly all of them.
    """
    generator = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, generator=generator, device=device)
    weight = (random(shape.v, shape.h) / math.sqrt(shape.h)).to(dtype)
    target = torch.randint(shape.v, (shape.n,), generator=generator, device=device)
    boost = (math.log(shape.v) + 0.5) * (0.5 + torch.rand(shape.n, generator=generator, device=device))
    hidden = (random(shape.n, shape.h) + boost[:, None] * weight[target].float()).to(dtype)
    weight.requires_grad_()
    hidden.requires_grad_()
    advantage = random(shape.n)
    order = torch.randperm(shape.n, generator=generator, device=device)
    dense = make_operands(hidden, weight, target, advantage, torch.ones_like(target, dtype=torch.bool))
    live = torch.zeros_like(dense.live)
    live[order[: shape.live]] = True
    advantage = advantage.clone()
    advantage[order[shape.active : shape.live]] = 0.0
    pact = make_operands(hidden.detach().clone().requires_grad_(), weight, target, advantage, live)
    return {"dense": dense, "pact": pact, "pact compacted": pact.rows(live.nonzero().squeeze(1))}


class Calls(NamedTuple):
    """What a way does. ``forward``: log-probs [N], or their sum over the live rows. ``loss``: a scalar."""

    forward: Callable[[Operands], Tensor]
    loss: Callable[[Operands], Tensor]


@dataclass(frozen=True)
class Way:
    """One way to do the work, and how fair the comparison is."""

    name: str
    note: str
    load: Callable[[torch.device], Calls]  # imports what it needs; raises where that fails
    ours: bool = False  # takes batches with rows of weight 0; a peer gets compacted rows alone
    uniform: bool = False  # computes sum(-logp) with every coefficient 1, and no row weights: an easier job
    needs_gpu: bool = False

    def open(self, device: torch.device, interpreted: bool = False) -> Calls:
        """The calls of this way on ``device``.

        Args:
            interpreted: whether kernels in Triton's interpreter will do: they are right, their times mean nothing.

        Raises:
            Absent: it cannot run here.
        """
        try:
            calls = self.load(device)
        except Absent:
            raise
        except Exception as error:  # a peer's import may raise anything
            raise Absent(one_line(error)) from None
        if self.needs_gpu and device.type != "cuda" and not (INTERPRETED and interpreted):
            raise Absent("needs a GPU")
        return calls


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}".rstrip(": ")


def from_logp(logp_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Calls:
    """The calls of a way that gives differentiable log-probs of (hidden, weight, target)."""

    def forward(x: Operands) -> Tensor:
        return logp_of(x.hidden, x.weight, x.target)

    def loss(x: Operands) -> Tensor:
        return -(x.gain * logp_of(x.hidden, x.weight, x.target)).sum()

    return Calls(forward, loss)


def from_total(nll_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Calls:
    """The calls of a way that gives sum(-logp) alone."""

    def forward(x: Operands) -> Tensor:
        return -nll_of(x.hidden, x.weight, x.target)

    def loss(x: Operands) -> Tensor:
        return nll_of(x.hidden, x.weight, x.target)

    return Calls(forward, loss)


def naive_logp(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor) -> Tensor:
    logits_NV = (hidden_NH @ weight_VH.T).float()
    return torch.log_softmax(logits_NV, dim=-1).gather(1, target_N[:, None])[:, 0]


def load_fused(device: torch.device, backend: str) -> Calls:
    def forward(x: Operands) -> Tensor:
        result = linear_cotrain_loss(x.hidden, x.weight, x.terms, backend=backend)
        return result.metrics["logp"][..., LIVE].sum()

    def loss(x: Operands) -> Tensor:
        return linear_cotrain_loss(x.hidden, x.weight, x.terms, backend=backend).loss

    _probe(loss, "linear_cotrain_loss", device)
    return Calls(forward, loss)


def load_logprob(device: torch.device, backend: str) -> Calls:
    def forward(x: Operands) -> Tensor:
        return linear_logprob(x.hidden, x.weight, x.target, backend=backend).logp

    def loss(x: Operands) -> Tensor:
        logp = linear_logprob(x.hidden, x.weight, x.target, backend=backend).logp
        return -(torch.exp(logp - logp.detach()) * x.gain).sum()

    _probe(loss, "linear_logprob", device)
    return Calls(forward, loss)


def _probe(loss: Callable[[Operands], Tensor], op: str, device: torch.device) -> None:
    """Absent where the library itself refuses this backend: such an error begins with the name of the operation."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        loss(make_batches(Shape(ROWS_OF, 16, 32), device, dtype)["dense"])
    except Exception as error:  # any other is for the gate to meet: a failure, not an absence
        if isinstance(error, RuntimeError) and str(error).startswith(f"{op}:"):
            raise Absent(str(error)) from None


def load_naive(device: torch.device) -> Calls:
    return from_logp(naive_logp)


def load_compiled(device: torch.device) -> Calls:
    calls = from_logp(naive_logp)
    return Calls(torch.compile(calls.forward, dynamic=False), torch.compile(calls.loss, dynamic=False))


def load_torch(device: torch.device, reduction: str, options: dict | None) -> Calls:
    """``F.linear_cross_entropy``; ``options`` None is its reference path."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no F.linear_cross_entropy")
    chunking = None if options is None else torch.nn.LinearCrossEntropyOptions(**options)

    def nll(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, target, reduction=reduction, options=chunking)

    return from_total(nll) if reduction == "sum" else from_logp(lambda *x: -nll(*x))


def load_liger(device: torch.device, reduction: str, budget: int) -> Calls:
    """``budget``: how many times the default the chunks may take."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Function

    # The module's public class has no argument for the chunks: the function behind it is called with the class's
    # defaults (no bias, class weights, smoothing, softcap or extra outputs; ignore_index -100).
    extras: tuple = (None, None, -100, 0.0, 0.0, reduction)
    if budget > 1:
        extras += (None, False, None, False, False, False, None, None, budget)

    def nll(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return Function.apply(hidden, weight, target, *extras)[0]

    return from_total(nll) if reduction == "sum" else from_logp(lambda *x: -nll(*x))


def load_liger_scaled(device: torch.device) -> Calls:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        import liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90  # noqa: F401  absent without CuTe DSL
    return from_logp(lambda hidden, weight, target: -Function.apply(hidden, weight, target))


def load_cce(device: torch.device, filter_eps: str | None) -> Calls:
    from cut_cross_entropy import linear_cross_entropy

    def logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, target, reduction="none", filter_eps=filter_eps)

    return from_logp(logp)


def load_quack(device: torch.device, uniform: bool) -> Calls:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy, linear_cross_entropy_func

    if uniform:
        return from_total(partial(chunked_linear_cross_entropy, reduction="sum"))

    def logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -linear_cross_entropy_func(hidden, weight, None, target, reduction="none", inplace_backward=True)

    return from_logp(logp)


def _ours() -> list[Way]:
    fused = (
        "loss and metrics, so log-probs of every row it gets; gradients formed in the forward, of rows with one alone"
    )
    logprob = "log-probs of every row it gets; backward recomputes the logits of the rows with a coefficient"
    ways = []
    for backend in ("triton", "torch"):
        gpu = backend == "triton"
        ways.append(Way(f"fused {backend}", fused, partial(load_fused, backend=backend), ours=True, needs_gpu=gpu))
        ways.append(
            Way(f"logprob {backend}", logprob, partial(load_logprob, backend=backend), ours=True, needs_gpu=gpu)
        )
    return ways


def _pytorch() -> list[Way]:
    none, total = partial(load_torch, reduction="none"), partial(load_torch, reduction="sum")
    large = {"batch_chunk_size": 2048, "chunking_method": None}
    weighted = "row weights on reduction='none': logits recomputed in the backward"
    easier = "reduction='sum': one coefficient for all rows, gradients formed in the forward; the easier job"
    return [
        Way("naive", "keeps the logits; float32 log_softmax", load_naive),
        Way("torch.compile", "naive, compiled for each shape, default mode", load_compiled),
        Way("torch lce", "F.linear_cross_entropy, row weights; keeps the logits, rounded", partial(none, options=None)),
        Way("torch lce chunked", f"{weighted}; default options", partial(none, options={})),
        Way("torch lce chunked 2048", f"{weighted}; chunks of 2048 rows", partial(none, options=large)),
        Way("torch lce sum", f"{easier}; default options", partial(total, options={}), uniform=True),
        Way("torch lce sum 2048", f"{easier}; chunks of 2048 rows", partial(total, options=large), uniform=True),
    ]


def _peers() -> list[Way]:
    rounded = "logits rounded to bf16, dW added up in bf16"
    ways = []
    for budget, chunks in ((1, "default chunks"), (8, "chunks 8 times larger")):
        suffix = "" if budget == 1 else f" x{budget}"
        none = partial(load_liger, reduction="none", budget=budget)
        total = partial(load_liger, reduction="sum", budget=budget)
        note = f"row weights on reduction='none': logits recomputed in the backward; {chunks}; {rounded}"
        ways.append(Way(f"liger{suffix}", note, none, needs_gpu=True))
        note = f"reduction='sum': one coefficient for all rows, the easier job; {chunks}; {rounded}"
        ways.append(Way(f"liger sum{suffix}", note, total, uniform=True, needs_gpu=True))
    scaled = "row weights; CuTe DSL on sm_90 (dW added up in bf16), chunks of 512 rows in PyTorch elsewhere"
    filtered = "row weights; its default: skips blocks of softmax gradient below eps/32, so not exact; dW in bf16"
    exact = "row weights; filter_eps=None: nothing skipped; dW in bf16"
    chunked = "reduction='sum': one coefficient for all rows and no log-probs by row, the easier job; its best pipeline"
    kept = "row weights on reduction='none', which it computes on kept logits, rounded; gradient in their place"
    return [
        *ways,
        Way("liger scaled", scaled, load_liger_scaled),
        Way("cce", filtered, partial(load_cce, filter_eps="high"), needs_gpu=True),
        Way("cce exact", exact, partial(load_cce, filter_eps=None), needs_gpu=True),
        Way("quack sum", chunked, partial(load_quack, uniform=True), uniform=True, needs_gpu=True),
        Way("quack", kept, partial(load_quack, uniform=False), needs_gpu=True),
    ]


WAYS: tuple[Way, ...] = (*_ours(), *_pytorch(), *_peers())
