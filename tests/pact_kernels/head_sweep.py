"""Random cases of the head kernels by the error rule, drawn by hypothesis.

`make test` runs a few through ``test_head_sweep.py``; `make sweep` runs 10,000 and records the result:
``python tests/pact_kernels/head_sweep.py --cases 10000``.
"""

from __future__ import annotations

from functools import partial

import torch
from hypothesis import strategies as st
from oracles import DEVICE
from sweeping import main, sweep
from test_cotrain_loss import make_terms, to_double
from test_cotrain_loss_triton import check_fused
from test_linear_logprob import Problem

from pact_kernels import linear_logprob
from pact_kernels.cotrain_loss.reference import cotrain_loss_reference
from pact_kernels.linear_logprob import launch

FLAG = st.booleans()
CASES = st.fixed_dictionaries(
    {
        "n": st.integers(1, 36),
        "width": st.integers(1, 40),
        "vocab": st.integers(2, 140),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "spread": st.sampled_from([1e-3, 0.3, 1.0, 3.0, 10.0, 30.0]),
        "shift": st.sampled_from([0.0, 0.0, 0.0, -1000.0]),
        "repeats": FLAG,
        "bias": FLAG,
        "temperature": FLAG,
        "softcap": st.sampled_from([None, None, 0.5, 2.0, 50.0]),
        "entropy": FLAG,
        "kl_coef": st.sampled_from([0.0, 0.05]),
        "entropy_coef": st.sampled_from([0.0, 0.02]),
        "split": st.sampled_from([64, 128, 2048]),
        "chunk": st.sampled_from([1, 2, 99]),
        "seed": st.integers(0, 2**16),
    }
)


def check(case: dict) -> None:
    """Forward and backward of linear_logprob and of linear_cotrain_loss, with splits and chunks of the case's sizes."""
    case = dict(case)
    kl_coef, entropy_coef, chunk = (case.pop(name) for name in ("kl_coef", "entropy_coef", "chunk"))
    tile = launch.HEAD_TILES["interpreter"][4].block_n
    launch.SPLIT_COLUMNS = case.pop("split")
    launch.BUDGET = launch.ChunkBudget(dlogits=chunk * tile * case["vocab"] * case["dtype"].itemsize)
    if case.pop("repeats"):
        case["r"] = max(1, case["n"] // 3)
    n, width, vocab = (case.pop(name) for name in ("n", "width", "vocab"))
    problem = Problem.random(n, width, vocab, **case).to(DEVICE)
    problem.check(partial(linear_logprob, backend="triton"), problem.scale())

    terms = make_terms(problem.exact_logp().float().cpu(), problem.target.cpu(), seed=case["seed"]).to(DEVICE)
    options = {"clip_low": 0.15, "clip_high": 0.3, "kl_coef": kl_coef, "entropy_coef": entropy_coef, "clip_dual": 1.5}
    logp = problem.exact_logp().requires_grad_()
    entropy = torch.zeros_like(logp).requires_grad_()
    loss = cotrain_loss_reference(logp, to_double(terms), entropy=entropy, **options).loss
    problem.c, problem.e = torch.autograd.grad(3 * loss, (logp, entropy))
    head = {name: getattr(problem, name) for name in ("hidden", "weight", "rows", "bias", "softcap", "temperature")}
    check_fused(head, problem.target, terms, options, problem.scale())


def share(cases: int, seed: int) -> int:
    """One process's part."""
    return sweep(check, CASES, cases, seed)


if __name__ == "__main__":
    main("head_sweep", share, __doc__)
