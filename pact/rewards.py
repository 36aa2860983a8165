"""What an attempt is worth: FTRL's solving metrics, MatchTIR's call matching, answer F1. Pure functions.

A call is ``{"name": str, "arguments": dict}``. Nothing here runs a tool or parses a model's text.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.special import logsumexp

Call = Mapping[str, Any]

_SPACES_FOR_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def answer_verify(observation: str, gold: str) -> bool:
    """FTRL's rule (arXiv 2508.08791, released code): every part of ``gold``, split at ', ', occurs in ``observation``.

    Both sides lose case, commas and outer blanks first; "occurs" means as a substring.
    """
    text = observation.lower().replace(",", "").strip()
    return all(part.lower().replace(",", "").strip() in text for part in gold.split(", "))


def strike(unsolved: dict[str, list[str]], name: str, observation: str) -> bool:
    """Let one call strike the first expected answer under its own tool name that ``observation`` verifies.

    Removes it from ``unsolved`` (tool name -> expected answers still open) and says whether there was one.
    """
    for answer in unsolved.get(name, []):
        if answer_verify(observation, answer):
            unsolved[name].remove(answer)
            return True
    return False


def solve_metrics(solved: int, calls: int, expected: int) -> dict[str, float]:
    """FTRL's metrics of one item: Solve-P = s/c (1 without calls), Solve-R = s/u, Solve-F1 = 2s/(c+u).

    Args:
        solved: expected answers struck, s. calls: calls the model made, c. expected: expected answers, u, at least 1.
    """
    if expected < 1 or not 0 <= solved <= min(calls, expected):
        raise ValueError(f"no such score: {solved} solved by {calls} calls of {expected} expected answers")
    return {
        "solve_p": solved / calls if calls else 1.0,
        "solve_r": solved / expected,
        "solve_f1": 2 * solved / (calls + expected),
    }


def answer_f1(text: str, gold: str) -> float:
    """Token-set F1 between the first ``<answer>...</answer>`` of ``text`` and ``gold`` (MatchTIR, arXiv 2601.10712).

    Lower-cased, punctuation turned into spaces, split at blanks; 0 without the tag or without a common token.
    """
    found = _ANSWER.search(text)
    if found is None:
        return 0.0
    predicted, expected = _words(found.group(1)), _words(gold)
    common = len(predicted & expected)
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def call_similarity(predicted: Call, gold: Call) -> float:
    """MatchTIR's similarity of two calls (arXiv 2601.10712), 0..1.

    0 when the names differ (ignoring case), else (1 + Jaccard of the argument names + gold arguments with an equal
    value) / (2 + number of gold arguments). Two calls without arguments have Jaccard 1.
    """
    if predicted["name"].lower() != gold["name"].lower():
        return 0.0
    mine, theirs = predicted["arguments"], gold["arguments"]
    names = mine.keys() | theirs.keys()
    jaccard = len(mine.keys() & theirs.keys()) / len(names) if names else 1.0
    equal = sum(key in mine and mine[key] == value for key, value in theirs.items())
    return (1 + jaccard + equal) / (2 + len(theirs))


def match_rewards(
    pred_calls: Sequence[Call], gold_calls: Sequence[Call], assignment: str = "optimal", unmatched: float = 0.0
) -> list[float]:
    """One reward for each call of an attempt: how well it matches the call of the gold trace that it is assigned.

    With S_ij = ``call_similarity`` of call i and gold call j (MatchTIR, arXiv 2601.10712):

    - "optimal": the one-to-one assignment of greatest total S (the paper's Hungarian "KM"); reward_i = S_i,match(i).
    - "greedy": pairs by descending S, ties in order of i, then j (MatchTIR's released code).
    - "transport": reward_i = sum_j T_ij S_ij under the plan T of ``transport_plan`` (the paper's "OT").

    A call without a partner, or with one it shares nothing with (S = 0), gets ``unmatched``; under "transport" every
    call has a share, so that only an empty gold trace leaves calls unmatched.

    Raises:
        ValueError: an unknown ``assignment``.
    """
    if assignment not in ("optimal", "greedy", "transport"):
        raise ValueError(f"assignment must be 'optimal', 'greedy' or 'transport', got {assignment!r}")
    if not pred_calls or not gold_calls:
        return [unmatched] * len(pred_calls)
    similarity_PG = np.array([[call_similarity(pred, gold) for gold in gold_calls] for pred in pred_calls])
    if assignment == "transport":
        return (transport_plan(similarity_PG) * similarity_PG).sum(axis=1).tolist()
    if assignment == "optimal":
        pairs = list(zip(*linear_sum_assignment(similarity_PG, maximize=True), strict=True))
    else:
        pairs = _greedy_pairs(similarity_PG)
    rewards = [unmatched] * len(pred_calls)
    for i, j in pairs:
        if similarity_PG[i, j] > 0:
            rewards[i] = float(similarity_PG[i, j])
    return rewards


def transport_plan(
    similarity_PG: NDArray[np.float64], reg: float = 0.1, tolerance: float = 1e-9, max_steps: int = 1000
) -> NDArray[np.float64]:
    """Entropic transport between uniform marginals with cost -S: argmin_T -<T, S> - reg H(T), rows 1/P, columns 1/G.

    Sinkhorn in the log domain; stops when the row marginals are within ``tolerance`` (absolute, summed) or after
    ``max_steps``; ``reg``, ``tolerance`` and ``max_steps`` are those of MatchTIR's call to POT.

    Args:
        similarity_PG: [P, G] finite similarities, P and G at least 1.

    Returns:
        T, [P, G] float64; its columns are exact, its rows within ``tolerance``.
    """
    scaled_PG = similarity_PG / reg
    n_rows, n_columns = scaled_PG.shape
    row_P, column_G = np.zeros(n_rows), np.zeros(n_columns)
    for _ in range(max_steps):
        row_P = -np.log(n_rows) - logsumexp(scaled_PG + column_G, axis=1)
        column_G = -np.log(n_columns) - logsumexp(scaled_PG + row_P[:, None], axis=0)
        plan_PG = np.exp(scaled_PG + row_P[:, None] + column_G)
        if np.abs(plan_PG.sum(axis=1) - 1 / n_rows).sum() < tolerance:
            break
    return plan_PG


def _greedy_pairs(similarity_PG: NDArray[np.float64]) -> list[tuple[int, int]]:
    n_columns = similarity_PG.shape[1]
    taken_rows: set[int] = set()
    taken_columns: set[int] = set()
    pairs = []
    for flat in np.argsort(-similarity_PG, axis=None, kind="stable").tolist():
        i, j = divmod(flat, n_columns)
        if i not in taken_rows and j not in taken_columns:
            taken_rows.add(i)
            taken_columns.add(j)
            pairs.append((i, j))
    return pairs


def _words(text: str) -> set[str]:
    return set(text.lower().translate(_SPACES_FOR_PUNCTUATION).split())
