"""Compiled metrics under strategies, against one device: in the programs where they can be, on the whole batch else."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from training import Own, check, data, mostly

import tfpar
from tfpar.compat._keras_metrics import MetricCall
from tfpar.engine.metrics import NAME

STRATEGIES = {
    "data": lambda: tfpar.DataParallelStrategy(["CPU:0", "CPU:1"]),
    "pipeline": lambda: tfpar.PipelineStrategy(["CPU:0", "CPU:1"], micro_batches=3),
    "tensor": lambda: tfpar.TensorParallelStrategy(["CPU:0", "CPU:1"]),
    "mesh": lambda: tfpar.MeshStrategy(tfpar.Mesh(data=2, tensor=2)),
}
OWN = {
    "accuracy": lambda: ["accuracy"],
    "several": lambda: [
        keras.metrics.SparseTopKCategoricalAccuracy(3),
        keras.metrics.SparseCategoricalCrossentropy(),
        "accuracy",
    ],
}


def words(masked):
    """A classifier of each word of a text, of which some are padding."""
    x = inputs = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(20, 8, mask_zero=masked)(x)
    x = keras.layers.Dense(16, "relu")(x)
    return keras.Model(inputs, keras.layers.Dense(5, "softmax")(x))


def texts(rows=18):
    rng = np.random.default_rng(0)
    return rng.integers(0, 20, (rows, 6)), rng.integers(0, 5, (rows, 6)), rng.uniform(size=(rows, 6))


def own_step():
    """A model with a training step of its own."""
    x = keras.Input((6,))
    return Own(x, keras.layers.Dense(3, "softmax")(keras.layers.Dense(4)(x)))


def in_program(model):
    """Whether the metrics of its training, and of its evaluation, were part of the programs."""
    (found,) = {NAME in [op.name for op in way.graph.graph.ops] for way in model._tfpar_hooks.engine.losses.values()}
    return found


CASES = list(itertools.product(OWN, [(False, False), (True, True), (True, False)], STRATEGIES))
SAMPLE = [CASES[0], CASES[5], CASES[10], CASES[15], CASES[23]]


@pytest.mark.parametrize("chosen, kind, strategy", mostly(CASES, SAMPLE))
def test_means_of_samples_are_found_in_programs(chosen, kind, strategy):
    masked, weighted = kind
    x, y, weights = texts()
    weights = weights if weighted else None

    def use(model):
        history = model.fit(x, y, sample_weight=weights, batch_size=7, epochs=2, shuffle=False, verbose=0).history
        return history, model.evaluate(x, y, sample_weight=weights, batch_size=7, verbose=0)

    made = dict(build=lambda: words(masked), metrics=OWN[chosen], weighted_metrics=["accuracy"])
    _, other = check(STRATEGIES[strategy](), use, **made)
    assert in_program(other)


class OwnMetrics(keras.Model):
    """Its metrics are what it says."""

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        found = super().compute_metrics(x, y, y_pred, sample_weight)
        return {**found, "largest": keras.ops.max(y_pred)}


def largest_of_batch(y_true, y_pred):
    return keras.ops.max(y_pred, 0)[:, 0]


def own(y_true, y_pred):
    return keras.ops.mean(keras.ops.cast(y_true, y_pred.dtype) - y_pred[..., 0])


@pytest.mark.parametrize("strategy", mostly(list(STRATEGIES), ["mesh"]))
@pytest.mark.parametrize(
    "model, metrics",
    [(keras.Model, lambda: [own]), (OwnMetrics, lambda: ["accuracy"]),
     (keras.Model, lambda: [keras.metrics.MeanIoU(5, sparse_y_pred=False), "accuracy"]),
     (keras.Model, lambda: [keras.metrics.MeanMetricWrapper(largest_of_batch, "largest")])],
    ids=["function", "method", "class", "wrapper"],
)  # fmt: skip
def test_others_get_the_whole_batch(strategy, model, metrics):
    x, y, _ = texts()

    def build():
        made = words(False)
        return model(made.inputs, made.outputs)

    def use(model):
        return model.fit(x, y, batch_size=7, shuffle=False, verbose=0).history

    _, other = check(STRATEGIES[strategy](), use, build=build, metrics=metrics)
    assert not in_program(other)


def test_two_outputs_by_name():
    """Each with metrics of its own, one of them weighted, and an output without."""
    x, y, weights = texts()

    def build():
        inputs = keras.Input((6,), dtype="int32")
        h = keras.layers.Embedding(20, 8)(inputs)
        ends = {name: keras.layers.Dense(5, "softmax", name=name)(h) for name in "abc"}
        return keras.Model(inputs, ends)

    def use(model):
        data = dict(y={n: (y + k) % 5 for k, n in enumerate("abc")}, sample_weight=dict.fromkeys("abc", weights))
        return model.fit(x, **data, batch_size=7, shuffle=False, verbose=0).history

    losses = dict.fromkeys("abc", "sparse_categorical_crossentropy")
    made = dict(loss=losses, metrics=lambda: {"c": ["accuracy", "sparse_top_k_categorical_accuracy"]})
    _, other = check(STRATEGIES["mesh"](), use, build=build, **made, weighted_metrics={"a": ["accuracy"]})
    assert in_program(other)


def shifted(original):
    return lambda self: original(self)[::-1]


def unmasked(original):
    return lambda self: tf.identity(original(self))


@pytest.mark.parametrize("bug", [shifted, unmasked])
def test_finds_planted_bugs(bug, monkeypatch):
    monkeypatch.setattr(MetricCall, "values", bug(MetricCall.values))
    with pytest.raises(AssertionError):
        test_means_of_samples_are_found_in_programs("accuracy", (True, True), "data")


@pytest.mark.parametrize(
    "metric",
    [lambda: keras.metrics.CosineSimilarity(axis=0), lambda: "hinge", lambda: keras.metrics.MeanSquaredError()],
)
@pytest.mark.parametrize("strategy", ["data", "pipeline"])
def test_functions_of_keras_that_look_at_the_whole_batch(strategy, metric):
    """Hinge losses ask whether all labels are 0 or 1; the first batch has both, its first rows have no -1."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(14, 6)), np.repeat([[0.0], [1.0], [-1.0], [1.0], [-1.0], [1.0], [-1.0]], 2, 0)

    def build():
        return keras.Sequential([keras.Input((6,)), keras.layers.Dense(4), keras.layers.Dense(1)])

    def use(model):
        history = model.fit(x, y, batch_size=14, shuffle=False, verbose=0).history
        return history, model.evaluate(x, y, batch_size=14, verbose=0)

    check(STRATEGIES[strategy](), use, build=build, loss="mse", metrics=lambda: [metric()])


def test_methods_that_a_model_is_given():
    """One model has them, not its class."""
    x, y, _ = texts()

    def use(model):
        model.train_on_batch(x, y)
        model.compute_metrics = lambda x, y, y_pred, sample_weight=None: {"sum": keras.ops.sum(y_pred[..., 0])}
        found = model.evaluate(x, y, batch_size=18, verbose=0, return_dict=True)
        model.compute_loss = lambda x, y, y_pred, sample_weight=None, training=False: keras.ops.mean(y_pred[..., 1])
        model.make_test_function(force=True)
        return found, model.evaluate(x, y, batch_size=18, verbose=0, return_dict=True)

    check(STRATEGIES["data"](), use, build=lambda: words(False))


def test_evaluating_before_a_loss_was_built():
    x, y = data()
    check(STRATEGIES["pipeline"](), lambda model: model.evaluate(x, y, batch_size=6, verbose=0), build=own_step)
