"""The head kernels at sizes that only a GPU can take. Needs torch, triton and pytest: `make gpu`."""

from __future__ import annotations

import pytest
import torch

from pact_kernels import TokenTerms, linear_cotrain_loss, linear_logprob
from pact_kernels.terms import RL

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def operands(n: int, width: int, vocab: int):
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(n, width, generator=g, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocab, width, generator=g, device="cuda") / width**0.5).bfloat16().requires_grad_()
    return hidden, weight, torch.randint(vocab, (n,), generator=g, device="cuda")


def terms_of(target: torch.Tensor) -> TokenTerms:
    n = target.numel()
    g = torch.Generator("cuda").manual_seed(1)
    advantage = torch.randn(n, generator=g, device="cuda")
    return TokenTerms(target, None, advantage, torch.full_like(advantage, 1 / n), torch.full_like(target, RL))


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def test_more_than_2_to_the_31_logits():
    """Against the torch backend, which widens to float32: gradients differ by the rounding of dL/du to bf16."""
    hidden, weight, target = operands(8300, 64, 262_144)
    terms = terms_of(target)
    results = {}
    for backend in ("triton", "torch"):
        result = linear_cotrain_loss(hidden, weight, terms, entropy=True, entropy_coef=0.01, backend=backend)
        out = linear_logprob(hidden, weight, target, backend=backend).logp
        fused = torch.autograd.grad(result.loss, (hidden, weight))
        composed = torch.autograd.grad((out * terms.advantage).mean(), (hidden, weight))
        results[backend] = (out.detach(), result.loss.detach()[None], *fused, *composed)
    for i, (mine, wanted) in enumerate(zip(results["triton"], results["torch"], strict=True)):
        assert relative(mine, wanted) < (1e-6 if i == 0 else 1e-2), i


def test_offsets_beyond_32_bits():
    """Rows of hidden and of the weight more than 2^31 elements from the first; those of a tile are within 32 bits."""
    far, near = 2**30 + 64, 2**31 // 128 - 64
    hidden = torch.zeros(3 * far + 64, dtype=torch.bfloat16, device="cuda").as_strided((4, 64), (far, 1))
    weight = torch.zeros(299 * near + 64, dtype=torch.bfloat16, device="cuda").as_strided((300, 64), (near, 1))
    hidden.copy_(torch.randn(4, 64))
    weight.copy_(torch.randn(300, 64))
    target = torch.arange(0, 300, 80, device="cuda")
    wanted = linear_logprob(hidden.contiguous(), weight.contiguous(), target, backend="triton").logp
    assert torch.equal(linear_logprob(hidden, weight, target, backend="triton").logp, wanted)


@pytest.mark.parametrize("entropy", [False, True])
def test_log_probs_are_bitwise_those_of_any_batch_in_any_order(entropy):
    """A ratio between any two passes is exactly 1: forward alone, fused, alone in the batch, elsewhere in it."""
    hidden, weight, target = operands(1000, 256, 32_000)
    full = linear_logprob(hidden, weight, target, entropy=entropy, backend="triton")
    order = torch.randperm(1000, device="cuda")
    moved = linear_logprob(hidden[order], weight, target[order], entropy=entropy, backend="triton")
    assert torch.equal(moved.logp, full.logp[order])
    for n in (1, 63, 129, 999):
        part = linear_logprob(hidden[:n], weight, target[:n], entropy=entropy, backend="triton")
        assert torch.equal(part.logp, full.logp[:n]), n
    on_policy = terms_of(target)
    on_policy = TokenTerms(target, full.logp.detach(), on_policy.advantage, on_policy.weight, on_policy.kind)
    metrics = linear_cotrain_loss(hidden, weight, on_policy, entropy=entropy, backend="triton").metrics
    assert torch.equal(metrics["ratio"], metrics["tokens"])


def test_two_runs_are_bitwise_equal():
    """No atomics, and no line of a chunk is read after it was overwritten."""
    hidden, weight, target = operands(3000, 512, 32_000)
    terms = terms_of(target)
    old = linear_logprob(hidden, weight, target).logp.detach() + 0.3 * torch.randn(3000, device="cuda")
    terms = TokenTerms(target, old, terms.advantage, terms.weight, terms.kind)  # a third of the rows clipped
    runs = [
        torch.autograd.grad(linear_cotrain_loss(hidden, weight, terms, backend="triton").loss, (hidden, weight))
        for _ in range(5)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    wanted = torch.autograd.grad(linear_cotrain_loss(hidden, weight, terms, backend="torch").loss, (hidden, weight))
    assert all(relative(a, b) < 1e-2 for a, b in zip(runs[0], wanted, strict=True))


def test_memory_beyond_the_gradients():
    """Under 1.5 GB at N = 8192, V = 151,936, beyond the gradients and one float32 dWeight."""
    hidden, weight, target = operands(8192, 2560, 151_936)
    terms = terms_of(target)
    linear_cotrain_loss(hidden[:256], weight, terms_of(target[:256]), backend="triton").loss.backward()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cotrain_loss(hidden, weight, terms, backend="triton").loss.backward()
    gradients = sum(x.numel() * x.itemsize for x in (hidden, weight)) + weight.numel() * 4
    assert torch.cuda.max_memory_allocated() - before - gradients < 1.5e9
