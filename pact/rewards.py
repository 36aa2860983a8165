"""What an attempt is worth: FTRL's solving metrics and reward, ToolRL, MatchTIR, answer F1. Pure functions.

A call is ``{"name": str, "arguments": dict}``. Nothing here runs a tool or parses calls out of a model's text.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from pact.own_reward import OwnReward

Call = Mapping[str, Any]
REWARDS = ("env", "solve_f1", "toolrl", "matchtir", "answer_f1")
ASSIGNMENTS = ("optimal", "greedy", "transport")

_SPACES_FOR_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def answer_verify(observation: str, gold: str) -> bool:
    """FTRL's rule (arXiv 2508.08791, released code): every part of ``gold``, split at ', ', occurs in ``observation``.

    Both sides lose case, commas and outer blanks first; "occurs" means as a substring.

    >>> answer_verify("The capital is PARIS, in France.", "Paris, France")
    True
    """
    text = _plain(observation)
    return all(_plain(part) in text for part in gold.split(", "))


def strike(unsolved: dict[str, list[str]], name: str, observation: str) -> bool:
    """Let one call strike the first expected answer under its own tool name that ``observation`` verifies.

    Removes it from ``unsolved`` (tool name -> expected answers still open) and says whether there was one.
    """
    for answer in unsolved.get(name, []):
        if answer_verify(observation, answer):
            unsolved[name].remove(answer)
            return True
    return False


def failed(observation: str) -> bool:
    """Whether an observation is the error of a call, in FTRL's wording."""
    return observation.startswith("an error occured when call")


def solve_metrics(solved: int, calls: int, expected: int) -> dict[str, float]:
    """FTRL's metrics of one item: Solve-P = s/c (1 without calls), Solve-R = s/u, Solve-F1 = 2s/(c+u).

    Args:
        solved: expected answers struck, s. calls: calls the model made, c. expected: expected answers, u, at least 1.

    >>> solve_metrics(solved=1, calls=2, expected=2)
    {'solve_p': 0.5, 'solve_r': 0.5, 'solve_f1': 0.5}
    """
    if expected < 1 or not 0 <= solved <= min(calls, expected):
        raise ValueError(f"no such score: {solved} solved by {calls} calls of {expected} expected answers")
    return {
        "solve_p": solved / calls if calls else 1.0,
        "solve_r": solved / expected,
        "solve_f1": 2 * solved / (calls + expected),
    }


def solve_f1_reward(solved: int, calls: int, expected: int, text: str, answer: str, solve_rate: float = 0.0) -> float:
    """FTRL's training reward of one step (arXiv 2508.08791, released ``compute_solve_f1``), the first case that holds:

    calls were made: 2s / (c + 1), s and c those of this step; ``text`` is blank: -0.5; it holds a tag of a tool call
    (one that could not be read): -0.3; it contains ``answer`` (without case and commas): 1 / (1 + u); everything was
    solved before (``solve_rate`` = 1): 0.5; otherwise 0.

    Args:
        solved: expected answers struck in this step, s. calls: well-formed calls of this step, c. expected: expected
            answers still open before it, u.
        text: what the policy wrote after its reasoning. answer: the gold final answer.
        solve_rate: share of the task's expected answers struck before this step.
    """
    if not 0 <= solved <= min(calls, expected):
        raise ValueError(f"no such step: {solved} solved by {calls} calls of {expected} expected answers")
    if calls:
        return 2 * solved / (calls + 1)
    if not text.strip():
        return -0.5
    if "<tool_call>" in text or "</tool_call>" in text:
        return -0.3
    if _plain(answer) in _plain(text):
        return 1 / (1 + expected)
    return 0.5 if solve_rate == 1.0 else 0.0


def answer_f1(text: str, gold: str, tags: bool = True) -> float:
    """Token-set F1 between the first ``<answer>...</answer>`` of ``text`` and ``gold`` (MatchTIR, arXiv 2601.10712).

    Lower-cased, punctuation turned into spaces, split at blanks; 0 without the tag or without a common token.
    ``tags=False`` compares all of ``text``.

    >>> answer_f1("<answer>the city of Lyon</answer>", "Lyon")
    0.4
    """
    found = _ANSWER.search(text) if tags else None
    if tags and found is None:
        return 0.0
    predicted, expected = _words(found.group(1) if found else text), _words(gold)
    common = len(predicted & expected)
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def answer_match(text: str, gold: str) -> float:
    """1 when the answer in ``text`` is ``gold``, else 0: equal without case, commas, outer blanks and a last full stop,
    or two numbers of the same value. The answer is what the last ``<answer>...</answer>`` holds, else all of ``text``.

    >>> answer_match("So: <answer>1,234.0</answer>", "1234")
    1.0
    >>> answer_match("It is Lyon, I think.", "Lyon")
    0.0
    """
    said, wanted = (_plain((_ANSWER.findall(one) or [one])[-1]).removesuffix(".") for one in (text, gold))
    try:
        return float(said == wanted or float(said) == float(wanted))
    except ValueError:  # not both are numbers
        return 0.0


def call_similarity(predicted: Call, gold: Call) -> float:
    """MatchTIR's similarity of two calls (arXiv 2601.10712), 0..1.

    0 when the names differ (ignoring case), else (1 + Jaccard of the argument names + gold arguments with an equal
    value) / (2 + number of gold arguments). Two calls without arguments have Jaccard 1.

    >>> gold = {"name": "add", "arguments": {"a": 1, "b": 2}}
    >>> call_similarity({"name": "add", "arguments": {"a": 1, "b": 3}}, gold)
    0.75
    """
    if predicted["name"].lower() != gold["name"].lower():
        return 0.0
    mine, theirs = predicted["arguments"], gold["arguments"]
    return (1 + _jaccard(mine, theirs) + _equal_values(mine, theirs)) / (2 + len(theirs))


def toolrl_correctness(pred_calls: Sequence[Call], gold_calls: Sequence[Call]) -> float:
    """ToolRL's correctness reward, -3..3 (arXiv 2504.13958, section 3.3; released ``compute_tool_call_reward``).

    6 R / R_max - 3, with R = Jaccard of the two multisets of tool names + for each gold call, in order, the best call
    of the same name not yet taken: Jaccard of the argument names + gold arguments with an equal value; R_max = 1 + sum
    over the gold calls of (1 + number of arguments). No call where some are due is -3; nothing due is 0, whatever was
    called.

    >>> gold = [{"name": "add", "arguments": {"a": 1, "b": 2}}]
    >>> toolrl_correctness(gold, gold), toolrl_correctness([], gold)
    (3.0, -3.0)
    """
    if not gold_calls:
        return 0.0
    score = _jaccard((call["name"] for call in pred_calls), (call["name"] for call in gold_calls))
    left = list(pred_calls)
    for gold in gold_calls:
        matches = [
            (_jaccard(call["arguments"], gold["arguments"]) + _equal_values(call["arguments"], gold["arguments"]), i)
            for i, call in enumerate(left)
            if call["name"] == gold["name"]
        ]
        best, place = max(matches, key=lambda match: match[0], default=(0.0, -1))
        if best > 0:
            score += best
            del left[place]
    return 6 * score / (1 + sum(1 + len(gold["arguments"]) for gold in gold_calls)) - 3


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

    >>> gold = [{"name": "add", "arguments": {"a": 1}}, {"name": "sub", "arguments": {"a": 1}}]
    >>> match_rewards([gold[1], {"name": "mul", "arguments": {}}], gold, unmatched=-0.5)
    [1.0, -0.5]

    Raises:
        ValueError: an unknown ``assignment``.
    """
    if assignment not in ASSIGNMENTS:
        raise ValueError(f"assignment must be one of {', '.join(ASSIGNMENTS)}, got {assignment!r}")
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


def transport_plan(similarity_PG: NDArray[np.float64], reg: float = 0.1) -> NDArray[np.float64]:
    """Entropic transport between uniform marginals with cost -S: argmin_T -<T, S> - reg H(T), rows 1/P, columns 1/G.

    POT's ``ot.sinkhorn`` as MatchTIR's release calls it: at most 1,000 steps, or until the columns are within 1e-9. A
    plan that is not there by then keeps exact rows, so that no call gains or loses weight.

    Args:
        similarity_PG: [P, G] similarities, 0..1, P and G at least 1.
        reg: weight of the entropy; below about 0.002 the exponentials leave the range of float64.

    Returns:
        T, [P, G] float64.

    Raises:
        ValueError: similarities outside 0..1.
        RuntimeError: POT is not installed.
    """
    if not ((similarity_PG >= 0) & (similarity_PG <= 1)).all():
        raise ValueError("similarities must lie in 0..1")
    _check_pot()
    import ot  # takes seconds, and only the transport needs it

    n_rows, n_columns = similarity_PG.shape
    uniform = (np.full(n_rows, 1 / n_rows), np.full(n_columns, 1 / n_columns))
    return ot.sinkhorn(*uniform, -similarity_PG, reg=reg, warn=False)


@dataclass(frozen=True)
class Turn:
    """One assistant turn as the rewards read it; only ``observations`` were written by tools.

    ``text``: what the policy wrote after its reasoning, without the end-of-turn token. ``calls``: those of it that
    could be read. ``observations``: what they returned, in order; fewer where the episode ended first.
    ``well_formed``: the turn ended by itself, closed its reasoning once, and every call in it could be read.
    """

    text: str
    calls: Sequence[Call]
    observations: Sequence[str]
    well_formed: bool


@dataclass(frozen=True)
class Gold:
    """What attempts at one task are compared with; None where the task has none.

    ``calls``: the supervised calls of the expert trace. ``answer``: the final answer, without tags. ``expected``: tool
    name -> answers that its calls should bring (FTRL's ``unsolved_set``).
    """

    calls: Sequence[Call] | None = None
    answer: str | None = None
    expected: Mapping[str, Sequence[str]] | None = None


_NEEDS = {
    "env": (),
    "solve_f1": ("expected", "answer"),
    "toolrl": ("calls",),
    "matchtir": ("calls", "answer"),
    "answer_f1": ("answer",),
}


@dataclass(frozen=True)
class Reward:
    """A training reward by name, with its settings. It never changes what an evaluation reports.

    - "env": the environment's own.
    - "solve_f1": FTRL's. The reward is ``solve_f1_reward`` of the whole episode as one step (as MatchTIR's release runs
      FTRL's multi-turn); turn rewards are FTRL's own steps: each turn with the answers still open before it.
    - "toolrl": ``toolrl_correctness`` of all calls of the episode, on its last turn.
    - "matchtir": ``match_rewards`` of all calls of the episode; turn reward = mean over the turn's calls, of a last
      turn without calls ``answer_f1``; the reward is their sum. As in the release a call that cannot be read is
      skipped: it counts nowhere. Not kept: there a turn that holds an ``<answer>`` loses its calls.
    - "answer_f1": ``answer_f1`` of the last turn, 0 where that makes calls.
    - ``FILE.py:NAME`` (``package.module:NAME``): a function of the user, ``pact.own_reward.OwnReward``.

    Args:
        match_assignment: "optimal" | "greedy" | "transport" (see ``match_rewards``).
        match_unmatched: what a call without partner gets.
        format_weight: times ``well_formed``, added to the reward and to the last turn's; None: 1 for toolrl, which
            has this term (0 or 1) in the paper, 0 for the others.
        answer_tags: the answer is what stands in ``<answer>...</answer>``; False: all of the last turn's text.

    Raises:
        ValueError: an unknown name or assignment, a function that cannot be a reward, a number that is not finite.
        RuntimeError: the assignment is "transport" and POT is not installed.
    """

    name: str = "env"
    match_assignment: str = "optimal"
    match_unmatched: float = 0.0
    format_weight: float | None = None
    answer_tags: bool = True
    own: OwnReward | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        if ":" in self.name:
            object.__setattr__(self, "own", OwnReward.load(self.name))
        elif self.name not in REWARDS:
            raise ValueError(
                f"unknown reward {self.name!r}: choose one of {', '.join(REWARDS)}, or FILE.py:NAME of your function"
            )
        if self.match_assignment not in ASSIGNMENTS:
            raise ValueError(
                f"unknown match_assignment {self.match_assignment!r}: choose one of {', '.join(ASSIGNMENTS)}"
            )
        for setting in ("match_unmatched", "format_weight"):
            value = getattr(self, setting)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{setting} is {value}: set it to a finite number")
        if self.name == "matchtir" and self.match_assignment == "transport":
            _check_pot()

    @property
    def is_own(self) -> bool:
        """Whether the environment's score stands as it is."""
        return self.name == "env" and not self.format_weight

    def missing(self, gold: Gold) -> list[str]:
        """Which fields of ``gold`` this reward needs and does not find."""
        found = {"calls": gold.calls, "answer": gold.answer, "expected": any((gold.expected or {}).values()) or None}
        return [need for need in _NEEDS.get(self.name, ()) if found[need] is None]

    def of(
        self,
        turns: Sequence[Turn],
        gold: Gold,
        own: tuple[float, Sequence[float]],
        task: Any = None,
        messages: Sequence[Mapping[str, Any]] = (),
    ) -> tuple[float, list[float]]:
        """(reward, turn rewards) of one episode.

        Args:
            turns: its assistant turns, at least one.
            own: reward and turn rewards of the environment.
            task, messages: the task and what followed its prompt; only functions of the user read them.
        """
        reward, turn_rewards = own[0], list(own[1])
        if not turns:
            raise ValueError("an episode without turns earns nothing: rewards are of episodes that were sampled")
        if self.own is not None:
            calls = [call for turn in turns for call in turn.calls]
            values = {"task": task, "messages": messages, "turns": turns, "calls": calls, "env_reward": own[0]}
            reward, turn_rewards = self.own.of(task.id, len(turns), values)
        elif self.name == "solve_f1":
            reward, turn_rewards = _solve_f1(turns, gold)
        elif self.name == "matchtir":
            turn_rewards = self._matched(turns, gold)
            reward = math.fsum(turn_rewards)
        elif self.name != "env":
            calls = [call for turn in turns for call in turn.calls]
            reward = toolrl_correctness(calls, gold.calls or ()) if self.name == "toolrl" else self._answer(turns, gold)
            turn_rewards = [0.0] * (len(turns) - 1) + [reward]
        weight = float(self.name == "toolrl") if self.format_weight is None else self.format_weight
        if weight and turn_rewards:
            bonus = weight * well_formed(turns, self.answer_tags)
            reward, turn_rewards[-1] = reward + bonus, turn_rewards[-1] + bonus
        return reward, turn_rewards

    def _matched(self, turns: Sequence[Turn], gold: Gold) -> list[float]:
        calls = [call for turn in turns for call in turn.calls]
        matched = iter(match_rewards(calls, gold.calls or (), self.match_assignment, self.match_unmatched))
        rewards = [sum(islice(matched, len(turn.calls))) / max(len(turn.calls), 1) for turn in turns]
        if not turns[-1].calls:
            rewards[-1] = self._answer(turns, gold)
        return rewards

    def _answer(self, turns: Sequence[Turn], gold: Gold) -> float:
        last = turns[-1]
        return 0.0 if last.calls else answer_f1(last.text, gold.answer or "", self.answer_tags)


def well_formed(turns: Sequence[Turn], answer_tags: bool = True) -> bool:
    """The format term (after ToolRL, arXiv 2504.13958): every turn is well-formed and the last one is an answer.

    An answer makes no call and has text; with ``answer_tags`` exactly one ``<answer>...</answer>``.
    """
    last = turns[-1]
    answered = not last.calls and bool(last.text.strip())
    tagged = len(_ANSWER.findall(last.text)) == 1 == last.text.count("<answer>") == last.text.count("</answer>")
    return answered and (tagged or not answer_tags) and all(turn.well_formed for turn in turns)


def _solve_f1(turns: Sequence[Turn], gold: Gold) -> tuple[float, list[float]]:
    unsolved = {name: list(answers) for name, answers in (gold.expected or {}).items()}
    total = still_open = sum(map(len, unsolved.values()))
    steps = []
    for turn in turns:
        # An error may quote the answer out of the call's own arguments: in training that must not pay.
        ended = [(call, seen) for call, seen in zip(turn.calls, turn.observations) if not failed(seen)]
        struck = sum(strike(unsolved, call["name"], seen) for call, seen in ended)
        rate = 1 - still_open / total
        steps.append(solve_f1_reward(struck, len(turn.calls), still_open, turn.text, gold.answer or "", rate))
        still_open -= struck
    calls = sum(len(turn.calls) for turn in turns)
    text = "\n".join(turn.text for turn in turns)
    return solve_f1_reward(total - still_open, calls, total, text, gold.answer or ""), steps


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


def _check_pot() -> None:
    if find_spec("ot") is None:
        raise RuntimeError("match_assignment transport needs POT: pip install 'pact-kernels[train]'")


def _plain(text: str) -> str:
    return text.lower().replace(",", "").strip()


def _jaccard(first: Iterable[str], second: Iterable[str]) -> float:
    """Of two multisets; two empty ones are equal."""
    one, other = Counter(iter(first)), Counter(iter(second))  # of a mapping: its keys
    union = (one | other).total()
    return (one & other).total() / union if union else 1.0


def _equal_values(arguments: Mapping[str, Any], gold: Mapping[str, Any]) -> int:
    return sum(key in arguments and arguments[key] == value for key, value in gold.items())
