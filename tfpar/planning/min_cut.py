"""The smallest cut of a graph whose nodes have sizes."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from itertools import pairwise
from math import inf


def smallest_cut(
    sizes: Mapping[Hashable, float], edges: Iterable[tuple[Hashable, Hashable]], first: Iterable, last: Iterable
) -> set:
    """The nodes, whose sizes have the smallest sum, through which every path from `first` to `last` goes.

    Of cuts of the same size it is the one nearest to `last`. By augmenting paths, the shortest first (Edmonds and Karp,
    "Theoretical Improvements in Algorithmic Efficiency for Network Flow Problems", 1972); a node is an edge from its
    entry to its exit.

    Args:
        sizes: of each node; `inf` for one that cannot be in the cut.
        edges: pairs of nodes.
        first, last: nodes.
    """
    start, end = ("first",), ("last",)
    free: dict[tuple, dict[tuple, float]] = {start: {}, end: {}}

    def connect(a: tuple, b: tuple, size: float):
        free.setdefault(a, {})[b] = size
        free.setdefault(b, {}).setdefault(a, 0)

    for node, size in sizes.items():
        connect(("in", node), ("out", node), size)
    for a, b in edges:
        connect(("out", a), ("in", b), inf)
    for node in first:
        connect(start, ("in", node), inf)
    for node in last:
        connect(("out", node), end, inf)
    while True:
        before = reached(free, start, lambda a, b: free[a][b], end)
        if end not in before:
            break
        path = [end]
        while path[-1] != start:
            path.append(before[path[-1]])
        most = min(free[a][b] for b, a in pairwise(path))
        for b, a in pairwise(path):
            free[a][b] -= most
            free[b][a] += most
    after = reached(free, end, lambda a, b: free[b][a])
    return {node for node in sizes if ("out", node) in after and ("in", node) not in after}


def reached(free: dict, start: tuple, room: Callable, end: tuple | None = None) -> dict[tuple, tuple]:
    """What can be reached over edges with room, and from where."""
    before, waiting = {start: start}, deque([start])
    while waiting and end not in before:
        a = waiting.popleft()
        for b in free[a]:
            if b not in before and room(a, b) > 0:
                before[b] = a
                waiting.append(b)
    return before
