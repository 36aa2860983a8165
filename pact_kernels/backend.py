"""Which backend a call uses, and the error when it cannot. Never falls back silently, never probes at import."""

from __future__ import annotations

from collections.abc import Sequence

NAMES: dict[str, tuple[str, ...]] = {
    "linear_logprob": ("triton", "torch"),
    "cotrain_loss": ("triton", "torch"),
    "linear_cotrain_loss": ("triton", "torch"),
    "tree_attention": ("triton", "flash", "torch"),
}


def resolve_backend(op: str, backend: str, built: Sequence[str]) -> str:
    """The backend that a call of ``op`` runs on.

    Args:
        op: public name of the operation, a key of ``NAMES``.
        backend: the caller's request, ``"auto"`` or one of ``NAMES[op]``.
        built: what this build has for ``op``, best first; ``"auto"`` takes the first.

    Raises:
        ValueError: ``backend`` is no backend of ``op``.
        RuntimeError: it is one, but this build has no such kernel.
    """
    if backend == "auto":
        return built[0]
    if backend in built:
        return backend
    if backend not in NAMES[op]:
        known = ", ".join(repr(name) for name in ("auto", *NAMES[op]))
        raise ValueError(f"{op}: unknown backend {backend!r}; choose one of {known}")
    has = " or ".join(repr(name) for name in ("auto", *built))
    raise RuntimeError(f"{op}: this build has no {backend} kernel for this operation yet; use backend={has}")
