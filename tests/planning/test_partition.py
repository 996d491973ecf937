"""Cutting: against brute force, what the user asks for, and what is refused."""

import itertools

import numpy as np
import pytest

from tfpar.errors import ModelError, PartitionError
from tfpar.planning.cost import BACKWARD, Hardware, op_seconds
from tfpar.planning.op_graph import Op, OpGraph, Tensor, Variable
from tfpar.planning.partition import Partition, live_bytes, partition

pytestmark = pytest.mark.fast

HARDWARE = Hardware(flops=1.0, bytes=1e9, link_bytes=1e9)


def chain(flops, sizes=None, names=None):
    """Operations one after the other, the n-th with `flops[n]`, its input of `sizes[n]` floats."""
    sizes = sizes or [1] * (len(flops) + 1)
    ops = tuple(
        Op((names or [f"op{i}" for i in range(len(flops))])[i], (i,), (i + 1,), (i,), float(f))
        for i, f in enumerate(flops)
    )
    variables = tuple(Variable(f"w{i}", 4) for i in range(len(flops)))
    return OpGraph(ops, tuple(Tensor((s,)) for s in sizes), variables, (0,), (len(flops),))


def slowest(graph, stage_of, hardware):
    work = [(1 + BACKWARD) * op_seconds(graph, op, 1, hardware) for op in graph.ops]
    live = list(live_bytes(graph))
    return max(
        sum(w for w, s in zip(work, stage_of, strict=True) if s == stage)
        + 2 * live[stage_of.index(stage)] / hardware.link_bytes
        for stage in set(stage_of)
    )


@pytest.mark.parametrize("seed", range(8))
def test_balance_is_optimal(seed):
    rng = np.random.default_rng(seed)
    n, stages = int(rng.integers(4, 9)), int(rng.integers(1, 5))
    stages = min(stages, n)
    graph = chain(rng.uniform(0.1, 9.0, n), [int(s) for s in rng.integers(1, 9, n + 1)])
    hardware = Hardware(flops=1.0, bytes=50.0, link_bytes=20.0)
    found = partition(graph, stages, "auto", hardware)
    best = min(
        slowest(graph, tuple(sum(i >= c for c in cuts) for i in range(n)), hardware)
        for cuts in itertools.combinations(range(1, n), stages - 1)
    )
    assert slowest(graph, found.stage_of, hardware) == pytest.approx(best)


def test_of_equally_fast_cuts_the_one_that_sends_less():
    graph = chain([3.0, 0.0, 0.0, 3.0], [1, 50, 2, 50, 1])
    assert partition(graph, 2, "auto", Hardware(1.0, 1e12, 1e12)).stage_of == (0, 0, 1, 1)


def test_a_skip_connection_counts_where_it_crosses():
    ops = (Op("a", (0,), (1,)), Op("b", (1,), (2,)), Op("c", (2,), (3,)), Op("d", (3, 1), (4,)))
    graph = OpGraph(ops, tuple(Tensor((s,)) for s in (1, 5, 3, 2, 1)), (), (0,), (4,))
    assert list(live_bytes(graph)) == [0, 20, 32, 28]


def test_names_where_stages_begin():
    graph = chain([1.0] * 5, names=["a", "block/b", "block/c", "block/b:1", "d"])
    assert partition(graph, 3, ["block", "d"], HARDWARE).stage_of == (0, 1, 1, 1, 2)
    assert partition(graph, 2, ["c"], HARDWARE).stage_of == (0, 0, 1, 1, 1)


def test_mapping():
    graph = chain([1.0] * 5, names=["a", "block/b", "block/c", "d", "e"])
    assert partition(graph, 2, {"block": 0, "d": 1}, HARDWARE).stage_of == (0, 0, 0, 1, 1)
    assert partition(graph, 3, {"block": 1, "c": 2}, HARDWARE).stage_of == (0, 1, 2, 2, 2)


def test_edges():
    ops = (Op("a", (0,), (1, 5)), Op("b", (1,), (2,)), Op("c", (2,), (3,)), Op("d", (3, 1), (4,)))
    graph = OpGraph(ops, (Tensor((1,)),) * 6, (), (0,), (4, 5))
    cut = Partition(graph, (0, 1, 1, 2))
    assert [cut.edges(s) for s in range(3)] == [(1, 5), (3,), (4,)]
    assert [cut.needs(s) for s in range(3)] == [(0,), (1,), (3, 1)]


def test_a_shared_variable_lives_where_it_is_first_used():
    ops = (Op("a", (0,), (1,), (1,)), Op("b", (1,), (2,), (0, 1)))
    graph = OpGraph(ops, (Tensor((1,)),) * 3, (Variable("u", 4), Variable("v", 4), Variable("unused", 4)), (0,), (2,))
    cut = Partition(graph, (0, 1))
    assert [cut.home(v) for v in range(3)] == [1, 0, 0]


@pytest.mark.parametrize(
    "placement, stages, message",
    [
        ("auto", 6, "cannot cut 5 layers into 6 stages.*use at most 5 devices"),
        (["dense_9"], 2, "no layer 'dense_9'; the nearest names are dense_4, dense_3"),
        (["dense_1"], 3, "3 stages need 2 names where a new one begins; received 1"),
        (["dense_3", "dense_1"], 3, "in the order of the model.*\\['dense_1', 'dense_3'\\]"),
        (["dense_0"], 2, "each after at least one layer"),
        (
            {"dense_1": 1, "dense_2": 0},
            2,
            "sends data backwards: dense_2 on stage 0 uses what dense_1 makes on stage 1",
        ),
        ({"dense_1": 2}, 2, "dense_1 is placed on stage 2; the stages are 0 to 1"),
        ({"dense_1": 0}, 2, "no layer is placed on stage 1: 2 devices need 2 stages"),
        ({"dense_3": 2}, 3, "stage 1 of 3 has no layers"),
        ({"nothing": 1}, 2, "no layer 'nothing'"),
        ("even", 2, 'placement is "auto", a list'),
    ],
)
def test_refused(placement, stages, message):
    graph = chain([1.0] * 5, names=[f"dense_{i}" for i in range(5)])
    with pytest.raises(PartitionError, match=message):
        partition(graph, stages, placement, HARDWARE)


def test_a_graph_in_no_order():
    with pytest.raises(ModelError, match="b uses tensor 2 before anything produces it"):
        OpGraph((Op("b", (2,), (1,)), Op("a", (0,), (2,))), (Tensor((1,)),) * 3, (), (0,), (1,))
