"""The Triton backend of cotrain_loss and linear_cotrain_loss by the error rule: in the interpreter without a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from oracles import DEVICE, assert_within
from test_cotrain_loss import COEFFICIENTS, EPS, FULL, HEADS, make_head, make_terms, run_composed, run_op, to_double
from test_linear_logprob import Scale
from torch import Tensor

from pact_kernels import cotrain_loss, linear_cotrain_loss, linear_logprob
from pact_kernels.cotrain_loss import ops
from pact_kernels.cotrain_loss.reference import cotrain_loss_reference
from pact_kernels.linear_logprob import launch
from pact_kernels.linear_logprob.reference import linear_logprob_reference
from pact_kernels.terms import RL, SFT, TokenTerms

triton_loss = partial(cotrain_loss, backend="triton")
triton_fused = partial(linear_cotrain_loss, backend="triton")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one tile of rows (of two in the interpreter) and splits of a few tiles of columns."""
    monkeypatch.setattr(launch, "BUDGET", launch.ChunkBudget(dlogits=2 * 32 * 301 * 4))
    monkeypatch.setattr(launch, "SPLIT_COLUMNS", 128)


def head_and_terms(n: int, dtype: torch.dtype, shape: dict) -> tuple[dict, Tensor, TokenTerms]:
    """Operands, targets and terms around their exact log-probs, on the device."""
    head, target = make_head(n, dtype, shape)
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in head.items()}
    arguments = {k: v for k, v in wide.items() if k not in ("hidden", "weight")}
    logp = linear_logprob_reference(wide["hidden"], wide["weight"], target, **arguments).logp
    head = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in head.items()}
    return head, target.to(DEVICE), make_terms(logp.float(), target).to(DEVICE)


def check_fused(head: dict, target: Tensor, terms: TokenTerms, options: dict, scale: Scale | None = None) -> None:
    """The error rule on the loss, every metric and every gradient; ``scale`` as in ``Problem.check``."""
    dtype = head["hidden"].dtype
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in head.items()}
    got, gradients = run_op(lambda kw: triton_fused(terms=terms, entropy=True, **kw, **options), head, dtype)
    plain, plain_gradients = run_composed(head, target, terms, dtype, True, **options)
    exact, exact_gradients = run_composed(wide, target, to_double(terms), torch.float64, True, **options)
    rounding = 4 * EPS * (scale.logit if scale else 1.0)
    assert_within("loss", got.loss, plain.loss, exact.loss.detach(), rounding)
    for name, value in got.metrics.items():
        expected = exact.metrics[name]
        if scale:  # each row of a sum may be off
            rounding = 4 * EPS * scale.logit * max(1, len(terms))
        assert_within(name, value, plain.metrics[name], expected, rounding * max(1.0, expected.abs().max().item()))
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        expected = exact_gradients[name]
        rounding = torch.finfo(dtype).eps * expected.abs().max().item()
        if scale:
            rounding = scale.rounding(f"d{name}", dtype)
        assert_within(f"d{name}", gradient, plain_gradients[name], expected, rounding)


@pytest.mark.parametrize("options", COEFFICIENTS, ids=str)
@pytest.mark.parametrize("n", [1, 300])
def test_loss_error_rule(n: int, options: dict) -> None:
    g = torch.Generator().manual_seed(n)
    logp = -5 * torch.rand(n, generator=g)
    terms, entropy = make_terms(logp).to(DEVICE), torch.rand(n, generator=g).to(DEVICE)
    results = {}
    for name, op, dtype in (
        ("got", triton_loss, torch.float32),
        ("plain", cotrain_loss_reference, torch.float32),
        ("exact", cotrain_loss_reference, torch.float64),
    ):
        leaves = [value.to(DEVICE, dtype).requires_grad_() for value in (logp, entropy)]
        result = op(leaves[0], to_double(terms) if name == "exact" else terms, entropy=leaves[1], **options)
        gradients = torch.autograd.grad(3 * result.loss, leaves, allow_unused=True, materialize_grads=True)
        results[name] = {"loss": result.loss.detach(), **result.metrics, "c": gradients[0], "e": gradients[1]}
    for name, value in results["got"].items():
        exact = results["exact"][name]
        rounding = 4 * EPS * (1.0 if name in ("c", "e") else max(1.0, exact.abs().max().item()))
        assert_within(name, value, results["plain"][name], exact, rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", COEFFICIENTS, ids=str)
def test_fused_error_rule(dtype: torch.dtype, options: dict) -> None:
    check_fused(*head_and_terms(150, dtype, HEADS[1]), options)


@pytest.mark.parametrize("shape", HEADS, ids=str)
@pytest.mark.parametrize("n", [1, 77])
def test_fused_error_rule_on_every_head(n: int, shape: dict) -> None:
    check_fused(*head_and_terms(n, torch.bfloat16, shape), FULL)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.02])
def test_fused_error_rule_on_peaked_rows(entropy_coef: float) -> None:
    """Rows whose target has nearly all the probability: rounding the kept exponentials must not cancel in 1 - p."""
    head, target, _ = head_and_terms(60, torch.bfloat16, {})
    head["weight"] = head["weight"] * 30
    target = (head["hidden"] @ head["weight"].T).argmax(1)
    logp = linear_logprob_reference(head["hidden"].double(), head["weight"].double(), target).logp
    terms = make_terms(logp.float().cpu(), target.cpu()).to(DEVICE)
    check_fused(head, target, terms, {"entropy_coef": entropy_coef})


def test_log_probs_are_those_of_linear_logprob_bit_by_bit() -> None:
    """So that a ratio to old values from there is exactly 1. (Every row has a gradient here: others are scored first,
    and numpy's matmul, which the interpreter uses, rounds by a row's place in the tile. A GPU's does not.)"""
    head, target, terms = head_and_terms(77, torch.bfloat16, HEADS[0])
    old = linear_logprob(head["hidden"], head["weight"], target, backend="triton").logp
    every = torch.ones_like(terms.weight) / 77
    rl = replace(terms, old_logp=old, kind=torch.zeros_like(terms.kind), advantage=every, weight=every)
    result = triton_fused(head["hidden"].requires_grad_(), head["weight"].requires_grad_(), rl)
    assert torch.equal(result.metrics["ratio"], result.metrics["tokens"])


def test_rows_without_gradient_are_dropped_before_the_matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero weight and zero advantage before the forward keeps anything, clipped rows after it: lines close ranks."""
    head, target, terms = head_and_terms(150, torch.float32, {})
    seen: list[int] = []
    matmul = launch.matmul
    monkeypatch.setattr(launch, "matmul", lambda left, right: seen.append(left.shape[0]) or matmul(left, right))
    hidden = head["hidden"].requires_grad_()
    triton_fused(hidden, head["weight"], terms)
    logp = linear_logprob(hidden, head["weight"], target, backend="triton").logp.detach().requires_grad_()
    (c,) = torch.autograd.grad(cotrain_loss(logp, terms).loss, logp)
    n_live, n_clipped = int((c != 0).sum()), int(cotrain_loss(logp, terms).metrics["clipped"].sum())
    assert sum(seen) == n_live
    assert n_clipped > 10
    assert 20 < n_live < 130


def test_all_rows_clipped_or_without_weight() -> None:
    head, _, terms = head_and_terms(40, torch.float32, {})
    hidden, weight = head["hidden"].requires_grad_(), head["weight"].requires_grad_()
    kind = torch.full_like(terms.kind, RL)
    clipped = replace(terms, kind=kind, old_logp=terms.old_logp - 9, advantage=terms.advantage.abs())
    for dead in (clipped, replace(terms, weight=torch.zeros_like(terms.weight))):
        gradients = torch.autograd.grad(triton_fused(hidden, weight, dead).loss, (hidden, weight))
        assert all(bool((gradient == 0).all()) for gradient in gradients)


def test_zero_weight_selects_away_what_is_not_finite() -> None:
    head, _, terms = head_and_terms(40, torch.float32, {})
    weight = terms.weight.clone()
    weight[::2] = 0.0
    clean = replace(terms, weight=weight)
    dirty = replace(clean, old_logp=clean.old_logp.clone(), advantage=clean.advantage.clone())
    dirty.old_logp[::2], dirty.advantage[::2] = -torch.inf, torch.nan
    leaves = (head["hidden"].requires_grad_(), head["weight"].requires_grad_())
    results = [triton_fused(*leaves, each) for each in (clean, dirty)]
    assert torch.equal(results[0].loss, results[1].loss)
    for a, b in zip(*(torch.autograd.grad(result.loss, leaves) for result in results)):
        assert torch.equal(a, b)


def test_no_rows_and_no_gradient() -> None:
    head, _, _ = head_and_terms(4, torch.float32, {})
    none = torch.zeros(0, dtype=torch.int64)
    weight = head["weight"].requires_grad_()
    result = triton_fused(
        head["hidden"], weight, make_terms(torch.zeros(0), none).to(DEVICE), rows=none.to(DEVICE), **FULL
    )
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert bool((weight.grad == 0).all())
    with torch.no_grad():
        _, _, terms = head_and_terms(4, torch.float32, {})
        assert not triton_fused(head["hidden"], weight, terms).loss.requires_grad


def test_fused_backward_twice_scales_each_time() -> None:
    head, _, terms = head_and_terms(20, torch.bfloat16, {})
    hidden = head["hidden"].requires_grad_()
    loss = triton_fused(hidden, head["weight"], terms).loss
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(4 * loss, hidden)[0], 4 * first)


def test_operator_registration() -> None:
    head, target, terms = head_and_terms(20, torch.float32, HEADS[-1])
    hidden, weight, bias = (head[name].requires_grad_() for name in ("hidden", "weight", "bias"))
    columns = (terms.old_logp, terms.advantage, terms.weight, terms.kind, terms.component, terms.branch, terms.ref_logp)
    coefficients = [0.2, 0.2, 0.01, 0.01, 1.5]
    logp = torch.full((20,), -3.0, device=DEVICE).requires_grad_()
    entropy = torch.full((20,), 2.0, device=DEVICE).requires_grad_()
    torch.library.opcheck(ops.cotrain_loss_op, (logp, entropy, *columns, coefficients))
    arguments = (hidden, weight, bias, target, head["rows"], None, 0.0, torch.float32, True, *columns, coefficients)
    torch.library.opcheck(ops.linear_cotrain_loss_op, (*arguments, [True, True, True]))
    torch.library.opcheck(
        ops.linear_cotrain_loss_op, (hidden.detach(), weight, bias.detach(), *arguments[3:], [False, True, False])
    )


@pytest.mark.parametrize("fused", [True, False])
def test_compiled_callers_have_no_graph_break(fused: bool) -> None:
    head, target, terms = head_and_terms(20, torch.float32, {})
    hidden, weight = head["hidden"].requires_grad_(), head["weight"].requires_grad_()

    def loss(hidden, weight, old_logp, advantage, row_weight, kind):
        terms = TokenTerms(target, old_logp, advantage, row_weight, kind)
        if fused:
            result = triton_fused(hidden.tanh(), weight, terms, entropy_coef=0.1)
        else:
            out = linear_logprob(hidden.tanh(), weight, target, entropy=True, backend="triton")
            result = triton_loss(out.logp, terms, entropy=out.entropy, entropy_coef=0.1)
        return 2 * result.loss, result.metrics["logp"]

    arguments = (hidden, weight, terms.old_logp, terms.advantage, terms.weight, terms.kind)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (mine, metric), (theirs, expected) = compiled(*arguments), loss(*arguments)
    assert torch.equal(metric, expected)
    for a, b in zip(torch.autograd.grad(mine, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight))):
        torch.testing.assert_close(a, b)


def test_agrees_with_the_grpo_loss_of_trl() -> None:
    """The loss as TRL's GRPOTrainer writes it down (token-level normaliser): an independent formula, from its docs.

    ``-min(r A, clip(r) A) + beta k3`` with ``r = exp(logp - old)``, ``k3 = exp(ref - logp) - (ref - logp) - 1``.
    """
    g = torch.Generator().manual_seed(3)
    logp, old, ref = (-3 * torch.rand(4, 25, generator=g) for _ in range(3))
    advantages, mask = torch.randn(4, generator=g), torch.rand(4, 25, generator=g) > 0.3
    logp = logp.requires_grad_()
    ratio = torch.exp(logp - old)
    coef_1, coef_2 = ratio, torch.clamp(ratio, 1 - 0.2, 1 + 0.28)
    per_token = -torch.min(coef_1 * advantages[:, None], coef_2 * advantages[:, None])
    per_token = per_token + 0.04 * (torch.exp(ref - logp) - (ref - logp) - 1)
    expected = (per_token * mask).sum() / mask.sum()
    (gradient,) = torch.autograd.grad(expected, logp)
    flat = logp.detach().flatten().to(DEVICE).requires_grad_()
    terms = TokenTerms(
        target=torch.zeros(100, dtype=torch.int64),
        old_logp=old.flatten(),
        advantage=advantages[:, None].expand(4, 25).flatten(),
        weight=mask.flatten() / mask.sum(),
        kind=torch.full((100,), RL),
        ref_logp=ref.flatten(),
    ).to(DEVICE)
    result = triton_loss(flat, terms, clip_low=0.2, clip_high=0.28, kl_coef=0.04)
    torch.testing.assert_close(result.loss.cpu(), expected.detach(), atol=1e-6, rtol=1e-5)
    (mine,) = torch.autograd.grad(result.loss, flat)
    torch.testing.assert_close(mine.cpu().view(4, 25), gradient, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.02])
@pytest.mark.parametrize("level", [0.0, -120.0, -1000.0])
def test_columns_of_minus_infinity_are_never_chosen(level: float, entropy_coef: float) -> None:
    """Whole tiles of them at the beginning of a split, with the other logits far below zero."""
    head, target, terms = head_and_terms(60, torch.float32, HEADS[2] | {"softcap": None})
    banned = torch.zeros(301, dtype=torch.bool, device=DEVICE)
    banned[:64] = banned[128:200] = True
    head["bias"] = torch.where(banned, -torch.inf, head["bias"] + level)
    allowed = (~banned).nonzero()[:, 0]
    target = allowed[target % len(allowed)]
    small = head | {name: head[name][allowed] for name in ("weight", "bias")}
    of_small = torch.searchsorted(allowed, target)
    wide = {name: small[name].double() for name in ("hidden", "weight", "bias")}
    logp = linear_logprob_reference(wide["hidden"], wide["weight"], of_small, bias=wide["bias"]).logp
    terms = make_terms(logp.float().cpu(), target.cpu()).to(DEVICE)
    run = partial(triton_fused, entropy=True, entropy_coef=entropy_coef)
    mine, gradients = run_op(lambda kw: run(terms=terms, **kw), head, torch.float32)
    exact, expected = run_composed(
        wide | {"rows": None}, of_small, to_double(terms), torch.float64, True, entropy_coef=entropy_coef
    )
    torch.testing.assert_close(mine.loss.double(), exact.loss, atol=1e-4, rtol=1e-4)
    for name, gradient in gradients.items():
        gradient = gradient if name == "hidden" else gradient[allowed]
        torch.testing.assert_close(gradient.double(), expected[name], atol=1e-5, rtol=2e-3, msg=name)


def test_kl_gradient_far_from_the_reference() -> None:
    """``kl_coef (1 - e^d)`` tends to kl_coef as the reference's log-prob goes to -infinity."""
    logp = torch.full((3,), -2.0, device=DEVICE).requires_grad_()
    ref = torch.tensor([-torch.inf, -1e8, -32.0], device=DEVICE)
    zero, one = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    terms = TokenTerms(zero.long(), None, zero, one, zero.long(), ref_logp=ref)
    (gradient,) = torch.autograd.grad(triton_loss(logp, terms, kl_coef=0.5).loss, logp)
    torch.testing.assert_close(gradient.cpu(), torch.full((3,), 0.5))


def test_second_derivatives_are_refused() -> None:
    head, _, terms = head_and_terms(5, torch.float32, {})
    hidden = head["hidden"].requires_grad_()
    logp = torch.full((5,), -3.0, device=DEVICE).requires_grad_()
    for leaf, loss in (
        (logp, triton_loss(logp, terms).loss),
        (hidden, triton_fused(hidden, head["weight"], terms).loss),
    ):
        (gradient,) = torch.autograd.grad(loss**2, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("target", 301, r"target must lie in 0\.\.300 \(the vocabulary\), and some are not"),
        ("rows", -1, r"rows must lie in 0\.\.39 \(the rows of hidden\)"),
        ("temperature", 0.0, "temperature must be positive and finite in every row"),
    ],
)
def test_values_out_of_range_are_raised_by_the_call(
    name: str, value: float, message: str, grad: bool, dtype: torch.dtype
) -> None:
    """Before the loss or a metric can be read, and before a gradient is formed from them."""
    head, target, terms = head_and_terms(77, dtype, HEADS[-1])
    terms = replace(terms, target=target)
    (target if name == "target" else head[name])[5] = value
    head["weight"].requires_grad_(grad)
    with pytest.raises(ValueError, match=message):
        triton_fused(terms=terms, **head)


def test_bad_input() -> None:
    _, _, terms = head_and_terms(4, torch.float32, {})
    with pytest.raises(TypeError, match="use backend='torch' for float64 log-probs"):
        triton_loss(torch.zeros(4, dtype=torch.float64, device=DEVICE), terms)
    with pytest.raises(ValueError, match="entropy_coef is not 0 but no entropy was given"):
        triton_loss(torch.zeros(4, device=DEVICE), terms, entropy_coef=0.1)


def test_kinds_are_told_apart() -> None:
    """An SFT row is -logp whatever its RL columns hold."""
    logp = torch.tensor([-1.0, -2.0], device=DEVICE)
    nan = torch.full((2,), torch.nan, device=DEVICE)
    one = torch.ones(2, device=DEVICE)
    terms = TokenTerms(
        torch.zeros(2, dtype=torch.int64, device=DEVICE),
        nan,
        nan,
        one,
        torch.full((2,), SFT, device=DEVICE),
        ref_logp=nan,
    )
    assert triton_loss(logp, terms, kl_coef=0.1).loss.item() == 3.0
