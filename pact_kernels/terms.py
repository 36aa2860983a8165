"""What goes into and comes out of the losses: plain records of tensors. Computes nothing."""

from __future__ import annotations

import math
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

    @classmethod
    def from_padded(
        cls,
        input_ids: Tensor,
        mask: Tensor,
        advantage: float | Tensor | None = None,
        *,
        denominator: float | Tensor | tuple[float | Tensor, float | Tensor],
        kind: int | Tensor = RL,
        old_logp: Tensor | None = None,
        ref_logp: Tensor | None = None,
        weight: float | Tensor = 1.0,
        component: int | Tensor | None = None,
        branch: int | Tensor | None = None,
        shifted: bool = False,
    ) -> tuple[TokenTerms, Tensor]:
        """The terms of a padded batch, and the row of the flattened hidden states [B * T, H] that predicts each token.

        The token in column t is predicted in column t - 1. Padding may stand on either side, for only the mask is read:
        let it leave out the first token of every sequence, which nothing predicts. Tensors with one value a token are
        aligned with the tokens they speak of and may be narrower than ``input_ids``: [B, C] holds the last C of the T
        columns. So completions beside prompt + completion fit as they are, as do log-probs of ``logits[:, :-1]``.

        Args:
            input_ids: [B, T] integers, whole sequences.
            mask: [B, C], bool or 0 and 1 of any type: 1 on the tokens that count, sampled or supervised.
            advantage: ``A``: floats [B] or [B, C], or a number; may be left out with ``kind=SFT``.
            denominator: what weights are divided by, counted over the WHOLE optimiser step (micro-batches, processes):
                Z, or Z_sft with ``kind=SFT``, or the pair (Z, Z_sft), which a tensor of kinds needs. Losses that share
                the step's denominators add up. (DDP and FSDP average: multiply the loss by the number of processes.)
            kind: ``RL`` or ``SFT``, or integers [B] or [B, C] of them.
            old_logp, ref_logp: floats [B, C], or None; see above.
            weight: factor before the division, for coefficients, branches, annealing: a number, or [B] or [B, C].
            component, branch: a number, or integers [B] or [B, C], or None; see above.
            shifted: the hidden states are already shifted: row t predicts the token in column t, and column 0 may
                count. So it is where only those of completions are at hand; ``input_ids`` are then the completions.

        Returns:
            ``(terms, rows)`` for ``linear_cotrain_loss(hidden.flatten(0, 1), head_weight, terms, rows=rows)``: N tokens
            by sequence and column, none where the mask is all 0. ``terms.sequence`` is the place in the batch.

        Synchronises with the device: ``mask.nonzero()``, one look at the mask, denominators that are on the device, the
        checks of ``TokenTerms``. For use outside ``torch.compile`` regions.

        >>> from torch import tensor
        >>> input_ids = tensor([[0, 5, 7, 8], [5, 6, 9, 0]])  # padded on the left, on the right
        >>> mask = tensor([[0, 0, 1, 1], [0, 0, 1, 0]])
        >>> terms, rows = TokenTerms.from_padded(input_ids, mask, tensor([1.0, -1.0]), denominator=mask.sum())
        >>> terms.target.tolist(), rows.tolist(), terms.advantage.tolist()
        ([7, 8, 9], [1, 2, 5], [1.0, 1.0, -1.0])

        Raises:
            TypeError: as ``TokenTerms``.
            ValueError: as ``TokenTerms``; shapes or devices that do not fit, a mask that is not 0 and 1 or counts
                column 0, RL without advantage, a denominator that is negative, not finite, or 0 beside its tokens.
        """
        if advantage is None:
            if isinstance(kind, Tensor) or kind != SFT:
                raise ValueError("RL tokens need an advantage, [B] or [B, C]; a batch of traces alone takes kind=SFT")
            advantage = 0.0
        tokens = _PaddedTokens.of(input_ids, mask, shifted)
        optional = {"old_logp": old_logp, "component": component, "ref_logp": ref_logp, "branch": branch}
        kind_N = tokens.values("kind", kind)
        terms = cls(
            target=input_ids[tokens.sequence_N, tokens.column_N],
            advantage=tokens.values("advantage", advantage),
            weight=_divided(tokens.values("weight", weight), denominator, kind, kind_N),
            kind=kind_N,
            sequence=tokens.sequence_N,
            **{name: None if value is None else tokens.values(name, value) for name, value in optional.items()},
        )
        return terms, tokens.sequence_N * tokens.width + tokens.column_N - (0 if shifted else 1)

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
class _PaddedTokens:
    """The tokens that a mask counts: their places in ``input_ids`` [batch, width], none before column ``first``."""

    sequence_N: Tensor
    column_N: Tensor
    batch: int
    width: int
    first: int

    @classmethod
    def of(cls, input_ids: Tensor, mask: Tensor, shifted: bool) -> _PaddedTokens:
        for name, value in (("input_ids", input_ids), ("mask", mask)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [B, T], got shape {list(input_ids.shape)}")
        batch, width = input_ids.shape
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] > width:
            raise ValueError(f"mask must be [{batch}, C] with C up to {width} columns, got {list(mask.shape)}")
        if mask.device != input_ids.device:
            raise ValueError(f"mask is on {mask.device} but input_ids are on {input_ids.device}")
        sequence_N, column_N = mask.nonzero(as_tuple=True)
        column_N = column_N + (width - mask.shape[1])
        if not column_N.numel():
            return cls(sequence_N, column_N, batch, width, first=width)
        first, sound = torch.stack([column_N.min(), ((mask == 0) | (mask == 1)).all().long()]).tolist()
        if not sound:
            raise ValueError("mask must hold 0 and 1 only; factors of the loss go into weight")
        if first == 0 and not shifted:
            raise ValueError(
                "mask counts a token in column 0, which no hidden state predicts: set it to 0 on prompts, or pass "
                "shifted=True where row t of the hidden states already predicts the token in column t"
            )
        return cls(sequence_N, column_N, batch, width, first)

    def values(self, name: str, value: float | Tensor) -> Tensor:
        """[N] of a number, of [B] or of [B, C], the last C columns; log-probs are of [B, C] alone."""
        per_token = name in ("old_logp", "ref_logp")
        if not isinstance(value, Tensor):
            dtype = torch.int64 if name in _INTEGER_FIELDS else torch.float64
            return torch.full_like(self.column_N, value, dtype=dtype)
        if value.device != self.column_N.device:
            raise ValueError(f"{name} is on {value.device} but input_ids are on {self.column_N.device}")
        if value.dim() == 1 and len(value) == self.batch and not per_token:
            return value[self.sequence_N]
        if value.dim() != 2 or value.shape[0] != self.batch or value.shape[1] > self.width:
            wanted = f"[{self.batch}, C] with C up to {self.width} columns"
            raise ValueError(
                f"{name} must be {'' if per_token else f'[{self.batch}] or '}{wanted}, got {list(value.shape)}"
            )
        missing = self.width - value.shape[1]
        if self.first < missing:
            raise ValueError(
                f"{name} holds the last {value.shape[1]} of {self.width} columns, but mask counts a token in column "
                f"{self.first}, before them"
            )
        return value[self.sequence_N, self.column_N - missing]


def _divided(
    weight_N: Tensor,
    denominator: float | Tensor | tuple[float | Tensor, float | Tensor],
    kind: int | Tensor,
    kind_N: Tensor,
) -> Tensor:
    """The weights over the denominators of their kinds; see ``TokenTerms.from_padded``."""
    given = denominator if isinstance(denominator, tuple) else (denominator,)
    if len(given) != 2 and (len(given) != 1 or isinstance(kind, Tensor)):
        raise ValueError("denominator must be one number, or the pair (Z, Z_sft), which a tensor of kinds needs")
    z = [float(one) for one in given]
    by_kind = {RL: z[0], SFT: z[-1]}
    for one, value in by_kind.items():
        if not 0 <= value < math.inf or (value == 0 and bool((kind_N == one).any())):
            raise ValueError(
                f"denominator {value:g} divides the {'SFT' if one == SFT else 'RL'} tokens: count them over the whole "
                "optimiser step, before the loss"
            )
    if weight_N.dtype in (torch.float16, torch.bfloat16):
        weight_N = weight_N.float()  # 1 / Z has no room in them
    return torch.where(kind_N == SFT, weight_N / by_kind[SFT], weight_N / by_kind[RL])


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
