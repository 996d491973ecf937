"""Private names of Keras' BatchNormalization. Checked against Keras 3.15.1; `tests/compat/test_keras.py` tests each."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import ops

from tfpar.compat._keras import layers_in


class Moments(NamedTuple):
    """Batch statistics of a BatchNormalization call: per channel, and by what the sums of its values were divided."""

    mean: tf.Tensor
    variance: tf.Tensor
    divisor: tf.Tensor


def divisor(layer: Any, inputs: tf.Tensor, mask: Any, dtype: Any) -> tf.Tensor:
    """By what a BatchNormalization divides the sums over a channel: how many values there are.

    Where there is a mask, Keras adds `keras.config.epsilon()`.
    """
    if mask is None:
        return tf.cast(tf.size(inputs) / inputs.shape[layer.axis], dtype)
    return tf.reduce_sum(tf.cast(mask, dtype)) + keras.config.epsilon()


def whole_moments(parts: Moments) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance of a batch from those of its parts (Chan et al., "Updating formulae …", 1979).

    Args:
        parts: mean and variance of shape (parts, channels), divisor of shape (parts,).
    """
    divisor = parts.divisor[:, None]
    count = tf.round(divisor)
    excess = divisor - count  # which the whole batch has once
    whole_divisor = tf.reduce_sum(count) + tf.reduce_max(excess)
    mean, variance = (tf.math.multiply_no_nan(x, tf.cast(count > 0, x.dtype)) for x in parts[:2])
    whole = tf.reduce_sum(mean * divisor, 0) / whole_divisor
    apart = mean - whole
    squares = variance * divisor + apart * (apart * count + 2 * excess * mean)
    return whole, tf.reduce_sum(squares, 0) / whole_divisor


@contextlib.contextmanager
def recorded(layers: Sequence[Any], found: list[tuple[int, Moments]]) -> Iterator[None]:
    """Inside, the statistics that each of these BatchNormalization layers takes are appended to `found`."""

    def recording(index, layer):
        def moments(inputs, mask):
            mean, variance = type(layer)._moments(layer, inputs, mask)
            found.append((index, Moments(mean, variance, divisor(layer, inputs, mask, mean.dtype))))
            return mean, variance

        return moments

    for index, layer in enumerate(layers):
        vars(layer)["_moments"] = recording(index, layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["_moments"]


@contextlib.contextmanager
def given(layer: Any, mean: tf.Tensor, variance: tf.Tensor) -> Iterator[None]:
    """Inside, a BatchNormalization layer takes these for the statistics of its input."""
    vars(layer)["_moments"] = lambda inputs, mask: (mean, variance)
    try:
        yield
    finally:
        del vars(layer)["_moments"]


def is_batch_normalization(operation: Any) -> bool:
    """Whether this is a BatchNormalization that computes as Keras' own."""
    return type(operation) is keras.layers.BatchNormalization


def batch_normalizations(operation: Any) -> list[Any]:
    """The BatchNormalization layers in an operation."""
    return [x for x in layers_in(operation) if isinstance(x, keras.layers.BatchNormalization)]


def moving_statistics(layer: Any) -> list[keras.Variable]:
    """The variables that `move_statistics` changes."""
    names = ["moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev"]
    return [v for n in names if isinstance(v := getattr(layer, n, None), keras.Variable)]


def move_statistics(layer: Any, mean: tf.Tensor, variance: tf.Tensor):
    """Move a BatchNormalization's statistics by those of one batch, as its `call` does."""
    if layer.renorm:
        layer._update_renorm_statistics(mean, variance)
        return
    for moving, value in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
        old = ops.cast(moving, value.dtype)
        moving.assign(old * layer.momentum + value * (1.0 - layer.momentum))
