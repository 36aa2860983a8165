"""A few cases of the sweep, other ones than `make sweep` draws."""

from __future__ import annotations

import pytest
from head_sweep import launch, share


def test_a_few_random_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "BUDGET", launch.BUDGET)  # put back what the cases change
    monkeypatch.setattr(launch, "SPLIT_COLUMNS", launch.SPLIT_COLUMNS)
    assert share(60, seed=10**6) == 60
