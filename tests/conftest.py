"""What every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when kernels are decorated: before anything imports them
    os.environ["TRITON_INTERPRET"] = "1"

try:
    from hypothesis import settings
except ImportError:  # `make gpu` runs the kernel tests on machines without it; sweeps import it themselves
    pass
else:
    settings.register_profile("pact", deadline=None)  # a busy machine is no failure
    settings.load_profile("pact")


@pytest.fixture(autouse=True)
def nan_filled_empty() -> Iterator[None]:
    """torch.empty and its kin come filled with NaN (integers: the largest), so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
