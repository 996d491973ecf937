"""The cheapest way to divide a plain graph."""

import pytest

from tfpar.planning.cost import HARDWARE
from tfpar.planning.layout_search import Option, choose, moved, replicated
from tfpar.planning.op_graph import Op, OpGraph, Tensor, Variable
from tfpar.planning.sharding import REPLICATED, Layout, bounds

pytestmark = pytest.mark.fast

LAST = Layout(1)


def chain(matrices=2, width=64, elementwise=True):
    """Matrices, one after the other, with something elementwise behind each."""
    ops, variables, t = [], [], 0
    for n in range(matrices):
        ops.append(Op(f"dense_{n}", (t,), (t + 1,), (n,), flops=2.0 * width**2))
        variables.append(Variable(f"dense_{n}/kernel", 4 * width**2, shape=(width, width)))
        t += 1
        if elementwise:
            ops.append(Op(f"relu_{n}", (t,), (t + 1,)))
            t += 1
    return OpGraph(tuple(ops), (Tensor((width,)),) * (t + 1), tuple(variables), (0,), (t,))


def options_of(graph, ranks=2):
    found = []
    for i, op in enumerate(graph.ops):
        options = [replicated(graph, i)]
        if op.variables:
            (v,), size = op.variables, graph.tensors[op.outputs[0]].bytes
            options.append(Option("column", (REPLICATED,), (LAST,), {v: Layout(1)}))
            options.append(Option("row", (LAST,), (REPLICATED,), {v: Layout(0)}, moved=2 * size * (ranks - 1) / ranks))
        else:
            options.append(Option("elementwise", (LAST,), (LAST,)))
        found.append(options)
    return found


def names(graph, **kwargs):
    return [o.name for o in choose(graph, options_of(graph), 2, HARDWARE["CPU"], **kwargs)[0]]


def test_columns_then_rows():
    assert names(chain(2)) == ["column", "elementwise", "row", "replicated"]
    assert names(chain(1)) == ["column", "elementwise"]


def test_a_matrix_is_divided_though_the_rest_costs_more():
    assert "replicated" not in names(chain(5, elementwise=False))


def test_operations_that_share_a_weight_agree():
    graph = chain(2, elementwise=False)
    ops = tuple(Op(op.name, op.inputs, op.outputs, (0,), op.flops) for op in graph.ops)
    shared = OpGraph(ops, graph.tensors, graph.variables[:1], graph.inputs, graph.outputs)
    assert names(shared) == ["column", "column"]  # not column, then row, of the same matrix
    options = options_of(shared)
    options[1] = options[1][:1]  # the second needs all of it
    assert [o.name for o in choose(shared, options, 2, HARDWARE["CPU"])[0]] == ["replicated"] * 2


@pytest.mark.parametrize(
    "have, want, split, sequence, bytes",
    [
        (REPLICATED, REPLICATED, False, False, 0),
        (REPLICATED, REPLICATED, True, False, 2 * 128),  # the gradient is added up
        (LAST, LAST, True, False, 0),
        (LAST, REPLICATED, False, False, 128),
        (LAST, REPLICATED, True, False, 2 * 128),
        (REPLICATED, LAST, True, False, 102 * 128),
        (REPLICATED, LAST, True, True, 128),
        (LAST, Layout(2), True, True, 102 * 128),
    ],
)
def test_what_a_change_of_layout_moves(have, want, split, sequence, bytes):
    assert sum(moved(chain(), 1, have, want, split, 2, sequence)) == bytes


def test_bounds():
    assert bounds(10, 4) == [0, 2, 5, 7, 10]
    assert str(Layout(1)) == "split along dim 1"
