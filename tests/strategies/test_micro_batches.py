"""What cannot equal one device is what the documentation says it is."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import ROWS, WIDTH, build, check, compiled, data, history

import tfpar
from tfpar.testing import assert_same, difference
from tfpar.trainer.hooks import hooks_of
from tfpar.trainer.step_function import StepFunction

pytestmark = pytest.mark.fast

X, Y = data()
TWO = ["CPU:0", "CPU:1"]


def pipeline(micro_batches=4):
    return tfpar.PipelineStrategy(TWO, micro_batches=micro_batches)


# ---- BatchNormalization: normalises each micro-batch with its own statistics, moves by those of the whole batch


def normalised():
    x = layers.Input((WIDTH,))
    h = layers.BatchNormalization(momentum=0.8)(layers.Dense(5, name="before")(x))
    return keras.Model(x, layers.Dense(3, activation="softmax")(h))


def test_batch_normalization_is_that_of_each_micro_batch():
    """The step, written by hand: the mean of the losses of the micro-batches, moving statistics of the batch."""
    one, other = (
        compiled(s, build=normalised, optimizer=lambda: keras.optimizers.SGD(0.1)) for s in (None, pipeline())
    )
    norm = next(x for x in one.layers if isinstance(x, layers.BatchNormalization))
    hidden = keras.Model(one.input, norm.input)(X).numpy()
    start = [v.numpy() for v in (norm.moving_mean, norm.moving_variance)]
    with tf.GradientTape() as tape:
        losses = [
            tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(Y[rows], one(X[rows], training=True)))
            for rows in (slice(m * ROWS // 4, (m + 1) * ROWS // 4) for m in range(4))
        ]
        loss = tf.add_n(losses) / 4.0
    one.optimizer.apply_gradients(zip(tape.gradient(loss, one.trainable_weights), one.trainable_weights, strict=True))
    for variable, before, value in zip(
        (norm.moving_mean, norm.moving_variance), start, (hidden.mean(0), hidden.var(0)), strict=True
    ):
        variable.assign(0.8 * before + 0.2 * value)
    found = history(X, Y, batch_size=ROWS)(other)["loss"]
    assert difference(loss, found[0]) < 1e-6
    assert_same(one, other, 1e-5, 1e-7)


def test_moving_statistics_are_those_of_one_device():
    """With frozen weights nothing else changes: after any number of batches they are equal."""

    def build():
        model = normalised()
        for layer in model.layers:
            layer.trainable = isinstance(layer, layers.BatchNormalization)
        return model

    optimizer = lambda: keras.optimizers.SGD(0.0)  # noqa: E731
    one, other = (compiled(s, build=build, optimizer=optimizer) for s in (None, pipeline(3)))
    for model in (one, other):
        history(X, Y, batch_size=8, epochs=3)(model)
    for a, b in zip(one.variables, other.variables, strict=True):
        assert difference(a, b) < 1e-5
    assert difference(one.predict(X, verbose=0), other.predict(X, verbose=0)) < 1e-5


def test_one_micro_batch_is_one_device():
    check(pipeline(1), history(X, Y, batch_size=8, epochs=2), build=normalised)
    check(tfpar.LayerPlacementStrategy(TWO), history(X, Y, batch_size=8, epochs=2), build=normalised)


# ---- random numbers: each micro-batch its own, the same in every run


def dropped():
    x = layers.Input((50,))
    return keras.Model(x, layers.Dropout(0.5, seed=7)(layers.Dropout(0.0, seed=1)(x)))


def masks(strategy, batches=2, eager=False):
    with strategy.scope():
        model = dropped()
    model.compile(run_eagerly=eager)
    ones = np.ones((8, 50), "float32")

    class Mask(keras.Model):
        def predict_step(self, data):
            return self(data, training=True)

    with strategy.scope():
        wrapped = Mask(model.input, model.output)
    wrapped.compile(run_eagerly=eager)
    return [wrapped.predict_on_batch(ones) for _ in range(batches)]


def test_dropout_masks():
    """Other masks for each micro-batch and each batch; the same again from the same seed, on any number of devices."""
    first, second = masks(pipeline())
    parts = np.split(first, 4)
    assert set(np.unique(first)) == {0.0, 2.0}
    assert not any(np.array_equal(a, b) for n, a in enumerate(parts) for b in parts[:n])
    assert not np.array_equal(first, second)
    assert np.array_equal([first, second], masks(pipeline()))
    assert np.array_equal([first, second], masks(tfpar.PipelineStrategy(["CPU:3"], micro_batches=4)))
    assert np.array_equal([first, second], masks(pipeline(), eager=True))


def test_masks_are_those_of_one_device_where_batches_are_whole():
    first, second = masks(tfpar.LayerPlacementStrategy(TWO))
    seed = keras.random.SeedGenerator(7)
    expected = [keras.random.dropout(np.ones((8, 50), "float32"), 0.5, seed=seed) for _ in range(2)]
    assert np.array_equal([first, second], expected)


def test_backward_uses_the_masks_of_forward():
    """The gradient of the sum of what is left is the mask."""
    strategy = pipeline()

    class Gradient(keras.Model):
        def predict_step(self, data):
            with tf.GradientTape() as tape:
                tape.watch(data)
                y = self(data, training=True)
            return y, tape.gradient(y, data)

    with strategy.scope():
        inner = dropped()
        model = Gradient(inner.input, inner.output)
    y, (gradient,) = model.predict_on_batch(np.ones((8, 50), "float32"))
    assert np.array_equal(y, gradient) and 0.0 in y and 2.0 in y


# ---- other state


class Largest(layers.Layer):
    """Keeps the largest value it has seen, which is no sum and no mean."""

    def build(self, shape):
        self.largest = self.add_weight(name="largest", initializer="zeros", trainable=False)

    def call(self, x):
        self.largest.assign(keras.ops.maximum(self.largest, keras.ops.max(x)))
        return x


def test_state_that_micro_batches_cannot_give():
    def build():
        x = layers.Input((WIDTH,))
        return keras.Model(x, layers.Dense(3, activation="softmax")(Largest(name="top")(layers.Dense(4)(x))))

    check(tfpar.LayerPlacementStrategy(TWO), history(X, Y, batch_size=8), build=build)
    model = compiled(pipeline(), build=build)
    try:
        history(X, Y, batch_size=8)(model)
    except tfpar.ModelError as error:
        assert "top keeps" in str(error) and "micro_batches=1" in str(error)
    else:
        raise AssertionError("the largest of a batch was taken for a mean")


# ---- what TensorFlow has to optimise before the first step


MANY, LABELS = data(32)


def normalised_first():
    """Statistics, which have no gradient, come out of the first stage."""
    x = layers.Input((WIDTH,))
    h = layers.Dense(5)(layers.BatchNormalization()(layers.Dense(5)(x)))
    return keras.Model(x, layers.Dense(3, activation="softmax")(layers.Dense(5)(layers.Dense(5)(h))))


def calls_of(build, micro_batches):
    """The calls of functions in a step, by function, and the functions that TensorFlow would copy into each call."""
    steps = hooks_of(compiled(pipeline(micro_batches), build=build))
    graph = StepFunction(steps, steps.train_step).prepared(((MANY, LABELS),), None, None)[0].graph
    calls = {}
    for op in graph.get_operations():
        if "PartitionedCall" in op.type and "/mb" in op.name:
            calls.setdefault(op.get_attr("f").name, []).append(op)
    copied = [x for x in graph.as_graph_def().library.function if not x.attr["_noinline"].b]
    return calls, calls.keys() & {x.signature.name for x in copied}


def constant(tensor):
    """The constant that a tensor is known to be."""
    while tensor.op.type in ("Identity", "Cast"):
        tensor = tensor.op.inputs[0]
    return tensor.name if tensor.op.type == "Const" else None


@pytest.mark.parametrize("build", [build, normalised_first])
def test_more_micro_batches_are_more_calls_of_the_same_functions(build):
    """None of which is copied: into its calls, or for a constant that one of its calls has for itself."""
    few, (many, copied) = calls_of(build, 2)[0], calls_of(build, 16)
    assert len(few) == len(many) and sum(map(len, many.values())) == 8 * sum(map(len, few.values()))
    assert not copied
    for calls in many.values():
        for same in zip(*(op.inputs for op in calls), strict=True):
            assert len(set(map(constant, same))) == 1


def test_many_micro_batches_are_the_same_numbers():
    check(pipeline(16), history(MANY, LABELS, batch_size=32, epochs=2), optimizer="adam")
