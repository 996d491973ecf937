"""A small model under each strategy and on one device, trained alike and compared."""

import contextlib
from typing import ClassVar

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tensorflow.python.framework.ops import gradient_registry

import tfpar
from tfpar.testing import assert_same, difference

ROWS, WIDTH = 20, 6
STRATEGIES = {
    "layers": lambda: tfpar.LayerPlacementStrategy(["CPU:0", "CPU:1"]),
    "pipeline": lambda: tfpar.PipelineStrategy(["CPU:0", "CPU:1"], micro_batches=2),
}

OPTIMIZERS = {
    "adam, global norm": lambda: keras.optimizers.Adam(0.01, global_clipnorm=0.05),
    "adamw, norms": lambda: keras.optimizers.AdamW(0.01, clipnorm=0.02),
    "values, loss scale": lambda: keras.optimizers.SGD(0.05, clipvalue=0.01, loss_scale_factor=8.0),
    "norm, loss scale": lambda: keras.optimizers.SGD(0.05, global_clipnorm=0.05, loss_scale_factor=8.0),
    "accumulation": lambda: keras.optimizers.SGD(0.05, gradient_accumulation_steps=2, global_clipnorm=0.3),
    "average": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=2),
    "dynamic scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
    "muon": lambda: keras.optimizers.Muon(0.01),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "lamb": lambda: keras.optimizers.Lamb(0.01),
    **{
        name: lambda name=name: getattr(keras.optimizers, name)(0.01)
        for name in ("Nadam", "Lion", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Ftrl")
    },
}


class Spy(layers.Layer):
    """Notes what each trace of it is told of training; all of them in one list."""

    traces: ClassVar = []

    def call(self, x, training=None):
        if tf.inside_function():
            self.traces.append(training)
        return x


def mostly(values, kept, fast=()):
    """Parameters of a test: those that are kept, of which some are fast, and the others for `pytest -m every`."""

    def marks(value):
        return pytest.mark.every if value not in kept else pytest.mark.fast if value in fast else []

    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=marks(v)) for v in values]


def some_fast(values, *fast):
    """Parameters of a test, of which those are fast."""
    return mostly(values, values, fast)


class Own(keras.Model):
    """A training step of its own, which computes what Keras' does."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            predicted = self(x, training=True)
            loss = self.compute_loss(x, y, predicted)
        weights = self.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return self.compute_metrics(x, y, predicted)


def deep():
    """Layers that ranks divide, and normalizations between them."""
    x = h = layers.Input((6,))
    for _ in range(3):
        h = layers.Dense(8, activation="tanh")(h)
        h = layers.LayerNormalization()(h)
    return keras.Model(x, layers.Dense(3, activation="softmax")(h))


def data(rows=ROWS):
    rng = np.random.default_rng(0)
    floatx = keras.config.floatx()
    return rng.normal(size=(rows, WIDTH)).astype(floatx), rng.integers(0, 3, size=rows)


def build():
    x = layers.Input((WIDTH,))
    h = layers.Dense(5, activation="tanh")(x)
    return keras.Model(x, layers.Dense(3, activation="softmax")(layers.Dense(4)(h)))


def compiled(strategy=None, optimizer="sgd", build=build, **compile):
    keras.utils.set_random_seed(3)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = build()
        optimizer = optimizer() if callable(optimizer) else optimizer
        options = {"loss": "sparse_categorical_crossentropy", "metrics": lambda: ["accuracy"], **compile}
        options["metrics"] = options["metrics"]()
        model.compile(optimizer, **options)
    return model


def check(strategy, use, rtol=1e-5, atol=1e-7, **compile):
    """`use(model)` on one device and under the strategy: the same result, the same variables."""
    one, other = compiled(**compile), compiled(strategy, **compile)
    results = use(one), use(other)
    flat = [keras.tree.flatten(r) for r in results]
    assert len(flat[0]) == len(flat[1])
    for a, b in zip(*flat, strict=True):
        assert a == b if isinstance(a, str) else difference(a, b) < rtol
    assert_same(one, other, rtol, atol)
    return one, other


def history(*args, **kwargs):
    return lambda model: model.fit(*args, verbose=0, shuffle=False, **kwargs).history


@contextlib.contextmanager
def gradients_forgotten():
    """What is made inside can be freed: TensorFlow keeps each custom gradient, and with it a graph, for ever."""
    registry = gradient_registry._registry
    before = set(registry)
    yield
    for name in set(registry) - before:
        del registry[name]
