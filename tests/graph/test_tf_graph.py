"""Layers as the operations of TensorFlow that they run."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from tfpar.errors import ModelError
from tfpar.graph.tf_graph import Read, traced

pytestmark = pytest.mark.fast


def symbols(*shapes):
    return [keras.KerasTensor(shape, "float32") for shape in shapes]


def kinds(graph):
    return [getattr(call.operation, "type", call.operation) for call in graph.calls]


@pytest.mark.parametrize("rows, columns", [(None, None), (None, 5), (2, 5)])
def test_numbers_are_those_of_the_function(rows, columns):
    def masked(x):
        size = ops.shape(x)[1]
        mask = ops.expand_dims(ops.arange(size), 0) <= ops.expand_dims(ops.arange(size), 1)
        scores = ops.einsum("btd,bsd->bts", x, x)
        return ops.silu(ops.softmax(ops.where(mask, scores, -1e9)) @ x)

    graph = traced(masked, symbols((rows, columns, 4)))
    x = tf.random.normal((2, 5, 4))
    np.testing.assert_array_equal(graph.run([x], None), masked(x))
    again = tf.function(lambda x: graph.run([x], None))
    np.testing.assert_allclose(again(x), masked(x), rtol=1e-6)


def test_gradients_and_variables():
    weight = keras.Variable(np.random.default_rng(0).normal(size=(4, 3)), dtype="float32", name="weight")
    graph = traced(lambda x: ops.silu(x @ weight), symbols((None, 4)))
    assert graph.variables == (weight,)
    assert sum(isinstance(call.operation, Read) for call in graph.calls) == 1
    x = tf.random.normal((5, 4))

    def gradients(run):
        with tf.GradientTape() as tape:
            y = run(x)
        return tape.gradient(y, weight.value)

    expected = gradients(lambda x: ops.silu(x @ weight))
    np.testing.assert_allclose(gradients(lambda x: graph.run([x], None)), expected, rtol=1e-6)
    inside = tf.function(lambda: gradients(lambda x: graph.run([x], None)))  # a tape within a graph
    np.testing.assert_allclose(inside(), expected, rtol=1e-6)
    with keras.StatelessScope([(weight, tf.zeros((4, 3)))]):
        np.testing.assert_array_equal(graph.run([x], None), np.zeros((5, 3)))


def test_variables_are_read_in_their_dtype_and_cast_after():
    layer = layers.Dense(2, dtype="mixed_bfloat16")
    layer.build((None, 3))
    graph = traced(lambda x: x @ ops.cast(layer._kernel, "bfloat16"), [keras.KerasTensor((None, 3), "bfloat16")])
    assert kinds(graph) == ["Read", "Cast", "MatMul"]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float64"])
def test_a_layer_reads_its_variables_in_the_dtype_of_its_policy(policy):
    class Scale(layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=shape[-1:], initializer="random_normal")

        def call(self, x):
            return tf.cast(x, "float32") * self.scale

    layer, x = Scale(dtype=policy), tf.random.normal((5, 3))
    expected = layer(x)
    graph = traced(layer, symbols((None, 3)))
    assert "Read" in kinds(graph)
    np.testing.assert_array_equal(graph.run([x], None), expected)


def test_whole_numbers_are_computed_ahead():
    graph = traced(lambda x: tf.reshape(x, tf.concat([[-1], tf.constant([2]) * 2], 0)), symbols((None, 2, 2)))
    assert kinds(graph) == ["Reshape"]
    np.testing.assert_array_equal(graph.calls[0].args[1], [-1, 4])


def test_what_is_the_same_tensor_is_one():
    graph = traced(lambda x: tf.identity(tf.identity(x) + 1.0), symbols((2,)))
    assert kinds(graph) == ["AddV2"]
    assert traced(lambda x: x, symbols((2,))).graph.outputs == (0,)


def straight_through(x):
    @tf.custom_gradient
    def rounded(x):
        return tf.round(x), lambda g: g

    return rounded(x)


seed = keras.random.SeedGenerator(1)
outside = tf.Variable(1.0)


def test_masks_that_end_inside():
    """Softmax gives its output the mask that it is told, and nothing sees that."""

    def attention(x):
        return layers.Softmax()(x @ tf.transpose(x), mask=x @ tf.transpose(x) > 0) @ x

    x = np.random.default_rng(0).normal(size=(3, 2)).astype("float32")
    for keeps in (lambda layer: False, lambda layer: True):
        graph = traced(attention, symbols((3, 2)), keeps)
        np.testing.assert_allclose(graph.run([x], None), attention(tf.constant(x)), rtol=1e-6)


@pytest.mark.parametrize("keeps", [lambda layer: True, lambda layer: not isinstance(layer, layers.Masking)])
def test_masks_that_layers_get(keeps):
    with pytest.raises(ModelError, match="Keras mask"):
        traced(lambda x: layers.GRU(2)(layers.Masking()(x)), symbols((4, 3, 2)), keeps)


@pytest.mark.parametrize(
    "function, why",
    [
        (straight_through, "gradient of its own"),
        (lambda x: keras.random.normal((2,), seed=seed) + x, "draws random numbers"),
        (lambda x: tf.random.normal((2,)) + x, "keeps a state"),
        (lambda x: tf.while_loop(lambda x: tf.reduce_sum(x) < 9, lambda x: (x + 1,), (x,))[0], "is a loop"),
        (lambda x: x + outside, "ReadVariableOp, which keeps a state"),
        (lambda x: layers.Dense(2)(layers.Masking()(x[:, None])), "Keras mask"),
        (lambda x: tf.strings.length(tf.as_string(x)), "no array"),
    ],
)
def test_what_cannot_be_told(function, why):
    with pytest.raises(ModelError, match=why):
        traced(function, symbols((2,)))
