"""Keras models as graphs: what is inlined, what it costs, how subclassed models are opened."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from tfpar.engine.program import Edge, Program, restored
from tfpar.errors import ModelError
from tfpar.graph.flops import flops
from tfpar.graph.inline_model import opened
from tfpar.graph.keras_graph import graph_from

pytestmark = pytest.mark.fast


def names(graph):
    return [op.name for op in graph.graph.ops]


def test_nested_models_are_inlined():
    inner_x = layers.Input((4,))
    inner = keras.Model(inner_x, layers.Dense(4, name="a")(inner_x), name="inner")
    outer = keras.Sequential([layers.Input((4,)), inner, layers.Dense(4, name="b")], name="outer")
    x = layers.Input((4,))
    model = keras.Model(x, outer(inner(layers.Dense(4, name="c")(x))))
    graph = graph_from(model)
    assert names(graph) == ["c", "inner/a", "outer/inner/a", "outer/b"]
    assert [op.variables for op in graph.graph.ops] == [(0, 1), (2, 3), (2, 3), (4, 5)]
    data = np.random.rand(3, 4).astype("float32")
    assert np.allclose(graph.run([data], False), model(data))


def test_a_layer_called_twice():
    x = layers.Input((4,))
    twice = layers.Dense(4, name="twice")
    assert names(graph_from(keras.Model(x, twice(twice(x))))) == ["twice", "twice:1"]


def test_inputs_of_a_nested_model_are_converted_as_keras_does():
    inner_x = layers.Input((1,), dtype="float32")
    inner = keras.Model(inner_x, layers.Dense(2)(inner_x), name="inner")
    x = layers.Input((1,), dtype="int32")
    model = keras.Model(x, inner(x))
    graph = graph_from(model)
    assert names(graph) == ["inner/inputs", "inner/dense"]
    data = np.array([[1], [2]])
    assert np.allclose(graph.run([data], False), model(data))


def test_dict_inputs_of_a_nested_model():
    a, b = layers.Input((2,), name="a"), layers.Input((3,), name="b")
    inner = keras.Model({"a": a, "b": b}, layers.concatenate([a, layers.Dense(2)(b)]), name="inner")
    p, q = layers.Input((3,), name="p"), layers.Input((2,), name="q")
    model = keras.Model([p, q], inner({"b": p, "a": q}))
    data = [np.random.rand(4, 3).astype("float32"), np.random.rand(4, 2).astype("float32")]
    assert np.allclose(graph_from(model).run(data, False), model(data))


def test_training_overrides_a_nested_call_as_in_keras():
    """In a Functional model `training` of the step wins over that of the call; in a subclassed one it does not."""
    normalize = layers.BatchNormalization()
    x = layers.Input((4,))
    model = keras.Model(x, normalize(x, training=False))
    data = np.random.rand(8, 4).astype("float32") + 5

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer = normalize

        def call(self, x, training=None):
            return self.layer(x, training=False)

    for one in (graph_from(model), opened(Own(), tf.constant(data), True)):
        with keras.StatelessScope():
            found = one.run([data], True)
            expected = model(data, training=True) if one.graph.ops[0].name != "own" else Own()(data, training=True)
        assert np.allclose(
            found, expected if one is not None and not one.calls[0].explicit else normalize(data), atol=1e-5
        )


class Conditional(keras.Model):
    def __init__(self):
        super().__init__()
        self.a, self.b = layers.Dense(3), layers.Dense(3)

    def call(self, x):
        h = self.a(x)
        return ops.cond(ops.sum(x) > 0, lambda: h, lambda: self.b(h) * 2.0)


class OwnWeight(keras.Model):
    def __init__(self):
        super().__init__()
        self.a = layers.Dense(3)
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, x):
        return self.a(x) * ops.cast(self.scale, "float32")


class UsedWeight(OwnWeight):
    def call(self, x):
        return self.a(x) * self.scale


class RawTensorFlow(keras.Model):
    def __init__(self):
        super().__init__()
        self.a = layers.Dense(3)

    def call(self, x):
        return tf.nn.relu(self.a(x))


class Training(keras.Model):
    def __init__(self):
        super().__init__()
        self.a, self.drop = layers.Dense(3), layers.Dropout(0.5)

    def call(self, x, training=None):
        return self.drop(self.a(x), training=training)


DATA = np.array([[1.0, 2.0], [-3.0, 1.0], [0.5, -4.0]], "float32")


def open_built(kind, training=True):
    model = kind()
    model(DATA)
    return model, opened(model, tf.constant(DATA), training)


@pytest.mark.parametrize("kind", [UsedWeight, Training])
@pytest.mark.parametrize("training", [True, False])
def test_opened(kind, training):
    model, graph = open_built(kind, training)
    given = {"training": training} if kind is Training else {}
    with keras.StatelessScope():
        found = graph.run([DATA], training if given else None)
    with keras.StatelessScope():
        assert np.allclose(found, model.call(DATA, **given))
    assert {v.path for v in model.weights} <= {v.path for v in graph.variables}


@pytest.mark.parametrize(
    "kind, message",
    [
        (
            RawTensorFlow,
            "RawTensorFlow.call does not work on symbolic inputs(.|\n)*layer of its own, or in keras.layers.Lambda",
        ),
        (OwnWeight, "OwnWeight.call gives other numbers.*does not see the weights \\['own_weight/scale'\\]"),
        (Conditional, "Conditional.call gives other numbers"),
    ],
)
def test_not_opened(kind, message):
    with pytest.raises(ModelError, match=message):
        open_built(kind)


LAYERS = {
    "dense": (lambda: layers.Dense(5), (7, 3), 2 * 7 * 3 * 5),
    "einsum": (lambda: layers.EinsumDense("abc,cde->abde", output_shape=(None, 2, 4)), (7, 3), 2 * 7 * 3 * 8),
    "conv": (lambda: layers.Conv2D(4, 3, strides=2, padding="same"), (8, 8, 3), 2 * 4 * 4 * 9 * 3 * 4),
    "first": (lambda: layers.Conv2D(4, 3, padding="same", data_format="channels_first"), (3, 8, 6), 2 * 48 * 9 * 3 * 4),
    "depthwise": (lambda: layers.DepthwiseConv2D(3, padding="same"), (8, 8, 3), 2 * 64 * 9 * 3),
    "transposed": (lambda: layers.Conv2DTranspose(4, 3, strides=2, padding="same"), (8, 8, 3), 2 * 64 * 9 * 3 * 4),
    "embedding": (lambda: layers.Embedding(9, 4), (5,), 0),
    "lstm": (lambda: layers.LSTM(4), (5, 3), 2 * 5 * (3 + 4) * 16),
    "activation": (lambda: layers.Activation("relu"), (5,), 0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_flops(name):
    make, shape, expected = LAYERS[name]
    layer = make()
    out = layer.compute_output_shape((None, *shape))
    layer.build((None, *shape))
    assert flops(layer, [shape], [out[1:]]) == expected


def test_flops_of_attention():
    layer = layers.MultiHeadAttention(2, 4)
    x = layers.Input((6, 8))
    layer(x, x)
    assert flops(layer, [(6, 8), (6, 8)], [(6, 8)]) == 2 * 6 * 4 * 8 * 8 + 4 * 6 * 6 * 8


def test_flops_of_an_operation():
    assert flops(ops.add, [(4,)], [(4,)]) == 0


def test_a_sequential_part_that_first_saw_numbers():
    """It keeps their batch size in its symbols; the batch of the graph stays open."""
    part = keras.Sequential([layers.Dense(4), layers.Dense(3)])
    part(np.zeros((8, 6), "float32"))
    x = layers.Input((6,))
    graph = graph_from(keras.Model(x, part(layers.Dense(6)(x))))
    assert [graph.is_batched(t) for t in range(len(graph.symbols))] == [True] * 4


def test_functions_of_logits_are_known_by_graph():
    """Two graphs of a model may give one number to tensors of different kinds."""
    found = {}
    for function in (tf.nn.softmax, tf.sigmoid):
        x = layers.Input((3,))
        model = keras.Model(x, layers.Lambda(lambda v, function=function: function(v))(x))
        graph = graph_from(model)
        program = Program(graph, range(1), graph.graph.outputs, model, True, False, False)
        tf.function(program)([], {0: Edge(tf.ones((2, 3)))})
        found[function] = graph
    for function, graph in found.items():
        (t,) = graph.graph.outputs
        assert graph.activations == {t: function}
        edges = {t: Edge(tf.zeros((1, 3)), logits=tf.zeros((1, 3)))}
        assert np.allclose(restored(t, edges, graph), function(tf.zeros((1, 3))))
