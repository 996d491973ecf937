"""Rules for TensorFlow's operations: each way to divide one, run rank by rank, makes the parts of what it makes."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfpar.graph.tf_graph import TensorFlowOp, traced
from tfpar.planning.sharding import REPLICATED, bounds
from tfpar.tensor_parallel import rules
from tfpar.tensor_parallel.rank_graph import RankGraphBuilder, is_collective

pytestmark = pytest.mark.fast
A, B = (3, 4, 8, 6), (3, 4, 6, 8)
PAIR = (A, A)
CASES = {  # what is traced, the shapes of its tensors (None for a size that is not known), how many ways there are
    "add": (tf.add, PAIR, 3),
    "broadcast": (tf.multiply, (A, (8, 1)), 3),
    "unknown": (tf.add, ((None, None, 8, 6), (None, 1, 8, 1)), 2),
    "scalar": (lambda x: x * 2.0, (A,), 3),
    "constant row": (lambda x: x + np.arange(6, dtype="float32"), (A,), 2),
    "where": (lambda x, y: tf.where(x > y, x, y), PAIR, 3),
    "cast": (lambda x: tf.cast(x, tf.int32), (A,), 3),
    "softmax": (tf.nn.softmax, (A,), 2),
    "silu": (lambda x: keras.ops.silu(x), (A,), 3),
    "attention": (lambda q, k, v: keras.ops.dot_product_attention(q, k, v), (A,) * 3, 1),
    "attention, groups": (
        lambda q, k, v, mask: keras.ops.dot_product_attention(q, k, v, mask=mask > 0),
        (A, (3, 5, 2, 6), (3, 5, 2, 6), (3, 1, 4, 5)),
        None,
    ),
    "attention, biases": (
        lambda q, k, v, b: keras.ops.dot_product_attention(q, k, v, bias=b, is_causal=True),
        (A, A, A, (1, 8, 4, 4)),
        1,
    ),
    "attention, a scale for each head": (
        lambda q, k, v, s: keras.ops.dot_product_attention(q, k, v, scale=s),
        (A, A, A, (8, 1, 1)),
        1,
    ),
    "sum": (lambda x: tf.reduce_sum(x, [2]), (A,), 2),
    "mean, kept": (lambda x: tf.reduce_mean(x, -1, keepdims=True), (A,), 2),
    "argmax": (lambda x: tf.argmax(x, 2), (A,), 2),
    "cumsum": (lambda x: tf.cumsum(x, 2), (A,), 2),
    "matmul": (tf.matmul, (A, B), 4),
    "matmul, turned": (lambda x, y: tf.matmul(x, y, transpose_b=True), PAIR, 4),
    "matmul, spread": (tf.matmul, (A, (6, 8)), 4),
    "matrices": (lambda x, y: tf.matmul(x, y, transpose_a=True), ((6, 3), (6, 8)), 2),
    "einsum": (lambda x, y: tf.einsum("btnh,bsnh->bnts", x, y), PAIR, 4),
    "einsum, ellipsis": (lambda x, y: tf.einsum("...ij,jk->...ik", x, y), (A, (6, 8)), 4),
    "reshape": (lambda x: tf.reshape(x, [3, 4, 2, 4, 6]), (A,), 3),
    "reshape, merged": (lambda x: tf.reshape(x, [-1, 4, 48]), (A,), 2),
    "reshape, unknown": (lambda x: tf.reshape(x, [tf.shape(x)[0], tf.shape(x)[1], 48]), ((None, None, 8, 6),), None),
    "transpose": (lambda x: tf.transpose(x, [0, 2, 1, 3]), (A,), 3),
    "expand": (lambda x: x[:, :, None], (A,), 3),
    "expand dims": (lambda x: tf.expand_dims(x, 1), (A,), 3),
    "squeeze": (lambda x: tf.squeeze(x, [1]), ((3, 1, 8, 6),), 2),
    "stack": (lambda x, y: tf.stack([x, y], 2), PAIR, 3),
    "unstack": (lambda x: tf.unstack(x, axis=1), (A,), 2),
    "concat": (lambda x, y: tf.concat([x, y], 2), PAIR, 2),
    "split": (lambda x: tf.split(x, 2, 2), (A,), 2),
    "split, sizes": (lambda x: tf.split(x, [2, 6], 2), (A,), 2),
    "slice": (lambda x: tf.slice(x, [0, 1, 0, 0], [-1, 2, 8, 6]), (A,), 2),
    "strided slice": (lambda x: x[:, 1:3], (A,), 2),
    "strided slice, one": (lambda x: x[:, 0], (A,), 2),
    "strided slice, ends": (lambda x: x[..., :3], (A,), 2),
    "strided slice, back": (lambda x: x[:, ::-1], (A,), 2),
    "tile": (lambda x: tf.tile(x, [1, 1, 1, 2]), (A,), 2),
    "repeat": (lambda x: tf.repeat(x, 2, 2), (A,), None),
    "pad": (lambda x: tf.pad(x, [[0, 0], [1, 1], [0, 0], [0, 0]]), (A,), 2),
    "broadcast to": (lambda x: tf.broadcast_to(x, [3, 4, 8, 6]), ((3, 1, 8, 1),), 1),
    "gather": (lambda x: tf.gather(x, [2, 0, 1], axis=2), (A,), 2),
    "one hot": (lambda x: tf.one_hot(tf.cast(x, tf.int32), 5), (A,), 3),
    "top k": (lambda x: tf.math.top_k(x, 2), (A,), 2),
    "update": (lambda x, y: keras.ops.slice_update(x, [0, 1, 0, 0], y), (A, (3, 2, 8, 6)), 2),
    "shape": (lambda x: tf.shape(x) * 1, ((None, 4, 8, 6),), 3),
}


@pytest.mark.parametrize("name, ranks", itertools.product(CASES, [2, 3]))
def test_parts_are_those_of_the_whole(name, ranks):
    function, shapes, ways = CASES[name]
    graph = traced(function, [keras.KerasTensor(shape, "float32") for shape in shapes])
    rng = np.random.default_rng(0)
    tensors = {
        t: tf.constant(rng.normal(size=[n or 3 for n in shape]), tf.float32)
        for t, shape in zip(graph.graph.inputs, shapes, strict=True)
    }
    for call in graph.calls:
        call(tensors, None)
    tried = [0] * len(graph.calls)
    for i in range(len(graph.calls)):
        for option in list(rules.options(rules.Site(graph, i, ranks)))[1:]:
            tried[i] += 1
            check(graph, i, option, ranks, tensors)
    if ranks == 2:  # of three, some have no equal parts
        known = [n for call, n in zip(graph.calls, tried, strict=True) if not is_about_sizes(call)]
        assert min(known, default=tried[0]) > 0
        assert ways is None or max(tried) == ways


@pytest.mark.parametrize("mask", [(3, None, 4, 4), (None, 4, 4)])
def test_a_mask_that_may_be_of_heads_or_not(mask):
    """Which, is known when there is data: it is broadcast where it has one of them."""
    function = lambda q, k, v, b: keras.ops.dot_product_attention(q, k, v, bias=b)  # noqa: E731
    graph = traced(function, [keras.KerasTensor(shape, "float32") for shape in (A, A, A, mask)])
    assert len(list(rules.options(rules.Site(graph, 0, 2)))) == 1


def is_about_sizes(call):
    """Whether an operation has no rule because it computes sizes, or a number for each rank."""
    return isinstance(call.operation, TensorFlowOp) and call.operation.op.outputs[0].shape.rank < 2


def check(graph, i, option, ranks, tensors):
    """Compare the parts that ranks make of an operation with the parts of what it makes."""
    local = RankGraphBuilder(graph, ranks)
    for t in graph.graph.ops[i].inputs:
        if t not in local.known:
            local.known[t] = local.tensor(graph.symbols[t].shape, graph.symbols[t].dtype)
    for t, layout in zip(graph.graph.ops[i].inputs, option.inputs, strict=True):
        local.layouts[local.known[t]] = layout
    if len({*zip(graph.graph.ops[i].inputs, option.inputs, strict=True)}) > len({*graph.graph.ops[i].inputs}):
        return  # one tensor in two layouts
    values = {local.known[t]: parts(tensors[t], local.layouts[local.known[t]], ranks) for t in local.known}
    local.follow(i, option)
    for op, call in zip(local.ops, local.calls, strict=True):
        if is_collective(call):
            given = values[op.inputs[0]] if op.inputs else [None] * ranks
            values[op.outputs[0]] = call.operation.there(given, ["CPU:0"] * ranks)
            continue
        for r in range(ranks):
            mine = {t: values[t][r] for t in op.inputs}
            call(mine, None)
            for t in op.outputs:
                values.setdefault(t, [None] * ranks)[r] = mine[t]
    for t, layout in zip(graph.graph.ops[i].outputs, option.outputs, strict=True):
        for part, expected in zip(values[local.known[t]], parts(tensors[t], layout, ranks), strict=True):
            np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-5, err_msg=f"{option.name} {option.inputs}")


def parts(value, layout, ranks):
    """What each rank has of a tensor."""
    if layout == REPLICATED:
        return [value] * ranks
    edges = bounds(value.shape[layout.dim], ranks)
    return [tf.gather(value, range(a, b), axis=layout.dim) for a, b in itertools.pairwise(edges)]
