"""What computes one variable-length dense piece of tree attention: the flash-attn package, torch's flash operators on a
GPU, or torch's CPU operators. Picks one by the tensor's device and never falls back; knows nothing of trees."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_HEAD_DIM, HEAD_DIM_STEP = 256, 8
GPU_DTYPES = (torch.float16, torch.bfloat16)
CPU_DTYPES = (*GPU_DTYPES, torch.float32, torch.float64)

Rows = slice | Tensor  # of one dimension: a range, or int64 positions


def rows_of(begin: np.ndarray, end: np.ndarray, device: torch.device) -> Rows:
    """The ranges ``[begin[i], end[i])`` one behind the other: a slice where they join to one range."""
    size = end - begin
    if np.array_equal(begin[1:], end[:-1]):
        return slice(int(begin[0]), int(end[-1])) if size.size else slice(0, 0)
    rows = np.arange(size.sum()) + np.repeat(begin - (size.cumsum() - size), size)
    return torch.from_numpy(rows).to(device)


def take(x: Tensor, rows: Rows, dim: int = 0) -> Tensor:
    """A view where ``rows`` is a range."""
    if isinstance(rows, slice):
        return x.narrow(dim, rows.start, rows.stop - rows.start)
    return x.index_select(dim, rows)


def put(total: Tensor, rows: Rows, x: Tensor, dim: int = 0) -> None:
    """Overwrite ``rows`` of ``total``."""
    if isinstance(rows, slice):
        take(total, rows, dim).copy_(x)
    else:
        total.index_copy_(dim, rows, x)


def groups_of(key: np.ndarray) -> list[np.ndarray]:
    """The positions of each key, keys ascending."""
    order = key.argsort(kind="stable")
    return np.split(order, np.flatnonzero(np.diff(key[order])) + 1) if key.size else []


@dataclass(frozen=True)
class Sequences:
    """Sequences of one call, packed: the queries of the i-th, ``cu_q[i] : cu_q[i + 1]``, attend to its keys.

    Args:
        lengths_q, lengths_k: int64 [n], on the host.
        cu_q, cu_k: int32 [n + 1], their running sums on the device.
        max_q, max_k: the largest lengths.
    """

    lengths_q: np.ndarray
    lengths_k: np.ndarray
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(cls, lengths_q: np.ndarray, lengths_k: np.ndarray, device: torch.device) -> Sequences:
        cu_q, cu_k = (
            torch.from_numpy(np.append(0, lengths.cumsum()).astype(np.int32)).to(device)
            for lengths in (lengths_q, lengths_k)
        )
        max_q, max_k = (int(lengths.max(initial=0)) for lengths in (lengths_q, lengths_k))
        return cls(lengths_q, lengths_k, cu_q, cu_k, max_q, max_k)

    @functools.cached_property
    def batches(self) -> list[tuple[int, Rows, Rows]]:
        """(number of sequences, their queries, their keys) of each pair of lengths, but those with nothing to do."""
        device, found = self.cu_q.device, []
        end_q, end_k = self.lengths_q.cumsum(), self.lengths_k.cumsum()
        begin_q, begin_k = end_q - self.lengths_q, end_k - self.lengths_k
        for group in groups_of(self.lengths_q * (self.max_k + 1) + self.lengths_k):
            if self.lengths_q[group[0]] and self.lengths_k[group[0]]:
                queries = rows_of(begin_q[group], end_q[group], device)
                found.append((group.size, queries, rows_of(begin_k[group], end_k[group], device)))
        return found


@dataclass(frozen=True)
class Provider:
    """One way to compute a piece. A query with no key has output 0 and log-sum-exp -inf (on the CPU; on a GPU none is
    empty).

    Args:
        forward: (q [N, Hq, D], k and v [M, Hkv, D], sequences, causal, scale) -> (out [N, Hq, D], lse [Hq, N] in nats).
            Causal pieces have as many keys as queries.
        backward: (dout, q, k, v, out, lse, sequences, causal, scale) -> (dq, dk, dv) with P = exp(S - lse) and
            rowsum(dout out): ``out`` and ``lse`` may be those of more keys than the piece has.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def provider_for(q: Tensor) -> Provider:
    """What computes pieces of tensors like ``q`` [L, H, D].

    Raises:
        TypeError: a dtype that it does not take.
        ValueError: a head dimension that it does not take.
        RuntimeError: a device for which there is none, or a broken installation.
    """
    device, width, elsewhere = q.device, q.shape[-1], "use backend='triton' or backend='torch'"
    if device.type == "cpu":
        if q.dtype not in CPU_DTYPES:
            raise TypeError(f"the flash backend on a CPU takes {_names(CPU_DTYPES)}, got {q.dtype}: cast q, k and v")
        return TORCH_CPU
    if device.type != "cuda" or torch.version.hip:
        kind = "an AMD GPU" if device.type == "cuda" else f"{device.type!r} tensors"
        raise RuntimeError(f"the flash backend needs an NVIDIA GPU or the CPU and got {kind}: {elsewhere}")
    if q.dtype not in GPU_DTYPES:
        raise TypeError(
            f"the flash backend on a GPU takes {_names(GPU_DTYPES)}, got {q.dtype}: cast q, k and v, "
            "or use backend='torch'"
        )
    if width > MAX_HEAD_DIM or width % HEAD_DIM_STEP:
        raise ValueError(
            f"the flash backend on a GPU takes head dims to {MAX_HEAD_DIM} in steps of {HEAD_DIM_STEP}, got {width}: "
            "use backend='torch'"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(
            f"the flash backend needs compute capability 8.0, this GPU has {major}.{minor}: use backend='torch'"
        )
    if flash_attn_2() is not None:
        return FLASH_ATTN
    if not torch.backends.cuda.is_flash_attention_available():
        raise RuntimeError(
            f"this torch was built without flash attention: pip install 'flash-attn>=2.8', or {elsewhere}"
        )
    return TORCH


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


@functools.cache
def flash_attn_2() -> Any | None:
    """``flash_attn.flash_attn_interface`` of flash-attn 2, None where it is not installed.

    Raises RuntimeError where it is there but cannot be used.
    """
    if importlib.util.find_spec("flash_attn_2_cuda") is None:  # flash-attn 4 has a package of the name flash_attn too
        return None
    mend = "reinstall it for this torch (pip install --no-build-isolation 'flash-attn>=2.8'), or uninstall it"
    try:
        version = importlib.import_module("flash_attn").__version__
        interface = importlib.import_module("flash_attn.flash_attn_interface")
    except ImportError as error:
        raise RuntimeError(f"flash-attn is installed but does not load ({error}): {mend}") from error
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 8):
        raise RuntimeError(f"flash-attn is installed as {version}, the flash backend needs 2.8: {mend}")
    return interface


def _readable(x_NHD: Tensor) -> Tensor:
    """The kernels read 16 bytes at a time; they check the last stride and not the others."""
    strides = x_NHD.stride()
    if strides[-1] == 1 and not any(s * x_NHD.element_size() % 16 for s in strides[:-1]) and x_NHD.data_ptr() % 16 == 0:
        return x_NHD
    return x_NHD.clone(memory_format=torch.contiguous_format)


def _lengths(sequences: Sequences) -> tuple[Tensor, Tensor, int, int]:
    # At 1 query the kernels regroup heads and split keys, as for decoding; 2 is a bound too and keeps to one path.
    return sequences.cu_q, sequences.cu_k, max(2, sequences.max_q), sequences.max_k


def _deterministic() -> bool:
    """Asked for in earnest: the package's deterministic backward takes a copy of dQ for each few processors."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _package_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    interface: Any = flash_attn_2()
    qkv = (_readable(x) for x in (q, k, v))
    out, lse, *_ = interface._flash_attn_varlen_forward(
        *qkv, *_lengths(sequences), dropout_p=0.0, softmax_scale=scale, causal=causal
    )
    return out, lse


def _package_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    interface: Any = flash_attn_2()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    interface._flash_attn_varlen_backward(
        *(_readable(x) for x in (dout, q, k, v, out)), lse.contiguous(), dq, dk, dv, *_lengths(sequences),
        dropout_p=0.0, softmax_scale=scale, causal=causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
        alibi_slopes=None, deterministic=_deterministic(),
    )  # fmt: skip
    return dq, dk, dv


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    qkv = (_readable(x) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._flash_attention_forward(*qkv, *_lengths(sequences), 0.0, causal, False, scale=scale)
    return out, lse


def _torch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        *(_readable(x) for x in (dout, q, k, v, out)), lse.contiguous(), *_lengths(sequences), 0.0, causal, *no_dropout,
        scale=scale,
    )  # fmt: skip


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Sequences of equal lengths as one batch, in at least float32."""
    work = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(q.shape, dtype=work)
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=work)
    for n, queries, keys in sequences.batches:
        qkv = (_batch(x, rows, n, work) for x, rows in ((q, queries), (k, keys), (v, keys)))
        out_THBD, lse_THB = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*qkv, 0.0, causal, scale=scale)
        put(out, queries, out_THBD.transpose(1, 2).flatten(0, 1))
        put(lse, queries, lse_THB.transpose(0, 1).flatten(1), dim=1)
    return out, lse


def _cpu_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``_cpu_forward``; the gradients stay in at least float32."""
    dq, dk, dv = (x.new_zeros(x.shape, dtype=lse.dtype) for x in (q, k, v))
    for n, queries, keys in sequences.batches:
        operands = ((dout, queries), (q, queries), (k, keys), (v, keys), (out, queries))
        lse_THB = take(lse, queries, dim=1).unflatten(1, (n, -1)).transpose(0, 1)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_batch(x, rows, n, lse.dtype) for x, rows in operands), lse_THB, 0.0, causal, scale=scale
        )
        for total, rows, grad_THBD in zip((dq, dk, dv), (queries, keys, keys), grads):
            put(total, rows, grad_THBD.transpose(1, 2).flatten(0, 1))
    return dq, dk, dv


def _batch(x_NHD: Tensor, rows: Rows, n: int, work: torch.dtype) -> Tensor:
    """[T, H, B, D]: ``n`` sequences of one length. The operators read wrong memory where the last stride is not 1."""
    rows_NHD = take(x_NHD, rows).to(work)
    rows_NHD = rows_NHD if rows_NHD.stride(-1) == 1 else rows_NHD.contiguous()
    return rows_NHD.unflatten(0, (n, -1)).transpose(1, 2)


TORCH_CPU = Provider("torch_cpu", _cpu_forward, _cpu_backward)
TORCH = Provider("torch", _torch_forward, _torch_backward)
FLASH_ATTN = Provider("flash_attn", _package_forward, _package_backward)
