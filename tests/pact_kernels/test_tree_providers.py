"""What computes the pieces of the flash backend: chosen by device, refused with a reason, and through stand-ins for the
GPU operators that have their signatures, shapes and roundings."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from test_tree_attention_flash import TREES, flash_tree_attention, turned, within_the_rule
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pact_kernels.tree_attention import flash, providers
from pact_kernels.tree_attention.flash import tree_flash


def test_empty_pieces_and_empty_sequences_on_the_cpu() -> None:
    lengths_q, lengths_k = np.array([0, 2, 3, 0]), np.array([2, 0, 4, 0])
    sequences = providers.Sequences.of(lengths_q, lengths_k, torch.device("cpu"))
    q, k = torch.randn(5, 4, 8), torch.randn(6, 2, 8)
    out, lse = providers.TORCH_CPU.forward(q, k, k, sequences, False, 1.0)
    assert torch.equal(out[:2], torch.zeros(2, 4, 8))
    assert torch.equal(lse[:, :2], torch.full((4, 2), -torch.inf))
    dq, dk, dv = providers.TORCH_CPU.backward(q, q, k, k, out, lse, sequences, False, 1.0)
    assert not dq[:2].any()
    assert not dk[:2].any()
    assert not dv[:2].any()
    assert all(x[2:].isfinite().all() and x[2:].any() for x in (out, lse.T, dq, dk, dv))

    nothing = providers.Sequences.of(lengths_q[:0], lengths_q[:0], torch.device("cpu"))
    out, lse = providers.TORCH_CPU.forward(q[:0], k[:0], k[:0], nothing, True, 1.0)
    assert out.shape == (0, 4, 8)
    assert lse.shape == (4, 0)
    for grad, x in zip(providers.TORCH_CPU.backward(q[:0], q[:0], k[:0], k[:0], out, lse, nothing, True, 1.0), (q, k)):
        assert grad.shape == x[:0].shape


def varlen_scores(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float) -> Tensor:
    """[Hq, N, M] float32, -inf between sequences: a dense stand-in for the kernels."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    position_q, position_k = torch.arange(q.shape[0]), torch.arange(k.shape[0])
    of_q, of_k = (torch.bucketize(p, c[1:], right=True) for p, c in ((position_q, cu_q), (position_k, cu_k)))
    seen = of_q[:, None] == of_k
    if causal:  # the kernels align the last query with the last key; here the lengths are equal
        seen &= position_k - cu_k[of_k] <= (position_q - cu_q[of_q])[:, None]
    score = scale * torch.einsum("qhd,khd->hqk", q.float(), k.float().repeat_interleave(q.shape[1] // k.shape[1], 1))
    return score.masked_fill(~seen, -torch.inf)


def readable(*tensors: Tensor) -> None:
    """What the kernels need and check only in part."""
    for x in tensors:
        assert x.dtype in providers.GPU_DTYPES
        assert x.stride(-1) == 1
        assert all(s % 8 == 0 for s in x.stride()[:-1])
        assert x.data_ptr() % 16 == 0


def varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale) -> tuple[Tensor, Tensor]:
    readable(q, k, v)
    assert max_q >= max(2, int(cu_q.diff().max()))
    assert max_k >= int(cu_k.diff().max())
    score = varlen_scores(q, k, cu_q, cu_k, causal, scale)
    v_MHD = v.float().repeat_interleave(q.shape[1] // v.shape[1], 1)
    out = torch.einsum("hqk,khd->qhd", score.softmax(-1), v_MHD)
    return torch.empty_like(q).copy_(out), score.logsumexp(-1)  # the kernels keep the strides of q


def varlen_backward(dout, q, k, v, out, lse, cu_q, cu_k, causal, scale) -> tuple[Tensor, Tensor, Tensor]:
    readable(dout, q, k, v, out)
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    assert lse.shape == (q.shape[1], q.shape[0])
    groups = q.shape[1] // k.shape[1]
    p = (varlen_scores(q, k, cu_q, cu_k, causal, scale) - lse[..., None]).exp()
    k_MHD, v_MHD = (x.float().repeat_interleave(groups, 1) for x in (k, v))
    delta_HN1 = (dout.float() * out.float()).sum(-1).T[..., None]
    ds = scale * p * (torch.einsum("qhd,khd->hqk", dout.float(), v_MHD) - delta_HN1)
    dk, dv = (torch.einsum("hqk,qhd->khd", w, x.float()) for w, x in ((ds, q), (p, dout)))
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    grads = (torch.einsum("hqk,khd->qhd", ds, k_MHD), dk, dv)
    return tuple(torch.empty_like(x).copy_(grad) for x, grad in zip((q, k, v), grads))


class Package:
    """flash-attn 2.8's functions: names, order and defaults of their arguments, and what they return."""

    def __init__(self) -> None:
        self.deterministic: list[bool] = []

    def _flash_attn_varlen_forward(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0.0
        out, lse = varlen_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale
        )
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_varlen_backward(
        self, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
        assert max_seqlen_q >= 2
        self.deterministic.append(deterministic)
        grads = varlen_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale)
        for room, grad in zip((dq, dk, dv), grads):
            readable(room)
            room.copy_(grad)
        return torch.empty(0)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cascade_over_the_flash_attn_package(tree: str, dtype: torch.dtype, monkeypatch) -> None:
    package = Package()
    monkeypatch.setattr(providers, "flash_attn_2", lambda: package)
    monkeypatch.setattr(flash, "provider_for", lambda q: providers.FLASH_ATTN)
    within_the_rule(TREES[tree], dtype=dtype, device="cpu")
    for turn in ((0, 1), (1, 2)):
        within_the_rule(TREES[tree], dtype=dtype, device="cpu", turn=turn)
    within_the_rule(TREES[tree], heads=8, kv_heads=1, dtype=dtype, device="cpu")
    assert package.deterministic
    assert not any(package.deterministic)  # the tests' fixture only warns
    torch.use_deterministic_algorithms(True)
    within_the_rule(TREES[tree], dtype=dtype, device="cpu")
    assert package.deterministic[-1]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cascade_over_the_operators_of_torch(tree: str, dtype: torch.dtype, monkeypatch) -> None:
    # The schemas are those of the installed torch: only the computation behind them is the stand-in's.
    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale):
        assert (dropout, debug) == (0.0, False)
        out, lse = varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale)
        return out, lse, torch.empty(2), torch.empty(0), torch.empty(0)

    def backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng_state, unused, *, scale):
        assert dropout == 0.0
        assert rng_state.dtype == torch.uint64
        return varlen_backward(dout, q, k, v, out, lse, cu_q, cu_k, causal, scale)

    monkeypatch.setattr(flash, "provider_for", lambda q: providers.TORCH)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        within_the_rule(TREES[tree], dtype=dtype, device="cpu")
        for turn in ((0, 1), (1, 2)):
            within_the_rule(TREES[tree], dtype=dtype, device="cpu", turn=turn)
        within_the_rule(TREES[tree], heads=8, kv_heads=1, dtype=dtype, device="cpu")


def test_gpu_providers_copy_what_the_kernels_cannot_read() -> None:
    x = torch.randn(6, 4, 16, dtype=torch.bfloat16)
    fused = torch.randn(6, 12, 16, dtype=torch.bfloat16)
    for view in (x, turned(x, 0, 1), fused[:, 4:8], x[2:]):
        assert providers._readable(view) is view
    odd = torch.randn(6 * 4 * 16 + 1, dtype=torch.bfloat16)[1:].view(6, 4, 16)
    for view in (turned(x, 1, 2), x[:1, :1, :1].expand(6, 4, 16), odd, x[..., 1:9]):
        copy = providers._readable(view)
        assert torch.equal(copy, view)
        readable(copy)
    padded = torch.randn(6, 4, 20, dtype=torch.bfloat16)[..., :16]  # rows 40 bytes apart
    readable(providers._readable(padded))


# --- which provider ---


def gpu_tensor(dtype=torch.bfloat16, dim=64, device="cuda") -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=torch.Size((5, 4, dim)))


@pytest.fixture
def modern_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(providers, "flash_attn_2", lambda: None)


def test_the_cpu_takes_every_dtype_it_computes_in() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert providers.provider_for(torch.zeros(1, 1, 3, dtype=dtype)) is providers.TORCH_CPU
    for dtype in (torch.int64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=r"takes float16, bfloat16, float32, float64, got .*: cast"):
            providers.provider_for(torch.zeros(1, 1, 3).to(dtype))


@pytest.mark.usefixtures("modern_gpu")
def test_a_gpu_takes_the_package_where_it_is_installed_and_torch_else(monkeypatch) -> None:
    for dtype in providers.GPU_DTYPES:
        assert providers.provider_for(gpu_tensor(dtype)) is providers.TORCH
    monkeypatch.setattr(providers, "flash_attn_2", lambda: Package())
    assert providers.provider_for(gpu_tensor(dim=256)) is providers.FLASH_ATTN
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert providers.provider_for(gpu_tensor(dim=8)) is providers.FLASH_ATTN
    monkeypatch.setattr(providers, "flash_attn_2", lambda: None)
    with pytest.raises(RuntimeError, match=r"built without flash attention: pip install 'flash-attn>=2.8'"):
        providers.provider_for(gpu_tensor())


@pytest.mark.usefixtures("modern_gpu")
def test_what_no_provider_takes_is_one_clear_error(monkeypatch) -> None:
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(TypeError, match=rf"takes float16, bfloat16, got {dtype}: cast .* backend='torch'"):
            providers.provider_for(gpu_tensor(dtype))
    for dim in (264, 20, 4):
        with pytest.raises(ValueError, match=f"to 256 in steps of 8, got {dim}: use backend='torch'"):
            providers.provider_for(gpu_tensor(dim=dim))
    for device in ("mps", "xpu", "meta"):
        with pytest.raises(RuntimeError, match=f"NVIDIA GPU or the CPU and got '{device}' tensors: use backend"):
            providers.provider_for(gpu_tensor(device=device))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match=r"compute capability 8.0, this GPU has 7.5: use backend='torch'"):
        providers.provider_for(gpu_tensor())
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(RuntimeError, match="got an AMD GPU: use backend='triton'"):
        providers.provider_for(gpu_tensor())


def test_the_operator_passes_the_error_on(monkeypatch) -> None:
    def refuse(q):
        raise RuntimeError("no provider here")

    monkeypatch.setattr(flash, "provider_for", refuse)
    q = torch.zeros(1, 1, 8)
    with pytest.raises(RuntimeError, match="no provider here"):
        flash_tree_attention(q, q, q, torch.ones(1, dtype=torch.int32), 1.0)


@pytest.fixture
def installed(monkeypatch):
    """Puts a flash-attn of a version into the module table; None: only the extension, which does not load."""

    def install(version: str | None) -> ModuleType:
        for name in ("flash_attn_2_cuda", "flash_attn", "flash_attn.flash_attn_interface"):
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            module.__version__ = version
            broken = version is None and name != "flash_attn_2_cuda"
            monkeypatch.setitem(sys.modules, name, None if broken else module)
        return module

    providers.flash_attn_2.cache_clear()
    yield install
    providers.flash_attn_2.cache_clear()


def test_flash_attn_is_found_and_a_broken_or_old_one_is_an_error(installed, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))  # that of flash-attn 4 alone is not it
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    assert providers.flash_attn_2() is None
    monkeypatch.undo()
    providers.flash_attn_2.cache_clear()
    with pytest.raises(RuntimeError, match=r"does not load .*: reinstall it"):
        installed(None) and providers.flash_attn_2()
    installed("2.7.4.post1")
    with pytest.raises(RuntimeError, match=r"installed as 2.7.4.post1, the flash backend needs 2.8: reinstall it"):
        providers.flash_attn_2()
    assert installed("2.8.3") is providers.flash_attn_2()


def test_fake_gpu_tensors_pass_the_operator_without_a_gpu() -> None:
    with FakeTensorMode():
        q, k = (torch.empty(10, h, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2))
        end = torch.empty(10, dtype=torch.int32, device="cuda")
        out, lse = tree_flash(q, k, k, end, 1.0)
        assert (out.shape, out.dtype, out.device) == (q.shape, torch.bfloat16, q.device)
        assert (lse.shape, lse.dtype, lse.device) == ((4, 10), torch.float32, q.device)
