from __future__ import annotations

import pytest
import torch

from pact_kernels import cotrain_loss, linear_cotrain_loss, linear_logprob
from pact_kernels.backend import NAMES, resolve_backend
from pact_kernels.terms import TokenTerms


def test_auto_takes_the_best_that_was_built() -> None:
    assert resolve_backend("linear_logprob", "auto", ("torch",)) == "torch"
    assert resolve_backend("linear_logprob", "auto", ("triton", "torch")) == "triton"
    assert resolve_backend("linear_logprob", "torch", ("triton", "torch")) == "torch"


@pytest.mark.parametrize("op", NAMES)
def test_a_known_backend_that_was_not_built_is_an_error(op: str) -> None:
    with pytest.raises(RuntimeError, match=f"{op}: this build has no triton kernel .* use backend='auto' or 'torch'"):
        resolve_backend(op, "triton", ("torch",))


def test_an_unknown_backend_names_the_choices() -> None:
    with pytest.raises(ValueError, match="unknown backend 'flash'; choose one of 'auto', 'triton', 'torch'"):
        resolve_backend("linear_logprob", "flash", ("torch",))


def test_each_operation_checks_its_backend_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pact_kernels.backend.INTERPRETED", False)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    hidden, weight = torch.ones(1, 2), torch.ones(3, 2)
    terms = TokenTerms(zero, one, one, one, zero)
    calls = {
        "linear_logprob": lambda: linear_logprob(hidden, weight, zero, backend="triton"),
        "cotrain_loss": lambda: cotrain_loss(one, terms, backend="triton"),
        "linear_cotrain_loss": lambda: linear_cotrain_loss(hidden, weight, terms, backend="triton"),
    }
    for op, call in calls.items():
        with pytest.raises(RuntimeError, match=f"^{op}: the triton backend needs tensors on a GPU and got cpu: move"):
            call()


def test_public_names_are_functions_even_where_a_folder_has_the_same_name() -> None:
    import pact_kernels

    for name in pact_kernels.__all__:
        assert callable(getattr(pact_kernels, name)), name
