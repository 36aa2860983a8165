"""The Triton backend of linear_logprob against the same rule as the torch one: in the interpreter without a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_linear_logprob import ALL_OPTIONS, Problem

from pact_kernels import linear_logprob
from pact_kernels.linear_logprob import ops

triton_logprob = partial(linear_logprob, backend="triton")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one tile of rows and splits of two tiles of columns, with ragged ends."""
    monkeypatch.setattr(ops, "BUDGET", ops.ChunkBudget(dlogits=1))
    monkeypatch.setattr(ops, "SPLIT_COLUMNS", 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"entropy": True}, {"softcap": 2.0}, ALL_OPTIONS], ids=str)
def test_error_rule(dtype: torch.dtype, options: dict) -> None:
    Problem.random(77, 43, 203, dtype=dtype, **options).check(triton_logprob)


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(n: int) -> None:
    Problem.random(n, 123, 70, entropy=True).check(triton_logprob)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize("shift", [0.0, -3000.0], ids=["", "far below zero"])
def test_error_rule_on_any_scale(spread: float, shift: float) -> None:
    Problem.random(40, 33, 203, spread=spread, shift=shift, entropy=True).check(triton_logprob)


@pytest.mark.parametrize("cap", [0.5, 50.0])
def test_softcap_near_and_far_from_its_linear_part(cap: float) -> None:
    Problem.random(40, 33, 203, spread=3.0, softcap=cap, entropy=True).check(triton_logprob)


def test_a_row_does_not_depend_on_how_many_come_with_it() -> None:
    problem = Problem.random(77, 43, 203)
    full = triton_logprob(problem.hidden, problem.weight, problem.target, entropy=True)
    for n in (1, 31, 33, 76):
        part = triton_logprob(problem.hidden[:n], problem.weight, problem.target[:n], entropy=True)
        assert torch.equal(part.logp, full.logp[:n]), n
        assert torch.equal(part.entropy, full.entropy[:n]), n


def test_rows_without_gradient_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, seen = Problem.random(77, 43, 203, entropy=True), []
    problem.c[10:], problem.e[5:] = 0.0, 0.0
    matmul = ops._matmul
    monkeypatch.setattr(ops, "_matmul", lambda left, right: seen.append(left.shape[0]) or matmul(left, right))
    problem.check(triton_logprob)
    assert sum(seen) == 10


def test_frozen_head_and_only_one_upstream_gradient() -> None:
    problem = Problem.random(20, 16, 50)
    hidden = problem.hidden.requires_grad_()
    out = triton_logprob(hidden, problem.weight, problem.target, entropy=True)
    wanted = linear_logprob(hidden, problem.weight, problem.target, entropy=True, backend="torch")
    for name in ("logp", "entropy"):
        (got,) = torch.autograd.grad(getattr(out, name).sum(), hidden, retain_graph=True)
        (exact,) = torch.autograd.grad(getattr(wanted, name).sum(), hidden, retain_graph=True)
        torch.testing.assert_close(got, exact, atol=1e-6, rtol=1e-5)


def test_strides_do_not_matter() -> None:
    problem = Problem.random(20, 16, 50)
    plain = triton_logprob(problem.hidden, problem.weight, problem.target).logp
    strided = torch.stack([problem.hidden, problem.hidden], dim=1)[:, 1]  # unit stride along H, twice the row
    assert torch.equal(triton_logprob(strided, problem.weight, problem.target).logp, plain)
    turned = problem.weight.T.contiguous().T  # no unit stride along H
    assert torch.equal(triton_logprob(problem.hidden, turned, problem.target).logp, plain)


def test_autocast_rounds_inside() -> None:
    problem = Problem.random(20, 16, 50, entropy=True)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = problem.run(triton_logprob), problem.run(linear_logprob)
    for name, value in mine.items():
        assert value.dtype == torch.float32
        tolerance = 1e-5 if name in ("logp", "entropy") else 1e-2  # dL/du is bfloat16 here, float32 there
        torch.testing.assert_close(value, theirs[name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("entropy", [False, True])
def test_operator_registration(entropy: bool) -> None:
    """Schema, fake implementation, autograd and what torch.compile needs of it."""
    problem = Problem.random(9, 16, 50, bias=True, temperature=True, r=4)
    operands = [value.requires_grad_() for value in (problem.hidden, problem.weight, problem.bias)]
    scale = problem.temperature.reciprocal()
    arguments = (*operands, problem.target, problem.rows, scale, 2.0, torch.float32, entropy)
    torch.library.opcheck(ops.head_forward, arguments)


def test_bad_input() -> None:
    problem = Problem.random(3, 4, 5)
    with pytest.raises(TypeError, match="use backend='torch' for float64"):
        triton_logprob(problem.hidden.double(), problem.weight.double(), problem.target)
    with pytest.raises(ValueError, match=r"target must lie in 0\.\.4"):
        triton_logprob(problem.hidden, problem.weight, problem.target + 5)


def test_tensors_on_the_cpu_are_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pact_kernels.backend.INTERPRETED", False)
    problem = Problem.random(3, 4, 5)
    with pytest.raises(
        RuntimeError, match="needs tensors on a GPU and got cpu: move them, use backend='torch', or set"
    ):
        triton_logprob(problem.hidden, problem.weight, problem.target)
