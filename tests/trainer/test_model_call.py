"""A model that is called: in steps and loops of a user's own, the devices and the numbers are those of `fit`."""

import contextlib
import os
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from training import STRATEGIES, WIDTH, build, compiled, data, history, mostly, some_fast

import tfpar
from tfpar import Mesh
from tfpar.testing import assert_same, difference
from tfpar.trainer.hooks import hooks_of
from tfpar.variables.logical import LogicalVariable

X, Y = data(20)
TARGETS = np.eye(3, dtype="float32")[Y]
DIVIDED = {
    "data": lambda: tfpar.DataParallelStrategy(3), "zero": lambda: tfpar.DataParallelStrategy(2, zero=3),
    "tensor": lambda: tfpar.TensorParallelStrategy(2), "mesh": lambda: tfpar.MeshStrategy(Mesh(2, 1, 2)), **STRATEGIES,
}  # fmt: skip


# ---- what layers are told of training


class Untold(keras.Model):
    """Its `call` has no `training` argument: Keras hands on what it was called with."""

    def __init__(self):
        super().__init__()
        self.normalize, self.dense = layers.BatchNormalization(momentum=0.5), layers.Dense(3)

    def call(self, x):
        return self.dense(self.normalize(x))

    def train_step(self, batch):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(batch[0], training=True)))
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"loss": loss}


class Passing(Untold):
    """Hands it on to a model that learns its input's shape from the data."""

    def __init__(self):
        super().__init__()
        self.backbone = keras.Sequential([layers.Dense(8), layers.BatchNormalization(momentum=0.5), layers.ReLU()])

    def call(self, x, training=False):
        return self.dense(self.backbone(x, training=training))


class Composite(layers.Layer):
    """A layer of layers that hands on nothing."""

    def __init__(self):
        super().__init__()
        self.inner = [layers.Dense(8), layers.BatchNormalization(momentum=0.5), layers.Dense(4)]

    def call(self, x):
        for layer in self.inner:
            x = layer(x)
        return x


def composite():
    x = layers.Input((WIDTH,))
    return keras.Model(x, layers.Dense(3)(Composite()(x)))


@pytest.mark.parametrize("model", some_fast([Untold, Passing, composite], Passing))
@pytest.mark.parametrize("name", ["data", "tensor", "layers"])
def test_training_reaches_every_layer(model, name):
    """The statistics of BatchNormalization move, and what it normalises with is that of the batch."""
    options = {"build": model, "loss": None if model is not composite else "mse", "metrics": lambda: None}
    one, other = compiled(**options), compiled(DIVIDED[name](), **options)
    for m in (one, other):
        history(X, TARGETS, batch_size=8, epochs=2)(m)
    assert_same(one, other, 1e-5, 1e-6)
    moving = [w for w in other.weights if "moving_mean" in w.path]
    assert moving and any(np.any(np.abs(w.numpy()) > 1e-3) for w in moving)


@pytest.mark.fast
def test_a_pipeline_moves_statistics_too():
    options = {"build": Untold, "loss": None, "metrics": lambda: None}
    one, other = compiled(**options), compiled(STRATEGIES["pipeline"](), **options)
    for m in (one, other):
        m.fit(X, Y, batch_size=20, verbose=0)
    assert difference(one.normalize.moving_mean, other.normalize.moving_mean) < 1e-5


class Spectrum(layers.Layer):
    """Complex numbers."""

    def call(self, x):
        return tf.signal.fft(tf.cast(x, tf.complex64))

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, "complex64")


@pytest.mark.fast
def test_gradients_of_complex_outputs():
    x, found = layers.Input((WIDTH,)), []
    for scope in (contextlib.nullcontext(), STRATEGIES["pipeline"]().scope()):
        keras.utils.set_random_seed(0)
        with scope:
            model = keras.Model(x, [layers.Dense(3)(x), Spectrum()(layers.Dense(8, "tanh")(layers.Dense(8)(x)))])
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.abs(model(X, training=True)[1]) ** 2)
        weights = [v.value for v in model.trainable_variables]
        found.append(tape.gradient(loss, weights, unconnected_gradients="zero"))
    assert sum(bool(np.any(g)) for g in found[0]) == 4
    for a, b in zip(*found, strict=True):
        assert difference(a, b) < 1e-5


# ---- layers that are random, in training or not


class Sampling(layers.Layer):
    """As keras.io's variational autoencoder draws."""

    def __init__(self, seed=1337):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, inputs):
        mean, log_variance = inputs
        noise = keras.random.normal(ops.shape(mean), seed=self.seed_generator)
        return mean + ops.exp(0.5 * log_variance) * noise


class Unseeded(layers.Layer):
    """Draws from Keras' global seed."""

    def call(self, inputs):
        return inputs[0] + 0.1 * keras.random.normal(ops.shape(inputs[1]))


class Unrepeatable(layers.Layer):
    """Draws from TensorFlow's."""

    def call(self, inputs):
        return inputs[0] + 0.1 * tf.random.normal(tf.shape(inputs[1]))


@pytest.mark.parametrize("make", some_fast([Sampling, Unseeded, Unrepeatable], Sampling))
@pytest.mark.parametrize("name", ["data", "pipeline"])
def test_random_layers_are_divided(make, name, recwarn):
    def model():
        x = layers.Input((WIDTH,))
        h = layers.Dense(8, activation="relu")(x)
        return keras.Model(x, layers.Dense(3)(make()([layers.Dense(2)(h), layers.Dense(2)(h)])))

    strategy = DIVIDED[name]()
    other = compiled(strategy, build=model, loss="mse", metrics=lambda: None)
    history(X, TARGETS, batch_size=8)(other)
    assert not [w for w in recwarn if "whole batch" in str(w.message)]
    assert not strategy.explain(other).global_batch and np.isfinite(other.predict(X, verbose=0)).all()


@pytest.mark.fast
def test_random_layers_that_mix_do_not_pass():
    class Mixing(layers.Layer):
        def call(self, x):
            return x - ops.mean(x, 0) + 0.0 * keras.random.normal(ops.shape(x))

    def model():
        x = layers.Input((WIDTH,))
        return keras.Model(x, layers.Dense(3, activation="softmax")(Mixing(name="mixing")(layers.Dense(4)(x))))

    with pytest.raises(tfpar.ModelError, match="mixing mixes the samples of a batch"):
        history(X, Y)(compiled(STRATEGIES["pipeline"](), build=model))


# ---- loops of a user's own


def regularized():
    x = layers.Input((WIDTH,))
    h = layers.Dense(8, activation="tanh", kernel_regularizer="l2")(x)
    return keras.Model(x, layers.Dense(3)(layers.Dense(8, activation="tanh", activity_regularizer="l2")(h)))


def looped(strategy, how):
    """A model after some steps of a loop, its optimizer's variables, and the losses."""
    keras.utils.set_random_seed(1)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model, optimizer = regularized(), keras.optimizers.Adam(0.01, clipnorm=0.1, epsilon=1e-4)

    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True))) + tf.add_n(model.losses)
        weights = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return loss

    def one(x):
        return strategy.run(step, args=(x,)) if strategy and how == "run" else step(x)

    run = step if how == "eager" else tf.function(one, autograph=False)
    losses = [float(run(tf.constant(X[n : n + 7]))) for n in (0, 7, 13)]
    return model, [v.numpy() for v in [*model.variables, *optimizer.variables]], losses


CASES = [(s, h) for s in DIVIDED for h in ("eager", "function", "run") if h != "run" or s in ("tensor", *STRATEGIES)]


@pytest.mark.parametrize(
    "name, how", mostly(CASES, CASES[::2], [(name, "eager") for name in ("data", "tensor", "pipeline")])
)
def test_own_loops(name, how):
    strategy = DIVIDED[name]()
    _, *expected = looped(None, how)
    model, *found = looped(strategy, how)
    for a, b in zip(*map(keras.tree.flatten, (expected, found)), strict=True):
        assert difference(a, b) < 1e-5
    used = {copy.device[-5:] for v in model.weights for copy in v.value.copies}
    assert used == {*strategy.mesh.devices}
    assert difference(looped(None, how)[0](X), model(X)) < 1e-5


@pytest.mark.fast
def test_the_work_of_a_loop_is_divided():
    with (strategy := STRATEGIES["pipeline"]()).scope():
        model = build()
    graph = tf.function(lambda x: model(x)).get_concrete_function(tf.constant(X)).graph
    assert {op.device[-5:] for op in graph.get_operations() if "PartitionedCall" in op.type} == {*strategy.mesh.devices}


@pytest.mark.fast
def test_loops_on_several_replicas_without_whole_copies():
    with pytest.raises(tfpar.ModelError, match="call the model in your loop without strategy.run"):
        looped(DIVIDED["mesh"](), "run")


@pytest.mark.fast
@pytest.mark.parametrize("name", ["pipeline", "data"])
def test_calls_that_are_not_divided(name):
    """In other functions than steps, the numbers are the same; what is compiled as one program cannot be."""
    with DIVIDED[name]().scope():
        model = build()
    expected = model.predict(X, verbose=0)
    batches = tf.data.Dataset.from_tensor_slices(X).batch(8).map(lambda x: model(x))
    assert difference(expected, np.concatenate(list(batches))) < 1e-6
    outer = keras.Sequential([layers.Input((WIDTH,)), model])
    assert difference(expected, outer.predict(X, verbose=0)) < 1e-6
    compiled_call = tf.function(lambda x: model(x), jit_compile=True, autograph=False)
    if name == "data":
        assert difference(expected, compiled_call(X)) < 1e-5
    else:
        with pytest.raises(tfpar.ModelError, match=r"leave jit_compile out there; model.compile\(jit_compile=True\)"):
            compiled_call(X)


def test_an_own_step_is_planned_for_its_batch():
    with (strategy := DIVIDED["pipeline"]()).scope():
        model = Untold()
        model.compile("sgd")
    model.fit(X, Y, batch_size=16, verbose=0)
    assert strategy.explain(model).rows == 16


def test_a_model_without_a_call():
    class Pair(keras.Model):
        def __init__(self):
            super().__init__()
            self.encoder = keras.Sequential([layers.Input((WIDTH,)), layers.Dense(4), layers.Dense(2)], name="encoder")
            self.decoder = keras.Sequential([layers.Input((2,)), layers.Dense(4), layers.Dense(WIDTH)], name="decoder")

        def train_step(self, batch):
            x = batch[0]
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self.decoder(self.encoder(x)) - x))
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {"loss": loss}

    with (strategy := DIVIDED["pipeline"]()).scope():
        model = Pair()
        model.compile("adam")
    model.fit(X, Y, verbose=0)
    assert strategy.explain(model.encoder).partition.stages == 2
    with pytest.raises(tfpar.ModelError, match="pair is not called itself; explain the models in it: encoder, decoder"):
        strategy.explain(model)


# ---- interrupted


@pytest.mark.parametrize("name", ["zero", "tensor", "pipeline"])
@pytest.mark.parametrize("at", [1, 4])
def test_ctrl_c_while_variables_move(name, at, monkeypatch):
    """The model can be trained afterwards, as if nothing had been."""
    one, other = compiled(None, "adam"), compiled(DIVIDED[name](), "adam")
    original, moved = LogicalVariable.place, []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C

    def place(self, *args):
        moved.append(self)
        original(self, *args)
        if len(moved) == at:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(LogicalVariable, "place", place)
    try:
        with pytest.raises(KeyboardInterrupt):
            history(X, Y, batch_size=8)(other)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(moved) > at
    for model in (one, other):
        history(X, Y, batch_size=8)(model)
    assert_same(one, other, 1e-5, 1e-6)
    assert hooks_of(other).engine is not None
