"""The Triton backend of linear_logprob against the same rule as the torch one: in the interpreter without a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import DEVICE, assert_within
from test_linear_logprob import ALL_OPTIONS, EPS, Problem, check_masked_columns

from pact_kernels import linear_logprob
from pact_kernels.linear_logprob import launch, ops
from pact_kernels.linear_logprob.reference import linear_logprob_reference
from pact_kernels.tiles import HEAD_TILES, HeadTile

triton_logprob = partial(linear_logprob, backend="triton")


def make(*args, **options) -> Problem:
    return Problem.random(*args, **options).to(DEVICE)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one tile of rows and splits of a few tiles of columns, with ragged ends."""
    monkeypatch.setattr(launch, "BUDGET", launch.ChunkBudget(dlogits=1))
    monkeypatch.setattr(launch, "SPLIT_COLUMNS", 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"entropy": True}, {"softcap": 2.0}, ALL_OPTIONS], ids=str)
def test_error_rule(dtype: torch.dtype, options: dict) -> None:
    make(77, 43, 203, dtype=dtype, **options).check(triton_logprob)


@pytest.mark.parametrize(
    ("n", "width", "vocab"), [(0, 123, 70), (1, 123, 70), (507, 123, 333), (40, 64, 256), (3, 1, 1)]
)
def test_odd_and_even_sizes(n: int, width: int, vocab: int) -> None:
    make(n, width, vocab, entropy=True).check(triton_logprob)


def test_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SPLIT_COLUMNS", 2**15)
    monkeypatch.setitem(HEAD_TILES["interpreter"], 4, HeadTile(16, 2**14, 16, 4, 1))  # it interprets tile by tile
    make(3, 8, 262_144, entropy=True).check(triton_logprob)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize("shift", [0.0, -3000.0], ids=["", "far below zero"])
def test_error_rule_on_any_scale(spread: float, shift: float) -> None:
    make(40, 33, 203, spread=spread, shift=shift, entropy=True).check(triton_logprob)


@pytest.mark.parametrize("cap", [0.5, 50.0])
def test_softcap_near_and_far_from_its_linear_part(cap: float) -> None:
    make(40, 33, 203, spread=3.0, softcap=cap, entropy=True, temperature=True).check(triton_logprob)


def test_columns_of_minus_infinity_are_never_chosen() -> None:
    check_masked_columns(triton_logprob, DEVICE)


def test_logits_that_are_not_numbers_stay_so() -> None:
    problem = make(20, 16, 203)
    problem.hidden[3, 5] = torch.nan
    logp = triton_logprob(problem.hidden, problem.weight, problem.target).logp
    assert logp.isnan().nonzero()[:, 0].tolist() == [3]


def test_a_row_does_not_depend_on_how_many_come_with_it() -> None:
    problem = make(77, 43, 203)
    full = triton_logprob(problem.hidden, problem.weight, problem.target, entropy=True)
    for n in (1, 31, 33, 76):
        part = triton_logprob(problem.hidden[:n], problem.weight, problem.target[:n], entropy=True)
        assert torch.equal(part.logp, full.logp[:n]), n
        assert torch.equal(part.entropy, full.entropy[:n]), n
    assert torch.equal(triton_logprob(problem.hidden, problem.weight, problem.target).logp, full.logp)


def test_rows_without_gradient_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, seen = make(77, 43, 203, entropy=True), []
    problem.c[10:], problem.e[5:] = 0.0, 0.0
    matmul = launch.matmul
    monkeypatch.setattr(launch, "matmul", lambda left, right: seen.append(left.shape[0]) or matmul(left, right))
    problem.check(triton_logprob)
    assert sum(seen) == 10


def test_a_frozen_head_costs_no_gradient_and_one_upstream_gradient_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "add_matmul", lambda *_: pytest.fail("dWeight of a frozen head was computed"))
    problem = make(20, 16, 50)
    hidden = problem.hidden.requires_grad_()
    out = triton_logprob(hidden, problem.weight, problem.target, entropy=True)
    wanted = linear_logprob(hidden, problem.weight, problem.target, entropy=True, backend="torch")
    for name in ("logp", "entropy"):
        (got,) = torch.autograd.grad(getattr(out, name).sum(), hidden, retain_graph=True)
        (exact,) = torch.autograd.grad(getattr(wanted, name).sum(), hidden, retain_graph=True)
        torch.testing.assert_close(got, exact, atol=1e-6, rtol=1e-5)


def test_tied_embeddings_add_both_gradients() -> None:
    problem, ids = make(20, 16, 50), torch.arange(20, device=DEVICE)
    weight = problem.weight.requires_grad_()
    for op, store in ((triton_logprob, mine := {}), (linear_logprob_reference, theirs := {})):
        total = op(weight[ids].tanh(), weight, problem.target).logp.sum()
        store["grad"] = torch.autograd.grad(total, weight)[0]
    torch.testing.assert_close(mine["grad"], theirs["grad"], atol=1e-5, rtol=1e-5)


def test_strides_do_not_matter() -> None:
    problem = make(20, 16, 50)
    plain = triton_logprob(problem.hidden, problem.weight, problem.target).logp
    strided = torch.stack([problem.hidden, problem.hidden], dim=1)[:, 1]  # unit stride along H, twice the row
    assert torch.equal(triton_logprob(strided, problem.weight, problem.target).logp, plain)
    turned = problem.weight.T.contiguous().T  # no unit stride along H
    assert torch.equal(triton_logprob(problem.hidden, turned, problem.target).logp, plain)
    every_second = torch.stack([problem.target, problem.target], dim=1)[:, 0]
    assert torch.equal(triton_logprob(problem.hidden, problem.weight, every_second).logp, plain)


def test_autocast_rounds_inside() -> None:
    problem = make(60, 16, 50, entropy=True)
    low = {name: getattr(problem, name).bfloat16() for name in ("hidden", "weight")}
    rounded = Problem(**vars(problem) | low)
    exact, same = rounded.run(linear_logprob_reference, torch.float64), rounded.run(linear_logprob_reference)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got = problem.run(triton_logprob)
    for name, value in got.items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, value.bfloat16().float()), name  # dL/du was rounded; what became of it was not
        is_output = name in ("logp", "entropy")
        rounding = 4 * EPS if is_output else torch.finfo(torch.bfloat16).eps
        assert_within(name, value, same[name], exact[name], rounding * max(1.0, exact[name].abs().max().item()))


@pytest.mark.parametrize("entropy", [False, True])
def test_operator_registration(entropy: bool) -> None:
    """Schema, fake implementation, autograd and what torch.compile needs of it."""
    problem = make(9, 16, 50, bias=True, temperature=True, r=4)
    operands = [value.requires_grad_() for value in (problem.hidden, problem.weight, problem.bias)]
    scale = problem.temperature.reciprocal()
    arguments = (*operands, problem.target, problem.rows, scale, 2.0, torch.float32, entropy, False)
    torch.library.opcheck(ops.head_forward, arguments)
    mixed = (operands[0].bfloat16(), operands[1], operands[2].detach().bfloat16(), *arguments[3:])  # as under autocast
    torch.library.opcheck(ops.head_forward, mixed)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_callers_have_no_graph_break(autocast: bool) -> None:
    problem = make(20, 16, 50, temperature=True, bias=True)
    hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()

    def loss(hidden, weight, bias, target, temperature):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            out = triton_logprob(hidden.tanh(), weight, target, bias=bias, temperature=temperature, entropy=True)
        return (out.logp - 0.1 * out.entropy).sum()

    arguments = (hidden, weight, problem.bias, problem.target, problem.temperature)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for mine, theirs in zip(
        torch.autograd.grad(compiled(*arguments), (hidden, weight)),
        torch.autograd.grad(loss(*arguments), (hidden, weight)),
    ):
        torch.testing.assert_close(mine, theirs)


def test_agrees_with_linear_cross_entropy() -> None:
    """An implementation that shares nothing with this one, where torch has it."""
    linear_cross_entropy = getattr(F, "linear_cross_entropy", None)
    if linear_cross_entropy is None:
        pytest.skip("this torch has no F.linear_cross_entropy")
    problem = make(77, 43, 203, bias=True)
    leaves = [value.requires_grad_() for value in (problem.hidden, problem.weight, problem.bias)]
    mine = -triton_logprob(leaves[0], leaves[1], problem.target, bias=leaves[2]).logp
    theirs = linear_cross_entropy(*leaves[:2], problem.target, linear_bias=leaves[2], reduction="none")
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    for a, b in zip(
        torch.autograd.grad((mine * problem.c).sum(), leaves), torch.autograd.grad((theirs * problem.c).sum(), leaves)
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 203}, r"target must lie in 0\.\.202 \(the vocabulary\), and some are not"),
        ({"target": -1}, r"target must lie in 0\.\.202"),
        ({"rows": 4}, r"rows must lie in 0\.\.3 \(the rows of hidden\)"),
        ({"temperature": 0.0}, "temperature must be positive and finite in every row"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": torch.nan}, "temperature must be positive"),
    ],
    ids=str,
)
def test_values_out_of_range_are_found_by_the_kernels(change: dict, message: str) -> None:
    """No scan and no synchronisation in the forward: such a row is NaN, no other is, and the backward raises."""
    problem = make(20, 16, 203, temperature=True, r=4)
    clean = triton_logprob(
        problem.hidden, problem.weight, problem.target, rows=problem.rows, temperature=problem.temperature
    )
    for name, value in change.items():
        getattr(problem, name)[7] = value
    weight = problem.weight.requires_grad_()
    logp = triton_logprob(
        problem.hidden, weight, problem.target, rows=problem.rows, temperature=problem.temperature
    ).logp
    others = torch.arange(20, device=DEVICE) != 7
    assert bool(logp[7].isnan())
    assert torch.equal(logp[others], clean.logp[others])
    with pytest.raises(ValueError, match=message):
        logp.sum().backward()


def test_second_derivatives_are_refused() -> None:
    problem = make(3, 4, 5)
    hidden = problem.hidden.requires_grad_()
    total = triton_logprob(hidden, problem.weight, problem.target).logp.square().sum()
    (gradient,) = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


def test_bad_input() -> None:
    problem = make(3, 4, 5)
    with pytest.raises(ValueError, match=r"hidden is \[0, 4\] and weight \[5, 4\]: targets need rows in both"):
        triton_logprob(problem.hidden[:0], problem.weight, problem.target, rows=problem.target)
    with pytest.raises(ValueError, match="targets need rows in both"):
        triton_logprob(problem.hidden, problem.weight[:0], problem.target)
    with pytest.raises(TypeError, match=r"hidden must be bfloat16, float16, float32 or float64, got .*float8"):
        triton_logprob(problem.hidden.to(torch.float8_e4m3fn), problem.weight, problem.target)
    with pytest.raises(TypeError, match="target must be a tensor of integers, got list"):
        triton_logprob(problem.hidden, problem.weight, [0, 1, 2])
    with pytest.raises(ValueError, match="temperature must be positive, got 1e-40"):
        triton_logprob(problem.hidden, problem.weight, problem.target, temperature=1e-40)
    with pytest.raises(TypeError, match="use backend='torch' for float64"):
        triton_logprob(problem.hidden.double(), problem.weight.double(), problem.target)
    with pytest.raises(TypeError, match=r"weight is .*bfloat16 but hidden is .*float32"):
        triton_logprob(problem.hidden, problem.weight.bfloat16(), problem.target)
    with pytest.raises(ValueError, match="weight is on meta but hidden is on"):
        triton_logprob(problem.hidden, problem.weight.to("meta"), problem.target)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        triton_logprob(problem.hidden, problem.weight, problem.target, temperature=0.0)


def test_a_sharded_weight_is_refused(tmp_path) -> None:
    """FSDP2 parameters are DTensors outside the forward of the module that owns them."""
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    problem = Problem.random(3, 4, 5)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        weight = distribute_tensor(problem.weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        for backend in ("torch", "triton"):
            with pytest.raises(TypeError, match=r"weight is a DTensor: .* inside the forward of the module that FSDP2"):
                linear_logprob(problem.hidden, weight, problem.target, backend=backend)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="about tensors on the CPU")
def test_tensors_on_the_cpu_are_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pact_kernels.backend.INTERPRETED", False)
    problem = make(3, 4, 5)
    with pytest.raises(
        RuntimeError, match="needs tensors on a GPU and got cpu: move them, use backend='torch', or set"
    ):
        triton_logprob(problem.hidden, problem.weight, problem.target)
