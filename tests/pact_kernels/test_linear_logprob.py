from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from oracles import assert_within
from torch import Tensor

from pact_kernels import linear_logprob
from pact_kernels.linear_logprob import chunked
from pact_kernels.linear_logprob.chunked import ChunkBudget
from pact_kernels.linear_logprob.reference import linear_logprob_reference

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks and tiles with ragged ends, as large inputs have them."""
    monkeypatch.setattr(chunked, "BUDGET", ChunkBudget(logits=1, rows=100, widened=4 * 123 * 300))


@dataclass
class Problem:
    """Inputs of one call and the upstream gradients c and e."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    rows: Tensor | None
    temperature: float | Tensor
    softcap: float | None
    c: Tensor
    e: Tensor | None

    @classmethod
    def random(
        cls, n: int = 507, width: int = 123, vocab: int = 1000, dtype=torch.float32, spread: float = 1.0, **options
    ) -> Problem:
        """``spread`` is roughly the standard deviation of the logits."""
        g = torch.Generator().manual_seed(n + vocab + options.get("seed", 0))
        r = options.get("r", n)
        hidden = torch.randn(r, width, generator=g)
        weight = torch.randn(vocab, width, generator=g) * spread / width**0.5
        bias = torch.randn(vocab, generator=g) if options.get("bias") else None
        shift = options.get("shift", 0.0)
        if shift:
            bias = torch.full((vocab,), shift)
        return cls(
            hidden.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            torch.randint(0, vocab, (n,), generator=g),
            torch.randint(0, r, (n,), generator=g) if "r" in options else None,
            torch.rand(n, generator=g) + 0.5 if options.get("temperature") else 1.0,
            options.get("softcap"),
            torch.randn(n, generator=g),
            torch.randn(n, generator=g) if options.get("entropy") else None,
        )

    def to(self, device: torch.device) -> Problem:
        """The same problem on ``device``."""
        return Problem(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()})

    def run(self, op, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Outputs and every gradient of ``op`` with the operands cast to ``dtype``."""
        cast = [
            None if value is None else value.detach().to(dtype or value.dtype).requires_grad_()
            for value in (self.hidden, self.weight, self.bias)
        ]
        out = op(
            cast[0],
            cast[1],
            self.target,
            rows=self.rows,
            bias=cast[2],
            temperature=self.temperature,
            softcap=self.softcap,
            entropy=self.e is not None,
        )
        total = (out.logp * self.c.to(out.logp.dtype)).sum()
        results = {"logp": out.logp.detach()}
        if self.e is not None:
            total = total + (out.entropy * self.e.to(out.logp.dtype)).sum()
            results["entropy"] = out.entropy.detach()
        leaves = {name: leaf for name, leaf in zip(("hidden", "weight", "bias"), cast) if leaf is not None}
        gradients = torch.autograd.grad(total, list(leaves.values()))
        return results | {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}

    def exact_logp(self) -> Tensor:
        """Log-probs in float64."""
        wide = {name: getattr(self, name) for name in ("hidden", "weight", "bias")}
        wide = {name: None if value is None else value.double() for name, value in wide.items()}
        options = {"rows": self.rows, "temperature": self.temperature, "softcap": self.softcap}
        return linear_logprob_reference(wide.pop("hidden"), wide.pop("weight"), self.target, **wide, **options).logp

    def check(self, op=linear_logprob, scale: Scale | None = None) -> None:
        """The error rule, outputs and all gradients of ``op``; ``scale``: of what was rounded, where it cancels."""
        got = self.run(op)
        exact = self.run(linear_logprob_reference, torch.float64)
        plain = self.run(linear_logprob_reference, torch.float32)
        same = self.run(linear_logprob_reference)
        for name, value in got.items():
            largest = exact[name].abs().max().item() if exact[name].numel() else 0.0
            if name in ("logp", "entropy"):
                assert value.dtype == torch.float32
                assert_within(
                    name, value, plain[name], exact[name], 4 * EPS * max(scale.logit if scale else 1.0, largest)
                )
            else:
                assert value.dtype == self.hidden.dtype
                rounding = scale.rounding(name, value.dtype) if scale else torch.finfo(value.dtype).eps * largest
                assert_within(name, value, same[name], exact[name], rounding)

    def scale(self) -> Scale:
        """How large the numbers are that the results are sums and differences of."""
        hidden, weight = self.hidden.double(), self.weight.double()
        rows = torch.arange(len(self.target), device=hidden.device) if self.rows is None else self.rows
        u_NV = hidden[rows] @ weight.T
        if self.bias is not None:
            u_NV = u_NV + self.bias.double()
        inv_temperature = 1 / torch.as_tensor(self.temperature, device=hidden.device).double().reshape(-1, 1)
        slope = inv_temperature.expand_as(u_NV)
        if self.softcap is not None:  # 1 - tanh^2 of the float64 oracle is itself off by 1e-16 where it is near 0
            slope = slope * (1 - (u_NV / self.softcap).tanh() ** 2 + 1e-8)
        z_NV = (u_NV if self.softcap is None else self.softcap * (u_NV / self.softcap).tanh()) * inv_temperature
        logp_NV = z_NV.log_softmax(1)
        p_NV = logp_NV.exp()
        onehot_NV = torch.nn.functional.one_hot(self.target, weight.shape[0])
        du_NV = self.c.double().abs()[:, None] * (onehot_NV + p_NV)
        if self.e is not None:
            surprise_NV = p_NV * logp_NV.abs()
            du_NV = du_NV + self.e.double().abs()[:, None] * (surprise_NV + p_NV * surprise_NV.sum(1, keepdim=True))
        du_NV = du_NV * slope
        dhidden_RH = torch.zeros_like(hidden).index_add_(0, rows, du_NV @ weight.abs())
        logit = max(1.0, (u_NV.abs() * inv_temperature).max().item())
        sums = {"dhidden": dhidden_RH, "dweight": du_NV.T @ hidden[rows].abs(), "dbias": du_NV.sum(0)}
        factors = {
            "dhidden": weight.abs().sum(0),
            "dweight": hidden[rows].abs().sum(0),
            "dbias": rows.new_tensor(len(rows)),
        }
        return Scale(logit, *({name: value.max().item() for name, value in each.items()} for each in (sums, factors)))


@dataclass
class Scale:
    """The largest logit; the largest sum of absolute values behind an element of each gradient; the same of what dL/du
    was multiplied with."""

    logit: float
    sums: dict[str, float]
    factors: dict[str, float]

    def rounding(self, name: str, dtype: torch.dtype) -> float:
        """What rounding may do to a gradient: of its terms and of itself to ``dtype`` (Triton's interpreter truncates
        to bf16, a whole eps each time), and what a log-prob may be off: p and a ratio are off as much, relatively."""
        info = torch.finfo(dtype)
        underflow = info.tiny * info.eps * self.factors[name]  # dL/du of float16 is soon subnormal
        return (2 * info.eps + 4 * EPS * self.logit) * self.sums[name] + underflow


ALL_OPTIONS = {"bias": True, "temperature": True, "softcap": 2.0, "entropy": True, "r": 60}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 507])
@pytest.mark.parametrize("options", [{}, {"entropy": True}, {"softcap": 2.0}, ALL_OPTIONS], ids=str)
def test_error_rule(n: int, dtype: torch.dtype, options: dict) -> None:
    Problem.random(n, dtype=dtype, **options).check()


@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize("shift", [0.0, -3000.0], ids=["", "far below zero"])
def test_error_rule_on_any_scale(spread: float, shift: float) -> None:
    Problem.random(130, vocab=777, spread=spread, shift=shift, entropy=True).check()


def test_error_rule_with_a_large_vocabulary() -> None:
    chunked.BUDGET.widened = 2**24
    Problem.random(3, width=16, vocab=2**18, entropy=True).check()


def test_near_deterministic_rows() -> None:
    """One logit 80 above the rest: entropy 0 up to float32, gradients finite."""
    problem = Problem.random(5, vocab=50, entropy=True)
    problem.weight.zero_()
    problem.bias = torch.zeros(50)
    problem.bias[7] = 80.0
    problem.target[:2] = 7
    problem.check()


def check_masked_columns(op, device: torch.device | str = "cpu") -> None:
    """Columns of -inf, a whole split of them too, have probability 0 and no part in the entropy; nothing is NaN."""
    problem = Problem.random(20, 16, 203, bias=True, entropy=True).to(device)
    problem.bias[64:150] = -torch.inf
    problem.target[:] = problem.target % 64
    got = problem.run(op)
    allowed = [*range(64), *range(150, 203)]
    small = Problem(**vars(problem) | {"weight": problem.weight[allowed], "bias": problem.bias[allowed]})
    exact = small.run(linear_logprob_reference, torch.float64)
    for name, value in got.items():
        value = value[allowed] if name in ("dweight", "dbias") else value
        torch.testing.assert_close(value.double(), exact[name], atol=1e-5, rtol=1e-4, msg=name)
    assert bool((got["dweight"][64:150] == 0).all())


def test_columns_of_minus_infinity_are_never_chosen() -> None:
    check_masked_columns(linear_logprob)


@pytest.mark.parametrize(
    "options", [{}, {"entropy": True}, {"softcap": 1.5, "temperature": True, "r": 3}, ALL_OPTIONS], ids=str
)
def test_reference_gradients(options: dict) -> None:
    """gradcheck in float64 of the specification; the torch backend gives the same float64 gradients."""
    problem = Problem.random(
        4, width=3, vocab=7, dtype=torch.float64, **(options | ({"r": 3} if "r" in options else {}))
    )
    leaves = [value for value in (problem.hidden, problem.weight, problem.bias) if value is not None]

    def outputs(op):
        def call(hidden: Tensor, weight: Tensor, bias: Tensor | None = None):
            out = op(
                hidden,
                weight,
                problem.target,
                rows=problem.rows,
                bias=bias,
                temperature=problem.temperature,
                softcap=problem.softcap,
                entropy=problem.e is not None,
            )
            return (out.logp,) if out.entropy is None else (out.logp, out.entropy)

        return call

    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(outputs(linear_logprob_reference), leaves)
    assert torch.autograd.gradcheck(outputs(linear_logprob), leaves)


def test_float64_stays_float64() -> None:
    problem = Problem.random(40, dtype=torch.float64, **ALL_OPTIONS)
    got, exact = problem.run(linear_logprob), problem.run(linear_logprob_reference)
    for name, value in got.items():
        torch.testing.assert_close(value, exact[name], rtol=1e-12, atol=1e-12)


class CountMatmulRows(torch.utils._python_dispatch.TorchDispatchMode):
    """Adds up the rows of every matmul against the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            self.rows += args[-2].shape[0] if func.overloadpacket is torch.ops.aten.mm else args[1].shape[0]
        return func(*args, **(kwargs or {}))


def test_rows_without_gradient_are_dropped_before_the_matmuls() -> None:
    hidden, weight = torch.randn(300, 8, requires_grad=True), torch.randn(40, 8)
    c, e = torch.zeros(300), torch.zeros(300)
    c[17:117], e[100:150] = 1.0, 1.0  # 133 rows live: two chunks
    out = linear_logprob(hidden, weight, torch.zeros(300, dtype=torch.int64), entropy=True)
    total = (out.logp * c + out.entropy * e).sum()
    with CountMatmulRows() as count:
        total.backward()
    assert count.rows == 2 * (100 + 33)  # scored again, and against the weight once more for dL/dhidden
    assert bool((hidden.grad[:17] == 0).all())
    assert bool((hidden.grad[150:] == 0).all())
    assert bool((hidden.grad[17:150] != 0).any(dim=1).all())


def test_all_rows_dropped_and_no_rows() -> None:
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    out = linear_logprob(hidden, weight, torch.zeros(5, dtype=torch.int64))
    with CountMatmulRows() as count:
        (out.logp * 0.0).sum().backward()
    assert count.rows == 0
    assert bool((hidden.grad == 0).all())
    assert bool((weight.grad == 0).all())

    none = torch.zeros(0, dtype=torch.int64)
    out = linear_logprob(hidden, weight, none, rows=none, entropy=True)
    assert out.logp.shape == out.entropy.shape == (0,)
    (out.logp.sum() + out.entropy.sum()).backward()
    assert bool((weight.grad == 0).all())


def test_only_the_entropy_may_have_a_gradient() -> None:
    problem = Problem.random(20, entropy=True)
    problem.c.zero_()
    problem.check()
    hidden = problem.hidden.requires_grad_()
    linear_logprob(hidden, problem.weight, problem.target, entropy=True).entropy.sum().backward()
    assert bool((hidden.grad != 0).any())


def test_gradients_nobody_needs_are_not_computed() -> None:
    hidden, weight = torch.randn(50, 8), torch.randn(40, 8, requires_grad=True)
    total = linear_logprob(hidden, weight, torch.zeros(50, dtype=torch.int64)).logp.sum()
    with CountMatmulRows() as count:
        total.backward()
    assert count.rows == 50 + 40  # scored once; dL/dweight has 40 rows
    assert hidden.grad is None


def test_a_row_does_not_depend_on_how_many_come_with_it() -> None:
    problem = Problem.random(507)
    full = linear_logprob(problem.hidden, problem.weight, problem.target, entropy=True)
    for n in (1, 2, 31, 33, 100, 101, 506):
        part = linear_logprob(problem.hidden[:n], problem.weight, problem.target[:n], entropy=True)
        assert torch.equal(part.logp, full.logp[:n]), n
        assert torch.equal(part.entropy, full.entropy[:n]), n


def test_autocast_rounds_inside_and_accumulates_in_float32() -> None:
    problem = Problem.random(260)
    rounded = Problem(**(vars(problem) | {"hidden": problem.hidden.bfloat16(), "weight": problem.weight.bfloat16()}))
    exact = rounded.run(linear_logprob_reference, torch.float64)
    plain = rounded.run(linear_logprob_reference, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = problem.run(linear_logprob)
    for name, value in got.items():
        assert value.dtype == torch.float32  # gradients too: nothing was rounded to bfloat16
        assert_within(name, value, plain[name], exact[name], 4 * EPS * max(1.0, exact[name].abs().max().item()))


def test_backward_is_once_differentiable() -> None:
    problem = Problem.random(3)
    hidden = problem.hidden.requires_grad_()
    total = linear_logprob(hidden, problem.weight, problem.target).logp.square().sum()
    (gradient,) = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


ROWS = {"rows": torch.tensor([0, 1])}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(1, 3, 2)}, ValueError, "flatten batch dimensions first"),
        ({"weight": torch.ones(5, 3)}, ValueError, r"hidden must be \[R, H\] and weight \[V, H\]"),
        ({"weight": torch.ones(5, 2).bfloat16()}, TypeError, "weight is torch.bfloat16 but hidden is torch.float32"),
        ({"hidden": torch.ones(3, 2).long()}, TypeError, "hidden must be bfloat16, float16, float32 or"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \[V\] = \[5\]"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, ValueError, "beside 3 hidden rows; pass rows"),
        ({"target": torch.tensor([0, 5, 0])}, ValueError, r"target must lie in 0..4 \(the vocabulary\), got 5"),
        ({"target": torch.tensor([0, -1, 0])}, ValueError, "target must lie in 0..4 .*, got -1"),
        ({"target": torch.zeros(3)}, TypeError, "target must hold integers"),
        ({"rows": torch.tensor([0, 1, 3])}, ValueError, r"rows must lie in 0..2 \(the rows of hidden\), got 3"),
        (ROWS, ValueError, r"rows has shape \[2\] but target has shape \[3\]"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0"),
        ({"temperature": torch.tensor([1.0, 1.0, -1.0])}, ValueError, "positive and finite in every row"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature must be a number or \[N\]"),
        ({"softcap": -1.0}, ValueError, "softcap must be a positive number or None"),
        ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
    ],
)
def test_bad_input_is_one_clear_error(change, error, message) -> None:
    arguments = {"hidden": torch.ones(3, 2), "weight": torch.ones(5, 2), "target": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        linear_logprob(**(arguments | change))


def test_more_than_2_to_the_31_logits() -> None:
    """8,300 rows of 262,144 columns, of which few have a gradient; checked at both ends."""
    chunked.BUDGET = ChunkBudget(logits=2**28)  # put back by the fixture
    g = torch.Generator().manual_seed(0)
    n, width, vocab, ends = 8300, 4, 262_144, [0, 1, 8298, 8299]
    hidden = torch.randn(n, width, generator=g).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).requires_grad_()
    target = torch.randint(0, vocab, (n,), generator=g)
    logp = linear_logprob(hidden, weight, target).logp
    wanted = linear_logprob_reference(hidden[ends], weight, target[ends]).logp
    torch.testing.assert_close(logp[ends], wanted, atol=1e-5, rtol=1e-5)
    mine, theirs = (torch.autograd.grad(out.sum(), (hidden, weight)) for out in (logp[ends], wanted))
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
