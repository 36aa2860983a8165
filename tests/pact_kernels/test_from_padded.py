"""`TokenTerms.from_padded` against a plain double loop over a padded batch, in float64: terms, loss and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pact_kernels import TokenTerms, linear_cotrain_loss
from pact_kernels.terms import RL, SFT, TRACE_BRANCH

CLIP, KL = 0.2, 0.1
B, T, H, V = 4, 7, 5, 11


def batch(seed, left=(0, 2, 0, 3), right=(0, 0, 3, 1)):
    """A batch padded on both sides, observations between the sampled tokens, one sequence without any of them."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (B, T), generator=rng)
    mask = torch.rand(B, T, generator=rng) < 0.6
    mask[:, 0] = False
    for b in range(B):
        mask[b, : left[b] + 1] = False
        mask[b, T - right[b] :] = False
    mask[3] = False
    old, ref = (-3 * torch.rand(B, T, generator=rng, dtype=torch.float64) for _ in range(2))
    hidden = torch.randn(B, T, H, generator=rng, dtype=torch.float64)
    weight = torch.randn(V, H, generator=rng, dtype=torch.float64)
    advantage = torch.randn(B, T, generator=rng, dtype=torch.float64)
    return ids, mask, old, ref, hidden, weight, advantage


def by_hand(ids, mask, old, ref, hidden, weight, advantage, kind, factor, z):
    """The sum over sequences b and columns t of DESIGN section 1's token loss, nothing flattened."""
    logp = torch.log_softmax(hidden @ weight.T, dim=-1)
    loss = torch.zeros((), dtype=torch.float64)
    for b in range(len(ids)):
        for t in range(1, ids.shape[1]):
            if not mask[b, t]:
                continue
            p = logp[b, t - 1, ids[b, t]]
            if kind[b] == SFT:
                loss = loss - factor[b] / z[1] * p
                continue
            ratio, a = (p - old[b, t]).exp(), advantage[b, t]
            surrogate = torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a)
            d = ref[b, t] - p
            loss = loss - factor[b] / z[0] * (surrogate - KL * (d.exp() - d - 1))
    return loss


def fused(ids, mask, old, ref, hidden, head, advantage, **options):
    terms, rows = TokenTerms.from_padded(ids, mask, advantage, old_logp=old, ref_logp=ref, **options)
    return linear_cotrain_loss(
        hidden.flatten(0, 1), head, terms, rows=rows, clip_low=CLIP, clip_high=CLIP, kl_coef=KL
    ).loss


def check(made, kinds, factors, z, **options):
    """Loss and both gradients, ours against by hand."""
    ids, mask, old, ref, hidden, weight, advantage = made
    results = []
    for ours in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            loss = fused(ids, mask, old, ref, h, w, advantage, **options)
        else:
            loss = by_hand(ids, mask.bool(), old, ref, h, w, advantage, kinds, factors, z)
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_rl_equals_the_double_loop(dtype):
    ids, mask, *rest = batch(0)
    assert 5 < mask.sum() < mask.numel() / 2
    check((ids, mask.to(dtype), *rest), [RL] * B, [1.0] * B, (9.0, 9.0), denominator=9.0)


def test_rl_and_sft_in_one_batch():
    kind, factor = torch.tensor([RL, SFT, SFT, RL]), torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    check(batch(1), kind, factor, (7.0, 3.0), denominator=(7.0, 3.0), kind=kind, weight=factor)


def test_sft_alone_needs_no_advantage():
    ids, mask, *_, hidden, weight, _ = batch(2)
    terms, rows = TokenTerms.from_padded(ids, mask, kind=SFT, denominator=mask.sum())
    loss = linear_cotrain_loss(hidden.flatten(0, 1), weight, terms, rows=rows).loss
    logp = torch.log_softmax(hidden @ weight.T, dim=-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(loss, -logp[mask[:, 1:]].mean())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 3), min_size=B, max_size=B))
def test_any_padding(seed, left):
    made = batch(seed, left=left, right=(0, 1, 2, 3))
    check(made, [RL] * B, [1.0] * B, (5.0, 5.0), denominator=torch.tensor(5.0))


def test_tensors_of_the_completions_alone():
    """The last C columns: completions beside prompt + completion, log-probs of logits[:, :-1]; shifted hidden."""
    ids, mask, old, ref, hidden, _, advantage = batch(3)
    mask[:, :3] = False
    whole, rows = TokenTerms.from_padded(ids, mask, advantage, old_logp=old, ref_logp=ref, denominator=4.0)
    narrow, same_rows = TokenTerms.from_padded(
        ids, mask[:, 3:], advantage[:, 2:], old_logp=old[:, 1:], ref_logp=ref[:, 3:], denominator=4.0
    )
    alone, own_rows = TokenTerms.from_padded(
        ids[:, 3:],
        mask[:, 3:],
        advantage[:, 3:],
        old_logp=old[:, 3:],
        ref_logp=ref[:, 3:],
        denominator=4.0,
        shifted=True,
    )
    assert torch.equal(rows, same_rows)
    assert torch.equal(hidden.flatten(0, 1)[rows], hidden[:, 2:-1].flatten(0, 1)[own_rows])
    for terms in (narrow, alone):
        for name in ("target", "old_logp", "ref_logp", "advantage", "weight", "kind", "sequence"):
            assert torch.equal(getattr(terms, name), getattr(whole, name)), name


def test_a_number_a_sequence():
    ids, mask, *_ = batch(4)
    terms, rows = TokenTerms.from_padded(
        ids, mask, torch.tensor([1.0, 2.0, 3.0, 4.0]), denominator=2.0, branch=torch.tensor([0, 1, 0, 1]), component=2
    )
    assert terms.old_logp is None
    assert terms.ref_logp is None
    assert torch.equal(terms.advantage, terms.sequence + 1.0)
    assert torch.equal(terms.branch == TRACE_BRANCH, terms.sequence % 2 == 1)
    assert terms.component.unique().tolist() == [2]
    assert torch.equal(rows, terms.sequence * T + mask.nonzero()[:, 1] - 1)


def test_nothing_counts():
    ids, mask, *_, hidden, weight, _ = batch(5)
    terms, rows = TokenTerms.from_padded(ids, torch.zeros_like(mask), 1.0, denominator=1.0)
    assert len(terms) == len(rows) == 0
    hidden.requires_grad_()
    linear_cotrain_loss(hidden.flatten(0, 1), weight, terms, rows=rows).loss.backward()
    assert not hidden.grad.any()


def changed(name, value):
    ids, mask, old, *_, advantage = batch(6)
    return {"input_ids": ids, "mask": mask, "advantage": advantage, "old_logp": old, "denominator": 2.0} | {name: value}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("advantage", None, "RL tokens need an advantage"),
        ("mask", torch.ones(B, T), "counts a token in column 0"),
        ("mask", 2 * torch.ones(B, T - 1), "must hold 0 and 1 only"),
        ("mask", torch.ones(B, T + 1), "mask must be"),
        ("mask", torch.ones(B, T - 1, device="meta"), "mask is on meta"),
        ("input_ids", torch.zeros(T, dtype=torch.int64), "input_ids must be"),
        ("advantage", torch.ones(T), "advantage must be"),
        ("advantage", torch.ones(B, 2), "holds the last 2 of 7 columns"),
        ("old_logp", torch.zeros(B), "old_logp must be"),
        ("old_logp", torch.zeros(B, T, device="meta"), "old_logp is on meta"),
        ("denominator", 0.0, "denominator 0 divides the RL tokens"),
        ("denominator", -1.0, "denominator -1"),
        ("denominator", float("nan"), "denominator nan"),
        ("kind", torch.tensor([0, 1, 0, 1]), "the pair"),
        ("kind", 2, "kind must lie in"),
        ("weight", -1.0, "must be finite and not negative"),
    ],
)
def test_bad_input_is_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        TokenTerms.from_padded(**changed(name, value))


def test_lists_are_refused():
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        TokenTerms.from_padded(**changed("mask", [[0, 1]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_divided_in_float32(dtype):
    ids, mask = torch.tensor([[1, 2]]), torch.tensor([[0, 1]])
    terms, _ = TokenTerms.from_padded(ids, mask, torch.ones(1), denominator=3e7, weight=torch.ones(1, dtype=dtype))
    assert terms.weight.item() == pytest.approx(1 / 3e7, rel=1e-6)
