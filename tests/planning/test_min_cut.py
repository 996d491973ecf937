"""The smallest cut, against all cuts of small graphs."""

from itertools import combinations
from math import inf

import numpy as np
import pytest

from tfpar.planning.min_cut import smallest_cut

pytestmark = pytest.mark.fast


def separates(nodes, edges, first, last, cut):
    """Whether every way goes through the cut."""
    reached, waiting = set(), [n for n in first if n not in cut]
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting += [b for a, b in edges if a == node and b not in cut]
    return not reached & set(last)


def smallest(sizes, edges, first, last):
    """The size of the smallest cut, all of them tried."""
    cuts = (set(c) for n in range(len(sizes) + 1) for c in combinations(sizes, n))
    return min(sum(sizes[n] for n in cut) for cut in cuts if separates(sizes, edges, first, last, cut))


@pytest.mark.parametrize("seed", range(60))
def test_is_the_smallest(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 9))
    sizes = {n: int(rng.integers(1, 6)) for n in range(count)}
    edges = [(a, b) for a in range(count) for b in range(a + 1, count) if rng.random() < 0.4]
    first, last = [n for n in range(count) if rng.random() < 0.4], [n for n in range(count) if rng.random() < 0.4]
    cut = smallest_cut(sizes, edges, first, last)
    assert separates(sizes, edges, first, last, cut)
    assert sum(sizes[n] for n in cut) == smallest(sizes, edges, first, last)


def test_is_the_nearest_to_the_end():
    assert smallest_cut(dict.fromkeys("abcd", 2), ["ab", "bc", "cd"], "a", "d") == {"d"}
    assert smallest_cut({"a": 1, "b": 1, "c": 3}, ["ab", "bc"], "a", "c") == {"b"}


def test_nodes_that_cannot_be_in_it():
    assert smallest_cut({"a": 5, "b": inf}, ["ab"], "a", "b") == {"a"}


def test_nothing_to_separate():
    assert smallest_cut({"a": 1, "b": 1}, [], "a", "b") == set()
    assert smallest_cut({}, [], [], []) == set()
