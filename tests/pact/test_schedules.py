"""Schedules: the closed forms at chosen points, and what must hold for every trace."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pact.schedules import (
    REASONING_ANNEALS,
    check_progress,
    linear,
    reasoning_weights,
    segment_weights,
    supervised_segments,
    token_weights,
    warmup_cosine,
)

blocks = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), max_size=4)


def spread(lengths_per_block):
    """Segment indices of blocks whose segments have the given token counts, one other token between blocks."""
    segment = [-1]
    for lengths in lengths_per_block:
        for i, length in enumerate(lengths):
            segment += [i] * length
        segment.append(-1)
    return segment


@pytest.mark.parametrize(
    ("n", "progress", "expected"),
    [(10, 0.0, 10), (10, 0.3, 7), (10, 0.7, 3), (10, 1.0, 0), (3, 0.5, 2), (1, 0.999, 1), (0, 0.5, 0), (7, 0.7, 3)],
)
def test_supervised_segments(n, progress, expected):
    assert supervised_segments(n, progress) == expected


@pytest.mark.parametrize("tenths", range(11))
@pytest.mark.parametrize("n", [10, 20, 30])
def test_no_rounding_adds_a_segment(n, tenths):
    assert supervised_segments(n, tenths / 10) == n * (10 - tenths) // 10


def test_linear_runs_from_start_to_end():
    assert [linear(0.8, 0.2, s) for s in (0.0, 0.5, 1.0)] == pytest.approx([0.8, 0.5, 0.2])


def test_each_block_is_annealed_by_its_own_length():
    segment = [-1, 0, 0, 1, 2, 3, -1, -1, 0, 1, 1, -1]
    assert segment_weights(segment, 0.5).tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0]


def test_a_falling_index_starts_a_block():
    assert segment_weights([0, 1, 0, 1], 0.5).tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("segment", [[], [-1, -1]])
def test_without_reasoning_there_is_no_weight(segment):
    assert segment_weights(segment, 0.0).tolist() == [0.0] * len(segment)


@settings(max_examples=50, deadline=None)
@given(blocks, st.floats(0, 1), st.floats(0, 1))
def test_the_supervised_prefix_only_shrinks(lengths_per_block, one, other):
    early, late = sorted((one, other))
    segment = np.array(spread(lengths_per_block))
    before, after = segment_weights(segment, early), segment_weights(segment, late)
    assert (after <= before).all()
    assert (before[segment < 0] == 0).all()
    assert (segment_weights(segment, 0.0) == (segment >= 0)).all()
    assert (segment_weights(segment, 1.0) == 0).all()


@settings(max_examples=50, deadline=None)
@given(blocks, st.floats(0, 1))
def test_segment_weights_follow_the_formula(lengths_per_block, progress):
    expected = [0.0]
    for lengths in lengths_per_block:
        kept = math.ceil((1 - progress) * len(lengths) - 1e-9)
        for i, length in enumerate(lengths):
            expected += [float(i < kept)] * length
        expected.append(0.0)
    assert segment_weights(spread(lengths_per_block), progress).tolist() == expected


@pytest.mark.parametrize(
    ("segment", "progress", "expected"),
    [
        ([-1, 0, 0, 0, 1, -1], 0.0, [0, 1, 1, 1, 1, 0]),
        ([-1, 0, 0, 0, 1, -1], 0.5, [0, 1, 1, 0, 0, 0]),  # the boundary falls inside segment 0
        ([-1, 0, 0, 0, 1, -1], 1.0, [0, 0, 0, 0, 0, 0]),
        ([0, 1, 1, -1, 0, 0, 0], 0.5, [1, 1, 0, 0, 1, 1, 0]),  # each block by its own length
        ([0, 1, 1, 1, 0, 0], 0.5, [1, 1, 0, 0, 1, 0]),  # an index that falls starts a block
        ([1, 0, 0, 0], 0.5, [1, 1, 1, 0]),  # also behind a block of one token
        ([2, 2, 2, 2], 0.5, [1, 1, 0, 0]),  # tokens are counted, not indices
        ([0] * 10, 0.7, [1] * 3 + [0] * 7),  # (1 - 0.7) * 10 is 3.0000000000000004
        ([0], 0.999, [1]),
    ],
)
def test_token_by_token_the_prefix_of_a_block_shrinks(segment, progress, expected):
    assert token_weights(segment, progress).tolist() == expected
    assert reasoning_weights(segment, progress, "token").tolist() == expected


@settings(max_examples=50, deadline=None)
@given(blocks, st.floats(0, 1))
def test_token_weights_follow_the_formula(lengths_per_block, progress):
    expected = [0.0]
    for lengths in lengths_per_block:
        kept = math.ceil((1 - progress) * sum(lengths) - 1e-9)
        expected += [1.0] * kept + [0.0] * (sum(lengths) - kept) + [0.0]
    assert token_weights(spread(lengths_per_block), progress).tolist() == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1), max_size=4), st.floats(0, 1))
def test_where_every_token_is_a_segment_both_ways_agree(runs, progress):
    segment = [index for run in runs for index in [*range(len(run)), -1]]
    assert (token_weights(segment, progress) == segment_weights(segment, progress)).all()


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("anneal", REASONING_ANNEALS)
def test_no_way_to_anneal_gives_weight_outside_reasoning(anneal, progress):
    assert reasoning_weights([], progress, anneal).tolist() == []
    assert reasoning_weights([-1, -1], progress, anneal).tolist() == [0, 0]


def test_other_ways_to_anneal_reasoning():
    segment = [-1, 0, 1, 1]
    assert reasoning_weights(segment, 0.75, "linear").tolist() == [0, 0.25, 0.25, 0.25]
    assert reasoning_weights(segment, 0.75, "none").tolist() == [0, 1, 1, 1]
    assert reasoning_weights(segment, 0.75, "segment").tolist() == [0, 1, 0, 0]
    assert reasoning_weights(segment, 0.6, "token").tolist() == [0, 1, 1, 0]
    assert [reasoning_weights(segment, s, "off").tolist() for s in (0.0, 0.5, 1.0)] == [[0, 0, 0, 0]] * 3
    with pytest.raises(ValueError, match="reasoning_anneal='cosine'"):
        reasoning_weights(segment, 0.5, "cosine")


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan])
def test_progress_outside_the_run_is_an_error(progress):
    with pytest.raises(ValueError, match="progress"):
        check_progress(progress)


def mu_by_steps(step, warmup_steps, decay_steps, peak, valley):
    """CHORD's schedule as its release has it: in optimiser steps."""
    if step < warmup_steps:
        return step / warmup_steps * peak
    if step >= warmup_steps + decay_steps:
        return valley
    return (peak - valley) * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / decay_steps)) + valley


@pytest.mark.parametrize(
    ("warmup", "decay", "peak", "valley"),
    [(0, 200, 0.9, 0.05), (200, 400, 0.5, 0.02), (0, 0, 0.1, 0.1), (10, 0, 0.9, 0.1), (0, 600, 1.0, 0.0)],
)
def test_warmup_cosine_is_the_released_schedule(warmup, decay, peak, valley):
    for step in range(0, 601, 7):
        ours = warmup_cosine(step / 600, warmup / 600, decay / 600, peak, valley)
        assert ours == pytest.approx(mu_by_steps(step, warmup, decay, peak, valley), abs=1e-12)


def test_warmup_cosine_at_its_corners():
    mu = [warmup_cosine(s, 0.2, 0.4, 0.9, 0.1) for s in (0.0, 0.1, 0.2, 0.4, 0.6, 1.0)]
    assert mu == pytest.approx([0.0, 0.45, 0.9, 0.5, 0.1, 0.1])
