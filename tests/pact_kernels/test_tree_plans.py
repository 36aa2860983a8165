"""Plans of trees: kept by storage, dropped with it; what is no tree is refused."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pact_kernels.prefix_tree import PrefixTree
from pact_kernels.tree_attention.plans import Plans, check_tree


def is_tree(end: list[int]) -> bool:
    n = len(end)
    if not all(i < e <= n for i, e in enumerate(end)):
        return False
    return all(end[j] <= end[i] for i in range(n) for j in range(i + 1, end[i]))


@given(st.integers(1, 9).flatmap(lambda n: st.lists(st.integers(0, n + 1), min_size=n, max_size=n)))
def test_refuses_what_is_no_tree(end: list[int]) -> None:
    tensor = torch.tensor(end, dtype=torch.int32)
    if is_tree(end):
        check_tree(tensor)
    else:
        with pytest.raises(ValueError, match=r"subtree_end is no tree.*PrefixTree.from_sequences"):
            check_tree(tensor)


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=12),
    st.integers(0, 10**6),
    st.integers(-2, 2),
)
def test_trees_pass_and_a_changed_end_does_not(sequences, where: int, change: int) -> None:
    end = PrefixTree.from_sequences(sequences).subtree_end
    check_tree(end)
    end[where % len(end)] += change
    if not is_tree(end.tolist()):
        with pytest.raises(ValueError, match="no tree"):
            check_tree(end)


def test_wrong_type() -> None:
    strided = torch.tensor([1, 9, 2, 9], dtype=torch.int32)[::2]
    for wrong in (torch.tensor([1, 2]), torch.ones(1, 1, dtype=torch.int32), strided):
        with pytest.raises(TypeError, match="contiguous 1-D int32"):
            check_tree(wrong)


def test_one_plan_for_all_aliases_of_a_tree_and_none_after_it() -> None:
    made = []
    plans = Plans(lambda end, option: made.append(option) or len(made))
    end = PrefixTree.from_sequences([[1, 2, 3], [1, 4]]).subtree_end
    assert plans.of(end, "a") == plans.of(end.detach(), "a") == plans.of(end.view(-1), "a") == 1
    assert plans.of(end, "b") == 2
    assert plans.of(end[3:] - 3, "a") == 3  # another storage
    assert plans.of(torch.tensor([1], dtype=torch.int32), "a") == 4
    gc.collect()
    assert len(plans) == 1
    del end
    gc.collect()
    assert len(plans) == 0


def test_a_tree_changed_in_place_is_planned_anew() -> None:
    plans = Plans(lambda end: end.tolist())
    end = torch.tensor([3, 3, 3], dtype=torch.int32)
    assert plans.of(end) == [3, 3, 3]
    end.copy_(torch.tensor([3, 2, 3]))
    assert plans.of(end) == [3, 2, 3]
    with torch.inference_mode():
        assert plans.of(torch.tensor([1], dtype=torch.int32)) == [1]


def test_threads_share_plans() -> None:
    plans = Plans(lambda end: end.numel())
    kept = [torch.arange(1, n + 2, dtype=torch.int32) for n in range(40)]

    def work(_: int) -> bool:
        return all(plans.of(end) == end.numel() == plans.of(end.clone()) for _ in range(10) for end in kept)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


def test_a_view_is_a_tree_of_its_own() -> None:
    plans = Plans(lambda end: end.numel())
    end = torch.tensor([1, 1, 2], dtype=torch.int32)
    assert plans.of(end[:1]) == 1
    assert plans.of(end[1:]) == 2
    with pytest.raises(ValueError, match="no tree"):
        plans.of(end)
