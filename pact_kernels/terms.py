"""What goes into and comes out of the losses: plain records of tensors. Computes nothing."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

RL, SFT = 0, 1  # kind of a row
PROMPT_BRANCH, TRACE_BRANCH = 0, 1  # context under which an RL row was scored
N_KINDS, N_BRANCHES, N_COMPONENTS = 2, 2, 8  # shape of every metric
METRICS = ("tokens", "weight", "loss", "logp", "ratio", "clipped", "kl", "entropy")  # see CoTrainResult

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_INTEGER_FIELDS = ("target", "kind", "component", "branch", "sequence")


@dataclass(frozen=True)
class TokenTerms:
    """One row a predicted token: what the objective wants from its log-prob. All tensors are [N] on one device.

    Shapes, types, kinds, components, branches and weights are checked once, here (one device synchronisation; not
    inside a ``torch.compile`` region, where values cannot be looked at).

    Args:
        target: token id that the row predicts, integers of any width.
        old_logp: log-prob (nats) under the policy of the ratio's denominator; not read on SFT rows. None: on-policy,
            the row's own log-prob without gradient, so every ratio is exactly 1.
        advantage: ``A``; not read on SFT rows.
        weight: component weight x branch weight / global denominator. Rows of weight 0 add nothing to loss or
            gradient, whatever else they hold; metrics still count them.
        kind: ``RL`` or ``SFT``.
        component: 0 .. ``N_COMPONENTS`` - 1; None: all 0. Metrics are summed by it.
        ref_logp: log-prob under the KL reference, or None where no row needs it.
        branch: ``PROMPT_BRANCH`` or ``TRACE_BRANCH``; None: all ``PROMPT_BRANCH``.
        sequence: the caller's number of the sequence a row belongs to; carried, not read.

    >>> from torch import tensor
    >>> terms = TokenTerms(  # a sampled token with advantage 2, and a token of the trace; both weigh 1/2
    ...     target=tensor([7, 3]),
    ...     old_logp=tensor([-1.0, 0.0]),
    ...     advantage=tensor([2.0, 0.0]),
    ...     weight=tensor([0.5, 0.5]),
    ...     kind=tensor([RL, SFT]),
    ... )
    >>> len(terms)
    2

    Raises:
        TypeError: a field that is no tensor, integers where floats are due or the reverse.
        ValueError: not 1-D, unequal lengths, several devices, a kind, component or branch that does not exist, a
            weight that is negative or not finite.
    """

    target: Tensor
    old_logp: Tensor | None
    advantage: Tensor
    weight: Tensor
    kind: Tensor
    component: Tensor | None = None
    ref_logp: Tensor | None = None
    branch: Tensor | None = None
    sequence: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in self._tensors().items():
            self._check_field(name, value)
        if self.target.numel() > 0 and not torch.compiler.is_compiling():
            self._check_values()

    def __len__(self) -> int:
        return self.target.numel()

    def to(self, device: torch.device | str) -> TokenTerms:
        """The same terms on ``device``."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        optional = ("old_logp", "component", "ref_logp", "branch", "sequence")
        return {name: value for name, value in values.items() if value is not None or name not in optional}

    def _check_field(self, name: str, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"TokenTerms.{name} must be a tensor, got {type(value).__name__}")
        if name in _INTEGER_FIELDS and value.dtype not in _INTEGERS:
            raise TypeError(f"TokenTerms.{name} must hold integers, got {value.dtype}")
        if name not in _INTEGER_FIELDS and not value.is_floating_point():
            raise TypeError(f"TokenTerms.{name} must hold floating point numbers, got {value.dtype}")
        if value.dim() != 1 or value.shape != self.target.shape:
            raise ValueError(
                f"TokenTerms.{name} must be 1-D and as long as target, got shape {list(value.shape)} "
                f"beside target {list(self.target.shape)}"
            )
        if value.device != self.target.device:
            raise ValueError(f"TokenTerms.{name} is on {value.device} but target is on {self.target.device}")

    def _check_values(self) -> None:
        stops = {"kind": N_KINDS, "component": N_COMPONENTS, "branch": N_BRANCHES}
        stops = {name: stop for name, stop in stops.items() if getattr(self, name) is not None}
        bounds = [bound.double() for name in stops for bound in getattr(self, name).aminmax()]
        weight = self.weight.detach()
        bounds.append(((weight >= 0) & weight.isfinite()).all().double())
        *found, sound = torch.stack(bounds).tolist()  # one synchronisation
        for (name, stop), low, high in zip(stops.items(), found[::2], found[1::2], strict=True):
            if low < 0 or high >= stop:
                raise ValueError(f"TokenTerms.{name} must lie in 0..{stop - 1}, got {int(low if low < 0 else high)}")
        if not sound:
            raise ValueError("TokenTerms.weight must be finite and not negative; the sign of a row is its advantage's")


@dataclass(frozen=True)
class LogProbs:
    """``logp`` [N] and ``entropy`` [N] (None unless asked for), nats, float32 (float64 for float64 inputs)."""

    logp: Tensor
    entropy: Tensor | None = None


@dataclass(frozen=True)
class CoTrainResult:
    """The scalar ``loss`` and what it is made of.

    ``metrics`` maps a name to a detached float64 tensor [N_KINDS, N_BRANCHES, N_COMPONENTS] of SUMS over rows, so that
    trees, accumulation steps and processes just add. Every name is always there; ``kl`` is 0 without ``ref_logp``,
    ``entropy`` is 0 when it was not computed.

    ============ =================================================================================
    ``tokens``   number of rows, whatever their weight
    ``weight``   weight_i
    ``loss``     weight_i l_i
    ``logp``     log-prob
    ``ratio``    exp(logp - old_logp), RL rows
    ``clipped``  number of RL rows whose surrogate gradient the clip cuts
    ``kl``       k3 = e^d - d - 1 with d = ref_logp - logp, RL rows
    ``entropy``  entropy of the row's distribution, all rows
    ============ =================================================================================
    """

    loss: Tensor
    metrics: dict[str, Tensor]
