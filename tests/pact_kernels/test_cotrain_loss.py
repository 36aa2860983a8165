from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from oracles import assert_within
from torch import Tensor

from pact_kernels import cotrain_loss, linear_cotrain_loss, linear_logprob
from pact_kernels.cotrain_loss.reference import cotrain_loss_reference
from pact_kernels.linear_logprob import chunked
from pact_kernels.linear_logprob.chunked import ChunkBudget
from pact_kernels.linear_logprob.reference import linear_logprob_reference
from pact_kernels.terms import PROMPT_BRANCH, RL, SFT, TRACE_BRANCH, TokenTerms

EPS = torch.finfo(torch.float32).eps
FULL = {"clip_low": 0.15, "clip_high": 0.3, "kl_coef": 0.05, "entropy_coef": 0.02, "clip_dual": 1.5}
COEFFICIENTS = [{}, {"clip_dual": 1.5}, {"kl_coef": 0.05}, {"entropy_coef": 0.02}, FULL]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one ragged."""
    monkeypatch.setattr(chunked, "BUDGET", ChunkBudget(logits=1, rows=100, widened=2**16))


def make_terms(logp: Tensor, target: Tensor | None = None, seed: int = 0) -> TokenTerms:
    """Random terms around ``logp``: a third of zero weight, no ratio within 1e-4 of a clip edge."""
    g = torch.Generator().manual_seed(seed)
    n, dtype = logp.numel(), logp.dtype
    log_ratio = 0.4 * torch.randn(n, generator=g, dtype=dtype)
    for edge in (0.7, 0.8, 0.85, 1.2, 1.3, 1.5):
        log_ratio[(log_ratio.exp() - edge).abs() < 1e-3] = 0.0
    return TokenTerms(
        target=torch.zeros(n, dtype=torch.int32) if target is None else target,
        old_logp=logp.detach() - log_ratio,
        advantage=torch.randn(n, generator=g, dtype=dtype) * (torch.rand(n, generator=g) > 0.2),
        weight=torch.rand(n, generator=g, dtype=dtype) * (torch.rand(n, generator=g) > 0.3) / max(n, 1),
        kind=torch.randint(0, 2, (n,), generator=g, dtype=torch.uint8),
        component=torch.randint(0, 5, (n,), generator=g, dtype=torch.int8),
        ref_logp=logp.detach() + 0.3 * torch.randn(n, generator=g, dtype=dtype),
        branch=torch.randint(0, 2, (n,), generator=g, dtype=torch.int16),
    )


def to_double(terms: TokenTerms) -> TokenTerms:
    names = ("old_logp", "advantage", "weight", "ref_logp")
    return replace(terms, **{name: getattr(terms, name).double() for name in names})


def one_row(kind: int, logp: float, **values: float) -> tuple[Tensor, TokenTerms]:
    """A single float64 row, everything else 0 unless given."""

    def column(name: str, default: float = 0.0) -> Tensor:
        return torch.tensor([values.get(name, default)], dtype=torch.float64)

    terms = TokenTerms(
        torch.zeros(1, dtype=torch.int64),
        column("old_logp"),
        column("advantage"),
        column("weight", 1.0),
        torch.tensor([kind]),
        ref_logp=column("ref_logp") if "ref_logp" in values else None,
    )
    return torch.tensor([logp], dtype=torch.float64, requires_grad=True), terms


@pytest.mark.parametrize("options", COEFFICIENTS, ids=str)
def test_reference_gradients(options: dict) -> None:
    logp = (-3 * torch.rand(8, dtype=torch.float64)).requires_grad_()
    entropy = torch.rand(8, dtype=torch.float64).requires_grad_()
    terms = make_terms(logp)
    for op in (cotrain_loss_reference, cotrain_loss):
        assert torch.autograd.gradcheck(lambda lp, h, op=op: op(lp, terms, entropy=h, **options).loss, (logp, entropy))


@pytest.mark.parametrize("n", [0, 1, 507])
@pytest.mark.parametrize("options", COEFFICIENTS, ids=str)
def test_error_rule(n: int, options: dict) -> None:
    g = torch.Generator().manual_seed(n)
    logp = -3 * torch.rand(n, generator=g)
    entropy = 2 * torch.rand(n, generator=g)
    terms = make_terms(logp)

    def run(op, dtype: torch.dtype, terms: TokenTerms):
        leaves = logp.to(dtype).requires_grad_(), entropy.to(dtype).requires_grad_()
        result = op(leaves[0], terms, entropy=leaves[1], **options)
        gradients = torch.autograd.grad(3 * result.loss, leaves, allow_unused=True)
        return result, [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, leaves)]

    got, got_gradients = run(cotrain_loss, torch.float32, terms)
    plain, plain_gradients = run(cotrain_loss_reference, torch.float32, terms)
    exact, exact_gradients = run(cotrain_loss_reference, torch.float64, to_double(terms))
    assert got.loss.dtype == torch.float32
    assert_within("loss", got.loss, plain.loss, exact.loss.detach(), 4 * EPS)
    for name, values in zip(("dlogp", "dentropy"), zip(got_gradients, plain_gradients, exact_gradients)):
        assert_within(name, *values, rounding=4 * EPS)
    assert set(got.metrics) == set(exact.metrics)
    for name, value in got.metrics.items():
        assert not value.requires_grad
        assert_within(name, value, plain.metrics[name], exact.metrics[name], 4 * EPS * max(n, 1))


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [
        (-2.0, 5.0, 10.0, 10.0),  # bad and far up: passes without a dual clip
        (2.0, 1.1, -2.2, -2.2),  # within the clip
        (2.0, 1.3, -2.4, 0.0),  # good and already far up: held at 1.2
        (2.0, 0.5, -1.0, -1.0),  # good but fallen: passes
        (-2.0, 0.5, 1.6, 0.0),  # bad and already far down: held at 0.8
        (-2.0, 1.5, 3.0, 3.0),  # bad but risen: passes
        (0.0, 1.5, 0.0, 0.0),
    ],
)
def test_clip(advantage: float, ratio: float, loss: float, slope: float) -> None:
    logp, terms = one_row(RL, math.log(ratio), advantage=advantage)
    for op in (cotrain_loss, cotrain_loss_reference):
        result = op(logp, terms)
        assert result.loss.item() == pytest.approx(loss)
        assert torch.autograd.grad(result.loss, logp)[0].item() == pytest.approx(slope)
        assert result.metrics["clipped"].sum() == (slope == 0.0 and advantage != 0.0)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [
        (-2.0, 5.0, 6.0, 0.0),  # bad and far up: held at 3
        (-2.0, 2.9, 5.8, 5.8),
        (-2.0, 0.5, 1.6, 0.0),  # the other edges stay
        (2.0, 5.0, -2.4, 0.0),
        (2.0, 1.1, -2.2, -2.2),
        (0.0, 5.0, 0.0, 0.0),
    ],
)
def test_dual_clip(advantage: float, ratio: float, loss: float, slope: float) -> None:
    logp, terms = one_row(RL, math.log(ratio), advantage=advantage)
    for op in (cotrain_loss, cotrain_loss_reference):
        result = op(logp, terms, clip_dual=3.0)
        assert result.loss.item() == pytest.approx(loss)
        assert torch.autograd.grad(result.loss, logp)[0].item() == pytest.approx(slope)
        assert result.metrics["clipped"].sum() == (slope == 0.0 and advantage != 0.0)


def test_kl_and_sft_by_hand() -> None:
    logp, terms = one_row(RL, -1.0, old_logp=-1.0, ref_logp=-0.5, weight=2.0)
    result = cotrain_loss(logp, terms, kl_coef=0.1)
    assert result.loss.item() == pytest.approx(2.0 * 0.1 * (math.exp(0.5) - 0.5 - 1))
    assert torch.autograd.grad(result.loss, logp)[0].item() == pytest.approx(2.0 * 0.1 * (1 - math.exp(0.5)))

    entropy = torch.ones(1, dtype=torch.float64, requires_grad=True)
    logp, terms = one_row(SFT, -1.5, ref_logp=9.0, advantage=7.0, weight=0.5)
    result = cotrain_loss(logp, terms, kl_coef=0.1, entropy_coef=0.1, entropy=entropy)
    assert result.loss.item() == pytest.approx(0.75)
    gradients = torch.autograd.grad(result.loss, (logp, entropy))
    assert [gradient.item() for gradient in gradients] == [-0.5, 0.0]


def test_on_policy_ratio_is_exactly_one_with_and_without_old_values() -> None:
    logp = -20 * torch.rand(50)
    terms = replace(make_terms(logp), kind=torch.zeros(50, dtype=torch.uint8))
    for old in (logp.clone(), None):
        result = cotrain_loss(logp, replace(terms, old_logp=old))
        assert result.metrics["ratio"].sum() == 50.0
        expected = cotrain_loss_reference(logp, replace(terms, old_logp=old))
        assert result.metrics["clipped"].sum() == expected.metrics["clipped"].sum() == 0
        torch.testing.assert_close(result.loss, expected.loss)


def test_zero_weight_selects_away_what_is_not_finite() -> None:
    logp = torch.tensor([-1.0, -math.inf, math.nan, -1.0], requires_grad=True)
    entropy = torch.tensor([1.0, math.nan, 1.0, math.inf], requires_grad=True)
    terms = TokenTerms(
        target=torch.zeros(4, dtype=torch.int64),
        old_logp=torch.tensor([-1.0, 0.0, 0.0, -500.0]),
        advantage=torch.tensor([1.0, -1.0, 1.0, -1.0]),
        weight=torch.tensor([0.5, 0.0, 0.0, 0.0]),
        kind=torch.tensor([RL, RL, SFT, RL]),
        ref_logp=torch.tensor([-1.0, 0.0, 0.0, 500.0]),
    )
    loss = cotrain_loss(logp, terms, entropy=entropy, kl_coef=0.1, entropy_coef=0.1).loss
    assert loss.item() == pytest.approx(-0.5 - 0.05)
    loss.backward()
    assert logp.grad.tolist() == [-0.5, 0.0, 0.0, 0.0]
    torch.testing.assert_close(entropy.grad, torch.tensor([-0.05, 0.0, 0.0, 0.0]))


def test_values_of_other_kinds_are_not_read() -> None:
    """SFT rows need no advantage, old or reference log-prob; a zero advantage silences an overflowing ratio."""
    nan = torch.tensor([math.nan, -200.0])
    logp = torch.tensor([-1.0, -1.0], requires_grad=True)
    terms = TokenTerms(
        torch.zeros(2, dtype=torch.int64), nan, torch.tensor([math.nan, 0.0]), torch.ones(2), torch.tensor([SFT, RL]),
        ref_logp=torch.tensor([math.nan, -1.0]),
    )  # fmt: skip
    result = cotrain_loss(logp, terms, kl_coef=0.1)
    result.loss.backward()
    assert result.loss.item() == 1.0
    assert logp.grad.tolist() == [-1.0, 0.0]
    assert not any(metric[SFT].isnan().any() for metric in result.metrics.values())


def test_metrics_are_sums_that_add_over_any_split() -> None:
    logp, entropy = -3 * torch.rand(200, dtype=torch.float64), torch.rand(200, dtype=torch.float64)
    terms = make_terms(logp)
    whole = cotrain_loss(logp, terms, entropy=entropy, **FULL)
    parts = []
    for piece in (slice(0, 70), slice(70, 200)):
        names = ("target", "old_logp", "advantage", "weight", "kind", "component", "ref_logp", "branch")
        part = TokenTerms(**{name: getattr(terms, name)[piece] for name in names})
        parts.append(cotrain_loss(logp[piece], part, entropy=entropy[piece], **FULL))
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss)
    for name, value in whole.metrics.items():
        assert value.shape == (2, 2, 8)
        torch.testing.assert_close(parts[0].metrics[name] + parts[1].metrics[name], value)
    cell = (terms.kind == RL) & (terms.branch == TRACE_BRANCH) & (terms.component == 3)
    assert whole.metrics["tokens"][RL, TRACE_BRANCH, 3] == cell.sum()
    torch.testing.assert_close(whole.metrics["logp"][RL, TRACE_BRANCH, 3], logp[cell].sum())
    assert whole.metrics["tokens"].sum() == 200


def test_absent_branch_and_component_count_as_zero() -> None:
    logp = -torch.rand(9)
    terms = replace(make_terms(logp), branch=None, component=None)
    tokens = cotrain_loss(logp, terms).metrics["tokens"]
    assert tokens[:, PROMPT_BRANCH, 0].sum() == tokens.sum() == 9


HEADS = [{}, {"rows": True}, {"bias": True, "softcap": 3.0}, {"rows": True, "temperature": True, "bias": True}]


def make_head(n: int, dtype: torch.dtype, options: dict, width: int = 23, vocab: int = 301) -> tuple[dict, Tensor]:
    """Arguments of the head and targets; the hidden states repeat where ``rows`` is set."""
    g = torch.Generator().manual_seed(n)
    r = 40 if options.get("rows") else n
    head = {
        "hidden": torch.randn(r, width, generator=g).to(dtype),
        "weight": (torch.randn(vocab, width, generator=g) / width**0.5).to(dtype),
        "rows": torch.randint(0, r, (n,), generator=g) if options.get("rows") else None,
        "bias": torch.randn(vocab, generator=g).to(dtype) if options.get("bias") else None,
        "softcap": options.get("softcap"),
        "temperature": torch.rand(n, generator=g) + 0.5 if options.get("temperature") else 1.0,
    }
    return head, torch.randint(0, vocab, (n,), generator=g)


def run_composed(head: dict, target: Tensor, terms: TokenTerms, dtype: torch.dtype, reference: bool, **options):
    logprob, loss = (linear_logprob_reference, cotrain_loss_reference) if reference else (linear_logprob, cotrain_loss)

    def call(leaves: dict):
        out = logprob(leaves.pop("hidden"), leaves.pop("weight"), target, entropy=True, **leaves)
        return loss(out.logp, terms, entropy=out.entropy, **options)

    return run_op(call, head, dtype)


def run_op(call, head: dict, dtype: torch.dtype):
    """Result and the gradients of 3 x loss, with the floating operands as leaves of ``dtype``."""
    floats = ("hidden", "weight", "bias")
    leaves = {k: head[k].detach().to(dtype).requires_grad_() for k in floats if head[k] is not None}
    result = call({**head, **leaves})
    return result, dict(zip(leaves, torch.autograd.grad(3 * result.loss, list(leaves.values()))))


@pytest.mark.parametrize("options", COEFFICIENTS, ids=str)
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_fused_equals_the_composition(shape: dict, options: dict) -> None:
    """In float64 to rounding, against the references and against the two public operations."""
    head, target = make_head(230, torch.float64, shape)
    arguments = {k: v for k, v in head.items() if k not in ("hidden", "weight")}
    logp = linear_logprob_reference(head["hidden"], head["weight"], target, **arguments).logp
    terms = make_terms(logp, target.int())
    fused, gradients = run_op(
        lambda kw: linear_cotrain_loss(terms=terms, entropy=True, **kw, **options), head, logp.dtype
    )
    for reference in (True, False):
        composed, expected = run_composed(head, target, terms, logp.dtype, reference, **options)
        torch.testing.assert_close(fused.loss, composed.loss, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(fused.metrics, composed.metrics, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 507])
def test_fused_error_rule(n: int, dtype: torch.dtype) -> None:
    head, target = make_head(n, dtype, HEADS[-1])
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in head.items()}
    arguments = {k: v for k, v in wide.items() if k not in ("hidden", "weight")}
    logp = linear_logprob_reference(wide["hidden"], wide["weight"], target, **arguments).logp
    terms = make_terms(logp.float(), target)
    got, got_gradients = run_op(lambda kw: linear_cotrain_loss(terms=terms, **kw, **FULL), head, dtype)
    plain, plain_gradients = run_composed(head, target, terms, dtype, True, **FULL)
    exact, exact_gradients = run_composed(wide, target, to_double(terms), torch.float64, True, **FULL)
    assert_within("loss", got.loss, plain.loss, exact.loss.detach(), 4 * EPS)
    for name, gradient in got_gradients.items():
        assert gradient.dtype == dtype
        rounding = torch.finfo(dtype).eps * exact_gradients[name].abs().max().item()
        assert_within(f"d{name}", gradient, plain_gradients[name], exact_gradients[name], rounding)


class CountMatmuls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the big matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


def test_fused_does_no_work_that_nobody_needs() -> None:
    head, target = make_head(90, torch.float32, {})
    hidden, weight = head["hidden"].requires_grad_(), head["weight"].requires_grad_()
    terms = make_terms(-5 * torch.ones(90), target)
    with CountMatmuls() as matmuls:
        result = linear_cotrain_loss(hidden, weight, terms)
        assert matmuls.count == 3  # logits, dL/dhidden, dL/dweight
        result.loss.backward()
        assert matmuls.count == 3  # the backward only scales
        linear_cotrain_loss(hidden, weight.detach(), terms)
        assert matmuls.count == 5
        linear_cotrain_loss(hidden.detach(), weight.detach(), terms)
        assert matmuls.count == 6
        with torch.no_grad():
            assert not linear_cotrain_loss(hidden, weight, terms).loss.requires_grad
        assert matmuls.count == 7
        linear_cotrain_loss(hidden, weight, replace(terms, weight=torch.zeros(90)))
        assert matmuls.count == 8  # every row dropped


def test_fused_backward_twice_scales_each_time() -> None:
    head, target = make_head(20, torch.float32, {})
    hidden = head["hidden"].requires_grad_()
    loss = linear_cotrain_loss(hidden, head["weight"], make_terms(-5 * torch.ones(20), target)).loss
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(4 * loss, hidden)[0], 4 * first)


def test_fused_under_autocast_keeps_float32_gradients() -> None:
    head, target = make_head(60, torch.float32, {})
    terms = make_terms(-5 * torch.ones(60), target)
    hidden, weight = head["hidden"].requires_grad_(), head["weight"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = linear_cotrain_loss(hidden, weight, terms)
    result.loss.backward()
    rounded = {**head, "hidden": hidden.detach().bfloat16().float(), "weight": weight.detach().bfloat16().float()}
    expected, gradients = run_composed(rounded, target, terms, torch.float32, True)
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(hidden.grad * 3, gradients["hidden"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(weight.grad * 3, gradients["weight"], rtol=1e-4, atol=1e-7)


def test_fused_without_rows() -> None:
    head, _ = make_head(4, torch.float32, {})
    none = torch.zeros(0, dtype=torch.int64)
    weight = head["weight"].requires_grad_()
    result = linear_cotrain_loss(head["hidden"], weight, make_terms(torch.zeros(0), none), rows=none, **FULL)
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert bool((weight.grad == 0).all())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logp": torch.zeros(3)}, ValueError, r"logp has shape \[3\] but the terms have \[2\]"),
        ({"logp": torch.zeros(2).bfloat16()}, TypeError, "logp must be float32 or float64"),
        ({"entropy": torch.zeros(2).double()}, TypeError, "entropy is torch.float64 but logp is torch.float32"),
        ({"entropy_coef": 0.1}, ValueError, "ask linear_logprob for it with entropy=True"),
        ({"kl_coef": 0.1}, ValueError, "RL rows have no ref_logp"),
        ({"clip_low": -0.1}, ValueError, "clip_low must lie in 0..1"),
        ({"clip_high": -0.1}, ValueError, "clip_high must not be negative"),
        ({"clip_dual": 1.0}, ValueError, "clip_dual must be above 1, or None"),
        ({"clip_dual": math.nan}, ValueError, "clip_dual must be above 1"),
        ({"kl_coef": math.nan}, ValueError, "kl_coef must be finite"),
        ({"terms": {}}, TypeError, "terms must be TokenTerms"),
    ],
)
def test_bad_input_is_one_clear_error(change, error, message) -> None:
    zeros = torch.zeros(2)
    terms = TokenTerms(torch.zeros(2, dtype=torch.int64), zeros, zeros, zeros, torch.tensor([RL, SFT]))
    with pytest.raises(error, match=message):
        cotrain_loss(**({"logp": zeros, "terms": terms} | change))


def test_reference_values_are_needed_on_rl_rows_only() -> None:
    zeros = torch.zeros(2)
    terms = TokenTerms(torch.zeros(2, dtype=torch.int64), zeros, zeros, torch.ones(2), torch.tensor([SFT, SFT]))
    assert cotrain_loss(zeros - 1, terms, kl_coef=0.1).loss.item() == 2.0
    with pytest.raises(ValueError, match="RL rows have no ref_logp"):
        linear_cotrain_loss(
            torch.ones(2, 3), torch.ones(5, 3), replace(terms, kind=torch.tensor([RL, SFT])), kl_coef=0.1
        )
