"""Which backend a call uses, and the error when it cannot. Never falls back silently, never probes at import."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

# Triton reads the variable when a kernel is decorated, so it is one setting of the process.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

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


def require_triton(op: str, device: torch.device) -> str:
    """The architecture, a key of the tables in ``tiles.py``, for which ``op`` compiles its kernels on ``device``.

    Raises RuntimeError where Triton cannot run: no Triton, tensors on the CPU without the interpreter, an old GPU.
    """
    try:
        import triton  # noqa: F401
    except ImportError:
        raise RuntimeError(f"{op}: Triton is not installed: pip install triton, or use backend='torch'") from None
    if INTERPRETED:
        return "interpreter"
    if device.type != "cuda":
        raise RuntimeError(
            f"{op}: the triton backend needs tensors on a GPU and got {device}: move them, use backend='torch', or set "
            "TRITON_INTERPRET=1 before the first import to run its kernels in Triton's interpreter"
        )
    return architecture(device)


def architecture(device: torch.device) -> str:
    """Which tiles a GPU takes: those of the newest architecture of its maker that is not newer than it."""
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(
            f"the triton backend needs compute capability 8.0, this GPU has {major}.{minor}: use 'torch'"
        )
    return f"sm_{min(major, 10)}0"
