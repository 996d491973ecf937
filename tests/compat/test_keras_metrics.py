"""Compiled metrics in two steps, without a strategy: the same numbers as in one."""

import keras
import numpy as np
import tensorflow as tf

from tfpar.compat import _keras_metrics


def model(metrics):
    made = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    made.compile("sgd", "sparse_categorical_crossentropy", metrics=metrics)
    made.train_on_batch(np.ones((2, 4)), np.zeros(2))
    return made


def test_metric_calls_and_given_values():
    made = model(["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2)])
    y, y_pred = np.array([0, 1, 2, 2]), tf.constant(np.random.default_rng(0).normal(size=(4, 3)), "float32")
    made.reset_metrics()
    made.compute_metrics(None, y, y_pred)
    expected = made.get_metrics_result()
    calls = _keras_metrics.metric_calls(made, y, y_pred)
    assert [call.metric.name for call in calls] == ["accuracy", "sparse_top_k_categorical_accuracy"]
    made.reset_metrics()
    with _keras_metrics.given_values(made, [call.values() for call in calls]):
        made.compute_metrics(None, y, tf.zeros(()))
    assert made.get_metrics_result() == expected
    made.compute_metrics(None, y, y_pred)  # as before


def test_spec_is_of_samples():
    (call,) = _keras_metrics.metric_calls(
        model(["accuracy"]), keras.KerasTensor((None,), "int32"), keras.KerasTensor((None, 3))
    )
    assert call.spec().shape == (None,)


def test_are_means_of_samples():
    assert _keras_metrics.are_means_of_samples(model(["accuracy", "sparse_categorical_crossentropy"]))
    assert _keras_metrics.are_means_of_samples(model([]))
    assert not _keras_metrics.are_means_of_samples(model([keras.metrics.MeanIoU(3, sparse_y_pred=False)]))
    assert not _keras_metrics.are_means_of_samples(model([lambda y, p: p[:, 0]]))
    assert not _keras_metrics.are_means_of_samples(model([keras.losses.SparseCategoricalCrossentropy()]))
