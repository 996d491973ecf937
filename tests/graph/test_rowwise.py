"""What is known by name is what numbers show, for every operation and way to tell it of dim 0."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from tfpar.graph.batch_probe import Combine, Probe
from tfpar.graph.keras_graph import graph_from
from tfpar.graph.mixing import is_known
from tfpar.graph.rowwise import RULES

pytestmark = pytest.mark.fast

TABLE, IDS = np.ones((8, 4), "float32"), np.array([0, 2])
BATCHED = np.ones((8, 3, 4), "float32")
A = (3, 4)  # the shape of a sample
ROWWISE = {
    "Add": [lambda a, b: a + b, lambda a, b: a + TABLE[:1], lambda a, b: ops.add(a, 2.0)],
    "Where": [lambda a, b: ops.where(a > 0, a, b)],
    "Mean": [lambda a, b: ops.mean(a, axis=(1, -1))], "Argmax": [lambda a, b: ops.argmax(a, -1)],
    "Softmax": [lambda a, b: ops.softmax(a)], "Concatenate": [lambda a, b: ops.concatenate([a, b], 1)],
    "Stack": [lambda a, b: ops.stack([a, b], axis=-1)], "Split": [lambda a, b: ops.split(a, 2, axis=-1)],
    "ExpandDims": [lambda a, b: ops.expand_dims(a, -1)], "Cumsum": [lambda a, b: ops.cumsum(a, axis=1)],
    "Reshape": [lambda a, b: ops.reshape(a, (-1, 12)), lambda a, b: ops.reshape(a, (-1, 6, 2))],
    "Transpose": [lambda a, b: ops.transpose(a, (0, 2, 1))], "Swapaxes": [lambda a, b: ops.swapaxes(a, 1, 2)],
    "Moveaxis": [lambda a, b: ops.moveaxis(a, 1, 2)], "TopK": [lambda a, b: ops.top_k(a, 2)],
    "GetItem": [lambda a, b: a[:, 1], lambda a, b: a[..., 0], lambda a, b: a[:, None, 1:]],
    "Matmul": [lambda a, b: ops.matmul(a, ops.transpose(b, (0, 2, 1))), lambda a, b: ops.matmul(a, TABLE[:4])],
    "Einsum": [lambda a, b: ops.einsum("bij,bkj->bik", a, b)], "Take": [lambda a, b: ops.take(a, IDS, axis=1)],
    "DotProductAttention": [lambda a, b: ops.dot_product_attention(*[ops.reshape(v, (-1, 3, 2, 2)) for v in (a, b, b)])],  # noqa: E501
}  # fmt: skip
MIXING = {
    "Add": [lambda a, b: a[:, 0, 0] + a[:, 0, :1]],
    "Mean": [lambda a, b: ops.mean(a), lambda a, b: ops.mean(a, axis=0), lambda a, b: ops.mean(a, axis=(-3, 1))],
    "Softmax": [lambda a, b: ops.softmax(a, axis=0)], "Concatenate": [lambda a, b: ops.concatenate([a, b], 0)],
    "Cumsum": [lambda a, b: ops.cumsum(a, axis=0), lambda a, b: ops.cumsum(a)],
    "Reshape": [lambda a, b: ops.reshape(a, (4, -1)), lambda a, b: ops.reshape(a, (-1, 24))],
    "Transpose": [lambda a, b: ops.transpose(a, (1, 0, 2)), lambda a, b: ops.transpose(a)],
    "Swapaxes": [lambda a, b: ops.swapaxes(a, 0, 1)], "Moveaxis": [lambda a, b: ops.moveaxis(a, 0, -1)],
    "GetItem": [lambda a, b: a[0], lambda a, b: a[..., 0, 0, 0]],
    "Matmul": [lambda a, b: ops.matmul(ops.transpose(a[:, 0]), b[:, 1])],
    "Einsum": [lambda a, b: ops.einsum("bij,bkj->ik", a, b), lambda a, b: ops.einsum("bij,cij->bc", a, b)],
    "Take": [lambda a, b: ops.take(a, IDS, axis=0)], "Flip": [lambda a, b: ops.flip(a), lambda a, b: ops.flip(a, 0)],
    "Roll": [lambda a, b: ops.roll(a, 1, axis=0)], "Sort": [lambda a, b: ops.sort(a, axis=0)],
}  # fmt: skip


def graph_of(make):
    a, b = layers.Input(A), layers.Input(A)
    return graph_from(keras.Model([a, b], make(a, b)))


def told(graph):
    """By the name of each operation, whether it is known to treat samples one by one, and whether it does."""
    probe = Probe(graph)
    for i, call in enumerate(graph.calls):
        try:
            kinds = {*probe.of(i, False).outputs}
        except tf.errors.OpError:  # it does not run on a part
            kinds = {None}
        yield type(call.operation).__name__, is_known(graph, i), kinds <= {Combine.ROWS, Combine.SAME}


@pytest.mark.parametrize("name", ROWWISE)
def test_rowwise(name):
    for make in ROWWISE[name]:
        found = [t for t in told(graph_of(make)) if t[0] == name]
        assert found and all(known and is_so for _, known, is_so in found)


@pytest.mark.parametrize("name", MIXING)
def test_mixing(name):
    for make in MIXING[name]:
        found = list(told(graph_of(make)))
        assert not [f for f in found if f[1] and not f[2]], "taken for what it is not"
        assert [f for f in found if f[0] == name and not f[1]]


def test_every_rule_is_of_an_operation():
    from keras.src import ops as source

    known = {name for module in vars(source).values() if hasattr(module, "__file__") for name in vars(module)}
    assert {*RULES} - known == {"Abs"} or {*RULES} <= known
