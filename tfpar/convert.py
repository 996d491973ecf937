"""A live model from one strategy to another."""

from typing import Any

import keras
import tensorflow as tf

from tfpar import _keras
from tfpar.saving import variables_of
from tfpar.step import family
from tfpar.variables import LogicalVariable


def convert(model: keras.Model, other: Any):
    """Move a model, the models in it, their optimizers and metrics to another strategy.

    Variables go through host memory, one by one, and wait there until the model is used.
    """
    for steps in family(model):
        inner = steps.model
        for variable in variables_of(inner):
            hand_over(variable, other)
        if inner.compiled and inner.optimizer is not None:
            _keras.give_strategy(inner.optimizer, other)
        inner.train_function = inner.test_function = inner.predict_function = None
        other._adopt(inner)


def hand_over(variable: keras.Variable, other: Any):
    """Let a variable belong to another strategy."""
    stored = _keras.stored(variable)
    if isinstance(stored, LogicalVariable):
        stored.hand_over(other)
    elif isinstance(stored, tf.distribute.DistributedValues):  # each replica has its own, for sums
        value = variable.numpy()
        with other.scope():
            new = tf.Variable(
                value, trainable=False, name=variable.name, aggregation=stored.aggregation,
                synchronization=tf.VariableSynchronization.ON_READ,
            )  # fmt: skip
        _keras.set_value(variable, new)
