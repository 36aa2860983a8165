from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pact_kernels.terms import N_COMPONENTS, TokenTerms


def make_terms(n: int = 3) -> TokenTerms:
    ints, floats = torch.arange(n), torch.linspace(-1, 1, n)
    return TokenTerms(
        ints,
        floats,
        floats,
        floats.abs(),
        ints.to(torch.uint8) % 2,
        ints.to(torch.int8),
        floats,
        ints % 2,
        ints.to(torch.int32),
    )


def test_length_and_move() -> None:
    terms = make_terms()
    assert len(terms) == 3
    moved = terms.to("cpu")
    assert torch.equal(moved.target, terms.target)
    assert len(make_terms(0)) == 0


def test_optional_fields_stay_absent() -> None:
    terms = replace(make_terms(), old_logp=None, component=None, ref_logp=None, branch=None, sequence=None).to("cpu")
    assert [terms.old_logp, terms.component, terms.ref_logp, terms.branch, terms.sequence] == [None] * 5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(4)}, ValueError, r"weight must be 1-D and as long as target, got shape \[4\]"),
        ({"target": torch.ones(3, 1, dtype=torch.int64)}, ValueError, "target must be 1-D"),
        ({"advantage": torch.ones(3, dtype=torch.int64)}, TypeError, "advantage must hold floating point numbers"),
        ({"kind": torch.zeros(3)}, TypeError, "kind must hold integers, got torch.float32"),
        ({"kind": torch.ones(3, dtype=torch.bool)}, TypeError, "kind must hold integers"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"old_logp": [0.0] * 3}, TypeError, "old_logp must be a tensor, got list"),
        ({"kind": torch.tensor([0, 1, 2])}, ValueError, "kind must lie in 0..1, got 2"),
        ({"branch": torch.tensor([0, -1, 1])}, ValueError, "branch must lie in 0..1, got -1"),
        ({"component": torch.full((3,), N_COMPONENTS)}, ValueError, "component must lie in 0..7, got 8"),
        ({"weight": torch.tensor([0.0, -0.5, 1.0])}, ValueError, "weight must be finite and not negative; the sign"),
        ({"weight": torch.tensor([0.0, float("nan"), 1.0])}, ValueError, "weight must be finite and not negative"),
        ({"weight": torch.tensor([0.0, float("inf"), 1.0])}, ValueError, "weight must be finite and not negative"),
        ({"ref_logp": torch.ones(3, device="meta")}, ValueError, "ref_logp is on meta but target is on cpu"),
    ],
)
def test_bad_fields_are_one_clear_error(change, error, message) -> None:
    with pytest.raises(error, match=message):
        replace(make_terms(), **change)
